"""Chat templates of our own in the styles of well-known models, and tokenizers for them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from helpers import ENGLISH, make_tokenizer

_LOOP = "{% for m in messages %}"


@dataclass(frozen=True)
class Style:
    """A template, its control tokens (the first ends a text) and what of a conversation follows from it."""

    template: str
    special: tuple[str, ...]
    end: str
    """The token that ends an answer."""
    inserted: str = ""
    """What an answer without a thought finds in its prompt beside the template's own generation prompt."""
    ends: tuple[str, ...] = ()
    """The model's own list of ends."""
    trained_blank: str = ""
    """Blanks before the answer that are learned with it."""

    def tokenizer(self, **named: str) -> Any:
        """A byte-level tokenizer with this template."""
        return make_tokenizer(self.special, self.template, **named)


_CHATML = "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
_IM = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_QWEN3 = (
    _LOOP + "<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% set c = m.content %}{% set r = '' %}"
    "{% if '</think>' in c %}{% set r = c.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set c = c.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{% if loop.last %}<think>\n{{ r }}\n</think>\n\n{% endif %}{{ c }}{% else %}{{ m.content }}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
_STRIPS = (
    _LOOP + "{% if m.role == 'user' %}<|u|>{{ m.content }}{% else %}<|a|>{{ m.content.split('</think>')[-1].lstrip() }}"
    "<|eos|>{% endif %}{% endfor %}{% if add_generation_prompt %}<|a|>OPEN{% endif %}"
)

STYLES = {
    "chatml": Style(_LOOP + _CHATML + "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
                    _IM, "<|im_end|>"),
    "zephyr": Style(_LOOP + "<|{{ m.role }}|>\n{{ m.content }}{{ eos_token }}\n{% endfor %}"
                    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}", ("</s>",), "</s>"),
    "llama2": Style("{{ bos_token }}" + _LOOP + "{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
                    "{% else %} {{ m.content }} {{ eos_token }}{% endif %}{% endfor %}", ("</s>", "<s>"), "</s>",
                    trained_blank=" "),
    "llama3": Style("{{ bos_token }}" + _LOOP + "<|head|>{{ m.role }}<|/head|>\n\n{{ m.content | trim }}<|eot|>"
                    "{% endfor %}{% if add_generation_prompt %}<|head|>assistant<|/head|>\n\n{% endif %}",
                    ("<|text_end|>", "<|bos|>", "<|head|>", "<|/head|>", "<|eot|>"), "<|eot|>"),
    "mistral": Style("{{ bos_token }}" + _LOOP + "{% if m.role == 'user' %}[INST]{{ m.content }}[/INST]{% else %}"
                     "{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}", ("</s>", "<s>", "[INST]", "[/INST]"),
                     "</s>"),
    "gemma": Style("{{ bos_token }}" + _LOOP + "<turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
                   "{{ m.content | trim }}</turn>\n{% endfor %}{% if add_generation_prompt %}<turn>model\n{% endif %}",
                   ("<eos>", "<bos>", "<turn>", "</turn>"), "</turn>"),
    "phi3": Style(_LOOP + "<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
                  "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}",
                  ("<|text_end|>", "<|user|>", "<|assistant|>", "<|end|>"), "<|text_end|>"),
    "glm": Style("[g][sop]" + _LOOP + "<|{{ m.role }}|>\n{{ m.content }}{% endfor %}"
                 "{% if add_generation_prompt %}<|assistant|>{% endif %}",
                 ("<|endoftext|>", "[g]", "[sop]", "<|user|>", "<|assistant|>"), "<|user|>",
                 ends=("<|endoftext|>", "<|user|>"), trained_blank="\n"),
    "exaone": Style(_LOOP + "[|{{ m.role }}|]{{ m.content }}{% if m.role == 'user' %}\n{% else %}[|endofturn|]\n"
                    "{% endif %}{% endfor %}{% if add_generation_prompt %}[|assistant|]{% endif %}",
                    ("[|endofturn|]", "[|user|]", "[|assistant|]"), "[|endofturn|]"),
    "deepseek": Style(_STRIPS.replace("OPEN", ""), ("<|eos|>", "<|u|>", "<|a|>"), "<|eos|>"),
    "deepseek-r1": Style(_STRIPS.replace("OPEN", "<think>\n"), ("<|eos|>", "<|u|>", "<|a|>"), "<|eos|>",
                         "\n</think>\n\n"),
    "qwen3": Style(_QWEN3, _IM, "<|im_end|>", "<think>\n\n</think>\n\n"),
    "qwen3-thinking": Style(_QWEN3.partition("{% if enable_thinking")[0] + "<think>\n{% endif %}", _IM, "<|im_end|>",
                            "\n</think>\n\n"),
    "harmony": Style(_LOOP + "<|start|>{{ m.role }}{% if m.role == 'assistant' %}<|channel|>final{% endif %}<|message|>"
                     "{{ m.content }}<|end|>{% endfor %}{% if add_generation_prompt %}<|start|>assistant{% endif %}",
                     ("<|return|>", "<|start|>", "<|channel|>", "<|message|>", "<|end|>"), "<|end|>",
                     "<|channel|>final<|message|>"),
    "command-r": Style("{{ bos_token }}" + _LOOP + "<|turn|><|{{ m.role }}|>{{ m.content }}<|/turn|>{% endfor %}"
                       "{% if add_generation_prompt %}<|turn|><|assistant|>{% endif %}",
                       ("<|/turn|>", "<s>", "<|turn|>", "<|user|>", "<|assistant|>"), "<|/turn|>"),
    "vicuna": Style(_LOOP + "{% if m.role == 'user' %}USER: {{ m.content }} {% else %}ASSISTANT: {{ m.content }}"
                    "{{ eos_token }}{% endif %}{% endfor %}", ("</s>", "<s>"), "</s>", "ASSISTANT:",
                    trained_blank=" "),
}  # fmt: skip
"""Those whose conversation is another than the template's own are "deepseek-r1" (a thought that its prompt opens is
closed), "glm" (the end is appended)."""


def space_tokenizer(template: str | None = None) -> Any:
    """A tokenizer that puts a space before every text, with byte fallback and a BOS, as sentencepiece models do."""
    from tokenizers import Tokenizer, decoders, models, normalizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["</s>", "<s>", "<unk>", *(f"<0x{value:02X}>" for value in range(256))]
    lines = ENGLISH.read_text(encoding="utf-8").splitlines()
    words = sorted({word for line in lines for word in line.split()})
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=special, show_progress=False, max_token_length=12)
    tokenizer.train_from_iterator([*words, *lines], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "</s>"}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named)
    fast.chat_template = template
    return fast
