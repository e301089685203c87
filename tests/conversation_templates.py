"""Chat templates of our own in the styles of twelve model families, each with and without marks around answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from chat_templates import space_tokenizer
from helpers import make_tokenizer

_A = "{% if m.role == 'assistant' %}"
_LOOP = "{% for m in messages %}"
_IM = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_GENERATE = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
_IM_TURNS = (
    _LOOP + "<|im_start|>{{ m.role }}\n" + _A + "«{{ m.content }}<|im_end|>»{% else %}{{ m.content }}<|im_end|>"
    "{% endif %}{{ '\n' }}{% endfor %}" + _GENERATE
)
_CALLS = (
    "{% for c in m.tool_calls or [] %}\n<tool_call>\n{\"name\": \"{{ c.function.name }}\", \"arguments\": "
    "{{ c.function.arguments | tojson }}}\n</tool_call>{% endfor %}"
)  # fmt: skip
_QWEN25 = (
    "<|im_start|>system\n{% if messages[0].role == 'system' %}{{ messages[0].content }}{% else %}You help.{% endif %}"
    "{% if tools %}\n# Tools\n{% for t in tools %}{{ t | tojson }}\n{% endfor %}{% endif %}<|im_end|>\n" + _LOOP +
    "{% if m.role == 'tool' %}<|im_start|>user\n<tool_response>\n{{ m.content }}\n</tool_response><|im_end|>\n"
    "{% elif m.role == 'assistant' %}<|im_start|>assistant\n«{{ m.content }}" + _CALLS + "<|im_end|>»\n"
    "{% elif m.role == 'user' %}<|im_start|>user\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}" + _GENERATE
)  # fmt: skip
_QWEN3 = (
    "{% set own = namespace(last=-1) %}" + _LOOP + "{% if m.role == 'user' %}"
    "{% set own.last = loop.index0 %}{% endif %}{% endfor %}" + _LOOP +
    "{% if m.role == 'tool' %}<|im_start|>user\n<tool_response>\n{{ m.content }}\n"
    "</tool_response><|im_end|>\n{% elif m.role == 'assistant' %}<|im_start|>assistant\n{% set r = '' %}"
    "{% set c = m.content %}{% if '</think>' in c %}"
    "{% set r = c.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set c = c.split('</think>')[-1].lstrip('\n') %}{% endif %}{% if loop.index0 > own.last and (loop.last or r) %}"
    "{% if r %}«<think>\n{{ r }}\n</think>\n\n{{ c }}" + _CALLS + "<|im_end|>»{% else %}<think>\n\n</think>\n\n«{{ c }}"
    + _CALLS + "<|im_end|>»{% endif %}{% else %}«{{ c }}" + _CALLS + "<|im_end|>»{% endif %}{{ '\n' }}{% else %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}{% if add_generation_prompt %}"
    "<|im_start|>assistant\n{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n"
    "{% endif %}{% endif %}"
)  # fmt: skip
_GEMMA = (
    "{{ bos_token }}SYSTEM{% for m in turns %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}" + _A + "<turn>model\n«{{ m.content | trim }}</turn>»\n"
    "{% else %}<turn>user\n{% if loop.first %}{{ first }}{% endif %}{{ m.content | trim }}</turn>\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<turn>model\n{% endif %}"
)
_SPLIT_SYSTEM = (
    "{% if messages[0].role == 'system' %}{% set first = messages[0].content + '\n\n' %}{% set turns = messages[1:] %}"
    "{% else %}{% set first = '' %}{% set turns = messages %}{% endif %}"
)
_NO_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% set first = '' %}{% set turns = messages %}"
)


@dataclass(frozen=True)
class Family:
    """A template with « and » around answers, its control tokens (the first ends a text), and what it does."""

    template: str
    special: tuple[str, ...]
    has_bos: bool = False
    takes_system: bool = True

    @property
    def plain(self) -> str:
        """The template as models have it."""
        return self.template.replace("«", "").replace("»", "")

    @property
    def marked(self) -> str:
        """The template with transformers' marks around answers."""
        return self.template.replace("«", "{% generation %}").replace("»", "{% endgeneration %}{{ '' }}")

    def tokenizer(self, kind: str) -> Any:
        """A byte-level tokenizer, or one that puts a space before texts, with this template."""
        if kind == "bytes":
            named = {"bos_token": self.special[1]} if self.has_bos else {}
            return make_tokenizer(self.special, self.plain, **named)
        tokenizer = space_tokenizer(self.plain)
        tokenizer.add_special_tokens({"additional_special_tokens": list(self.special[1 + self.has_bos :])})
        tokenizer.add_special_tokens({"eos_token": self.special[0]})
        if self.has_bos:
            tokenizer.add_special_tokens({"bos_token": self.special[1]})
        return tokenizer


