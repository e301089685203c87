"""Exported adapters keep the rules by which vLLM loads them, or the export says that they do not.

The rules are those of ``vllm/lora`` and ``vllm/config/lora.py`` (0.22); vLLM itself is not needed.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from adapter_runs import mask, save_of_zoo
from exaone_reference import make_exaone
from helpers import tiny_flags, train
from row_runs import rows
from safetensors import safe_open

from toolkit.commands.export import export

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


def faults(directory: Path, linear: set[str]) -> list[str]:
    """Rules that a directory breaks, for a model whose linear layers have these last names."""
    config = json.loads((directory / "adapter_config.json").read_text())
    found = [f"no {key}" for key in ("r", "lora_alpha", "target_modules") if key not in config]
    found += [key for key in ("use_dora", "modules_to_save") if config.get(key)]
    found += ["bias"] if config.get("bias", "none") != "none" else []
    found += ["rank"] if config["r"] > RANKS[-1] else []
    scale = config["lora_alpha"] / config["r"]  # the one that all adapters get
    for module in config["target_modules"] if isinstance(config["target_modules"], list) else ():
        own = config["alpha_pattern"].get(module, config["lora_alpha"]) / config["rank_pattern"].get(
            module, config["r"]
        )
        found += ["scale"] if own != scale and not config["use_rslora"] else []
    pairs: dict[str, set[str]] = {}
    with safe_open(directory / "adapter_model.safetensors", "pt") as file:
        for name in file.keys():  # noqa: SIM118
            match = re.fullmatch(r"base_model\.model\.(.+)\.lora_([AB])\.weight", name)
            if match is None:
                found.append(f"tensor {name}")
                continue
            pairs.setdefault(match[1], set()).add(match[2])
            rank = file.get_slice(name).get_shape()[0 if match[2] == "A" else 1]
            found += ["rank of a tensor"] if rank != config["r"] else []
            found += ["layer"] if match[1].rpartition(".")[2] not in linear else []
    return sorted({*found, *(["half a pair"] if any(len(pair) != 2 for pair in pairs.values()) else [])})


LLAMA = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
EXAONE = {"q_proj", "k_proj", "v_proj", "out_proj", "c_fc_0", "c_fc_1", "c_proj"}


def exported(model: Path, folder: Path, *entries: Any, more: tuple[object, ...] = ()) -> Path:
    """The adapter directory of a run of two steps."""
    flags = tiny_flags(model, folder / "run", "--train.max_steps", 2, *map(str, more))
    assert train(*flags, *mask(*entries)) == 0
    return export(folder / "run", folder / "adapter", adapter=True)


@pytest.mark.parametrize(
    ("settings", "limit"),
    [({}, 16), ({"rslora": True, "rank": 4, "dropout": 0.1}, 8), ({"rank": 33, "targets": ["q_proj", "up_proj"]}, 64)],
    ids=str,
)
def test_plain_adapters_keep_the_rules(
    settings: dict[str, Any], limit: int, tiny_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    adapter = exported(tiny_model, tmp_path, {"lora": {"select": "last:2", **settings}})
    assert faults(adapter, LLAMA) == []
    assert caplog.messages[-1].startswith(f"vLLM takes this directory with --enable-lora --max-lora-rank {limit},")


def test_other_models_adapters_keep_them_too(tmp_path: Path) -> None:
    make_exaone(tmp_path / "exaone", tied=True)
    assert faults(exported(tmp_path / "exaone", tmp_path / "1", {"lora": {"select": "last:1"}}), EXAONE) == []
    save_of_zoo("qwen2", tmp_path / "qwen2")
    assert faults(exported(tmp_path / "qwen2", tmp_path / "2", {"lora": {"select": "last:1"}}), LLAMA) == []


LORA = {"lora": {"select": "last:1", "rank": 2}}
TENSORS = ["tensor base_model.model.lm_head.token_adapter.trainable_tokens_delta"]


@pytest.mark.parametrize(
    ("entries", "broken", "words"),
    [
        ([{"lora": {**LORA["lora"], "dora": True}}], "use_dora", "it has no DoRA"),
        ([LORA, "head"], "modules_to_save", "it takes no whole modules (here lm_head)"),
        ([LORA, rows("head", ids=[7])], TENSORS[0], "it takes no rows of tables"),
        ([LORA, {"lora": {"select": "blocks:3", "rank": 2, "alpha": 9}}], "scale", "it reads one rank and alpha"),
        ([LORA, {"lora": {"select": "blocks:3", "rank": 4}}], "rank of a tensor", "it reads one rank and alpha"),
        ([{"lora": {**LORA["lora"], "rank": 600}}], "rank", "its highest rank is 512, and this one is 600"),
    ],
    ids=str,
)
def test_what_breaks_them_is_said_with_what_to_do(
    entries: list[Any], broken: str, words: str, tiny_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert broken in faults(exported(tiny_model, tmp_path, *entries), LLAMA)
    said = caplog.messages[-1]
    assert said.startswith("vLLM cannot serve this directory: ")
    assert words in said
    assert said.endswith("export the run as a model, without --adapter")


def test_adapters_of_quantised_layers_are_said_to_compute_something_near(
    tiny_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    adapter = exported(tiny_model, tmp_path, {"lora": {"select": "last:2", "rank": 4, "base_precision": "nf4"}})
    assert faults(adapter, LLAMA) == []
    assert "onto the plain base, and they trained on layers in nf4: something near" in caplog.messages[-1]
