"""EXAONE 3.x as its paper describes it, in plain torch under its own names: a tiny checkpoint, and its forward pass."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from helpers import make_tokenizer
from safetensors.torch import load_file, save_file
from torch.nn.functional import embedding, linear, silu, softmax

TEMPLATE = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}{{ '[|system|][|endofturn|]\n' }}{% endif %}"
    "{{ '[|' + m['role'] + '|]' + m['content'] }}{% if m['role'] == 'user' %}{{ '\n' }}{% else %}"
    "{{ '[|endofturn|]\n' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '[|assistant|]' }}{% endif %}"
)
"""EXAONE 3.5's chat format."""

SPECIAL = ("[PAD]", "[BOS]", "[|endofturn|]", "[|system|]", "[|user|]", "[|assistant|]")

CODE = {
    "configuration_exaone.py": "raise RuntimeError('the remote code ran')\n",
    "modeling_exaone.py": "from .configuration_exaone import ExaoneConfig\nfrom .rotary import rotate\n",
    "rotary.py": "raise RuntimeError('the remote code ran')\n",
}
"""Files that auto_map names, one that they import, and no way to import any of them unnoticed."""


def exaone_config(tied: bool, **changes: Any) -> dict[str, Any]:
    """A config.json with the keys and the order of EXAONE 3.5's, and small numbers."""
    return {
        "activation_function": "silu",
        "architectures": ["ExaoneForCausalLM"],
        "attention_dropout": 0.0,
        "auto_map": {
            "AutoConfig": "configuration_exaone.ExaoneConfig",
            "AutoModelForCausalLM": "modeling_exaone.ExaoneForCausalLM",
        },
        "bos_token_id": 1,
        "embed_dropout": 0.0,
        "eos_token_id": 2,
        "head_dim": 16,
        "hidden_size": 64,
        "initializer_range": 0.02,
        "intermediate_size": 96,
        "layer_norm_epsilon": 1e-05,
        "max_position_embeddings": 512,
        "model_type": "exaone",
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_layers": 6,
        "pad_token_id": 0,
        "rope_scaling": {
            "factor": 8.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 64,
            "rope_type": "llama3",
        },
        "rope_theta": 1000000.0,
        "tie_word_embeddings": tied,
        "torch_dtype": "float32",
        "transformers_version": "4.43.0",
        "use_cache": True,
        "vocab_size": 512,
        **changes,
    }


def make_exaone(directory: Path, tied: bool, **changes: Any) -> Path:
    """A checkpoint directory as EXAONE 3.5 comes: weights, config, tokenizer of transformers 4, code, licence."""
    directory.mkdir(parents=True)
    config = exaone_config(tied, **changes)
    torch.manual_seed(1)
    tensors = {name: torch.randn(shape) * 0.1 for name, shape in _shapes(config).items()}
    for name, tensor in tensors.items():
        if "ln_" in name:
            tensor.abs_().add_(0.5)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    tokenizer = make_tokenizer(SPECIAL, TEMPLATE, bos_token="[BOS]", eos_token="[|endofturn|]")
    tokenizer.save_pretrained(directory, save_jinja_files=False)
    config_file = directory / "tokenizer_config.json"
    values = json.loads(config_file.read_text(encoding="utf-8"))
    config_file.write_text(json.dumps({**values, "tokenizer_class": "PreTrainedTokenizerFast"}), encoding="utf-8")
    (directory / "generation_config.json").write_text('{"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}')
    for name, text in {**CODE, "notes.py": "", "LICENSE": "EXAONE AI Model License"}.items():
        (directory / name).write_text(text, encoding="utf-8")
    return directory


