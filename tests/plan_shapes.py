"""Configs of the three EXAONE 3.5 models, without weights. Not a test itself."""

from __future__ import annotations

import json
from pathlib import Path

EXAONE = {
    "2.4b": {"hidden_size": 2560, "num_layers": 30, "num_attention_heads": 32, "intermediate_size": 7168},
    "7.8b": {"hidden_size": 4096, "num_layers": 32, "num_attention_heads": 32, "intermediate_size": 14336},
    "32b": {"hidden_size": 5120, "num_layers": 64, "num_attention_heads": 40, "intermediate_size": 27392},
}


def exaone(directory: Path, name: str) -> Path:
    """A model directory that holds nothing but the config.json of EXAONE 3.5 in size ``name``."""
    sizes = EXAONE[name]
    config = {
        "model_type": "exaone", "architectures": ["ExaoneForCausalLM"], "vocab_size": 102400, "num_key_value_heads": 8,
        "head_dim": sizes["hidden_size"] // sizes["num_attention_heads"], "layer_norm_epsilon": 1e-5,
        "activation_function": "silu", "max_position_embeddings": 32768, "tie_word_embeddings": name == "2.4b",
        "rope_theta": 1e6, **sizes,
    }  # fmt: skip
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    return directory