FAMILIES = {
    "qwen2.5": Family(_QWEN25, _IM),
    "qwen3": Family("{% set enable_thinking = false %}" + _QWEN3, _IM),
    "qwen3 thinking": Family(_QWEN3, _IM),
    "llama-3": Family(
        "{{ bos_token }}" + _LOOP + "<|head|>{{ m.role }}<|/head|>\n\n" + _A + "«{{ m.content | trim }}<|eot|>»"
        "{% else %}{{ m.content | trim }}<|eot|>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|head|>assistant<|/head|>\n\n{% endif %}",
        ("<|text_end|>", "<|bos|>", "<|head|>", "<|/head|>", "<|eot|>"), has_bos=True,
    ),
    "gemma-3": Family(_GEMMA.replace("SYSTEM", _SPLIT_SYSTEM), ("<eos>", "<bos>", "<turn>", "</turn>"), has_bos=True),
    "mistral": Family(
        "{{ bos_token }}" + _SPLIT_SYSTEM + "{% for m in turns %}" + _A + "«{{ m.content }}{{ eos_token }}»"
        "{% else %}[INST]{% if loop.first %}{{ first }}{% endif %}{{ m.content }}[/INST]{% endif %}{% endfor %}",
        ("</s>", "<s>", "[INST]", "[/INST]"), has_bos=True,
    ),
    "phi-4": Family(
        _LOOP + "<|im_start|>{{ m.role }}<|im_sep|>" + _A + "«{{ m.content }}<|im_end|>»{% else %}{{ m.content }}"
        "<|im_end|>{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant<|im_sep|>{% endif %}",
        (*_IM, "<|im_sep|>"),
    ),
    "smollm2": Family(
        "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are small.<|im_end|>\n{% endif %}" + _IM_TURNS,
        _IM,
    ),
    "exaone-3.5": Family(
        "{% if messages[0].role != 'system' %}[|system|][|endofturn|]\n{% endif %}" + _LOOP + "[|{{ m.role }}|]" + _A +
        "«{{ m.content }}[|endofturn|]»\n{% elif m.role == 'system' %}{{ m.content }}[|endofturn|]\n{% else %}"
        "{{ m.content }}\n{% endif %}{% endfor %}{% if add_generation_prompt %}[|assistant|]{% endif %}",
        ("[|endofturn|]", "[|system|]", "[|user|]", "[|assistant|]"),
    ),
    "deepseek-r1": Family(
        "{{ bos_token }}" + _LOOP + "{% if m.role == 'system' %}{{ m.content }}{% elif m.role == 'user' %}<|u|>"
        "{{ m.content }}{% else %}<|a|>«{{ m.content.split('</think>')[-1].lstrip() }}<|eos|>»{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|a|>{% endif %}",
        ("<|eos|>", "<|bos|>", "<|u|>", "<|a|>"), has_bos=True,
    ),
    "chatml": Family(_IM_TURNS, _IM),
    "no system": Family(_GEMMA.replace("SYSTEM", _NO_SYSTEM), ("<eos>", "<bos>", "<turn>", "</turn>"), True, False),
}  # fmt: skip
"""Those of models; plain text, without a template, is ``PLAIN``."""

PLAIN = Family(_LOOP + _A + "«{{ m.content }}{{ eos_token }}»{% else %}{{ m.content }}\n\n{% endif %}{% endfor %}",
               ("</s>", "<s>"))  # fmt: skip
"""What a conversation is where the tokenizer has no template."""