def reference_logits(directory: Path, ids: torch.Tensor) -> torch.Tensor:
    """Logits, computed in float32 from nothing but the files of an EXAONE checkpoint; ids: [batch, length]."""
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    weights = {
        name: tensor.float()
        for path in directory.glob("*.safetensors")
        for name, tensor in load_file(path).items()
    }  # fmt: skip
    cos, sin = _rotary(config, ids.shape[1])
    hidden = embedding(ids, weights["transformer.wte.weight"])
    for index in range(config["num_layers"]):
        block = {
            name.removeprefix(f"transformer.h.{index}.").removesuffix(".weight"): tensor
            for name, tensor in weights.items()
            if name.startswith(f"transformer.h.{index}.")
        }
        hidden = hidden + _attention(block, _rms_norm(hidden, block["ln_1"], config), cos, sin, config)
        normed = _rms_norm(hidden, block["ln_2"], config)
        gated = silu(linear(normed, block["mlp.c_fc_0"])) * linear(normed, block["mlp.c_fc_1"])
        hidden = hidden + linear(gated, block["mlp.c_proj"])
    head = weights["transformer.wte.weight" if config["tie_word_embeddings"] else "lm_head.weight"]
    return linear(_rms_norm(hidden, weights["transformer.ln_f.weight"], config), head)


def _shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    width, inner = config["hidden_size"], config["intermediate_size"]
    queries = config["num_attention_heads"] * config["head_dim"]
    keys = config["num_key_value_heads"] * config["head_dim"]
    block = {
        "ln_1": (width,), "attn.attention.q_proj": (queries, width), "attn.attention.k_proj": (keys, width),
        "attn.attention.v_proj": (keys, width), "attn.attention.out_proj": (width, queries), "ln_2": (width,),
        "mlp.c_fc_0": (inner, width), "mlp.c_fc_1": (inner, width), "mlp.c_proj": (width, inner),
    }  # fmt: skip
    shapes = {"transformer.wte.weight": (config["vocab_size"], width), "transformer.ln_f.weight": (width,)}
    for index in range(config["num_layers"]):
        shapes |= {f"transformer.h.{index}.{name}.weight": shape for name, shape in block.items()}
    return shapes if config["tie_word_embeddings"] else {**shapes, "lm_head.weight": (config["vocab_size"], width)}


def _rms_norm(hidden: torch.Tensor, weight: torch.Tensor, config: dict[str, Any]) -> torch.Tensor:
    return weight * hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + config["layer_norm_epsilon"])


def _rotary(config: dict[str, Any], length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine of each angle, [length, head_dim / 2]; with llama3's scaling of the slow frequencies."""
    scaling, size = config["rope_scaling"], config["head_dim"]
    frequencies = []
    for pair in range(size // 2):
        frequency = config["rope_theta"] ** (-2 * pair / size)
        if scaling is not None:
            turns = scaling["original_max_position_embeddings"] * frequency / (2 * math.pi)
            low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
            kept = min(max((turns - low) / (high - low), 0.0), 1.0)
            frequency *= kept + (1 - kept) / scaling["factor"]
        frequencies.append(frequency)
    angles = torch.arange(length)[:, None] * torch.tensor(frequencies)
    return angles.cos(), angles.sin()


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate pairs (i, i + head_dim / 2) of x: [batch, heads, length, head_dim]."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def _attention(
    block: dict[str, torch.Tensor], hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, config: dict[str, Any]
) -> torch.Tensor:
    batch, length, _ = hidden.shape
    size, groups = config["head_dim"], config["num_attention_heads"] // config["num_key_value_heads"]

    def heads(name: str) -> torch.Tensor:
        projected = linear(hidden, block[f"attn.attention.{name}"])
        return projected.view(batch, length, -1, size).transpose(1, 2)

    queries, keys = _rotate(heads("q_proj"), cos, sin), _rotate(heads("k_proj"), cos, sin)
    keys, values = keys.repeat_interleave(groups, dim=1), heads("v_proj").repeat_interleave(groups, dim=1)
    scores = queries @ keys.transpose(-1, -2) / math.sqrt(size)
    scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), -math.inf)
    mixed = softmax(scores, dim=-1) @ values
    return linear(mixed.transpose(1, 2).reshape(batch, length, -1), block["attn.attention.out_proj"])
