"""EXAONE 3.x without remote code: the same network as Llama under other names (arXiv 2412.04862)."""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import save_torch_state_dict
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.dynamic_module_utils import get_relative_imports
from transformers.utils import cached_file

log = logging.getLogger("frostline")

MAX_SHARD_SIZE = "5GB"
"""A model beyond this is written in several files with an index, as the originals are."""

_MODULES = {
    "transformer.wte": "model.embed_tokens",
    "transformer.ln_f": "model.norm",
    "transformer.h.{}.ln_1": "model.layers.{}.input_layernorm",
    "transformer.h.{}.ln_2": "model.layers.{}.post_attention_layernorm",
    "transformer.h.{}.attn.attention.q_proj": "model.layers.{}.self_attn.q_proj",
    "transformer.h.{}.attn.attention.k_proj": "model.layers.{}.self_attn.k_proj",
    "transformer.h.{}.attn.attention.v_proj": "model.layers.{}.self_attn.v_proj",
    "transformer.h.{}.attn.attention.out_proj": "model.layers.{}.self_attn.o_proj",
    "transformer.h.{}.mlp.c_fc_0": "model.layers.{}.mlp.gate_proj",
    "transformer.h.{}.mlp.c_fc_1": "model.layers.{}.mlp.up_proj",
    "transformer.h.{}.mlp.c_proj": "model.layers.{}.mlp.down_proj",
}
"""EXAONE's name of each module, and Llama's; {} is the block. The head is called lm_head in both."""


def _patterns(names: dict[str, str]) -> dict[str, str]:
    """Regular expressions and their replacements, with one group at most: key_mapping drops what has two."""
    return {
        "^" + re.escape(f"{old}.").replace(re.escape("{}"), r"(\d+)"): f"{new}.".replace("{}", r"\1")
        for old, new in names.items()
    }


_TO_LLAMA = _patterns(_MODULES)
_TO_EXAONE = _patterns({llama: exaone for exaone, llama in _MODULES.items()})

_REQUIRED = (
    "vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_attention_heads", "max_position_embeddings",
    "layer_norm_epsilon",
)  # fmt: skip

_SAME_KEY = (
    "vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim",
    "max_position_embeddings", "initializer_range", "tie_word_embeddings", "attention_dropout", "bos_token_id",
    "eos_token_id", "pad_token_id", "rope_theta", "rope_scaling", "rope_parameters",
)  # fmt: skip

_DEFAULTS = {"tie_word_embeddings": True, "bos_token_id": 0, "eos_token_id": 2}
"""What a key stands for that is absent from an EXAONE config, where Llama's default is another."""

_CARRIED = (
    "generation_config.json", "tokenizer_config.json", "tokenizer.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja", "LICENSE",
)  # fmt: skip
"""Files that belong to a checkpoint, as far as it has them."""


def llama_name(name: str) -> str:
    """The name that a tensor of an EXAONE 3.x checkpoint has in the equivalent Llama."""
    for pattern, replacement in _TO_LLAMA.items():
        renamed, found = re.subn(pattern, replacement, name)
        if found:
            return renamed
    return name


def is_exaone(source: str, revision: str | None) -> bool:
    """True for a checkpoint whose config says ``model_type: exaone`` (3.0, 3.5 and Deep; EXAONE 4 is in transformers).

    Raises:
        OSError: the config cannot be found.
    """
    values, _ = PretrainedConfig.get_config_dict(source, revision=revision)
    return bool(values.get("model_type") == "exaone")


def read_exaone_config(source: str, revision: str | None) -> LlamaConfig:
    """The Llama configuration that computes what an EXAONE 3.x configuration describes.

    Raises:
        OSError: the config cannot be found.
        ValueError: it lacks a key that the network's shape depends on, or asks for what Llama has not.
    """
    found, _ = PretrainedConfig.get_config_dict(source, revision=revision)
    exaone = _DEFAULTS | {key: value for key, value in found.items() if value is not None}
    if missing := [key for key in _REQUIRED if key not in exaone]:
        raise ValueError(f"Its config.json lacks {', '.join(missing)}; expected the one EXAONE 3.x came with.")
    if exaone.get("embed_dropout"):
        raise ValueError(f"Its embed_dropout is {exaone['embed_dropout']}; expected 0, as in every EXAONE 3.x.")
    return LlamaConfig(
        num_hidden_layers=exaone["num_layers"],
        rms_norm_eps=exaone["layer_norm_epsilon"],
        hidden_act=exaone.get("activation_function", "silu"),
        architectures=["LlamaForCausalLM"],
        **{key: exaone[key] for key in _SAME_KEY if key in exaone},
    )


@dataclass(frozen=True)
class ExaoneForm:
    """EXAONE 3.x on disk: read as the equivalent Llama, written back under its own names with its own config.

    What is written is what EXAONE's own code and other loaders of EXAONE 3.x read. That code is copied, never run.
    """

    source: str
    revision: str | None

    def read(self, options: dict[str, Any]) -> tuple[PreTrainedModel, dict[str, Any]]:
        """The equivalent ``LlamaForCausalLM`` and transformers' loading information.

        Raises:
            OSError: the checkpoint cannot be found.
            ValueError: its config is not one of EXAONE 3.x.
        """
        config = read_exaone_config(self.source, self.revision)
        model, info = LlamaForCausalLM.from_pretrained(
            self.source, revision=self.revision, config=config, key_mapping=_TO_LLAMA, **options
        )
        # The mapping renamed on the way in; save_pretrained would undo it with wrong names (out_proj as o_proj).
        for attribute in ("_weight_conversions", "_checkpoint_conversion_mapping"):
            if attribute in vars(model):
                delattr(model, attribute)
        return model, info

    def tokenizer_options(self) -> dict[str, Any]:
        """Revision, and the Llama config: without one, transformers would ask for the remote code's.

        Raises:
            OSError: the config cannot be found.
            ValueError: it is not one of EXAONE 3.x.
        """
        config = read_exaone_config(self.source, self.revision)
        return {"revision": self.revision, "config": config, "trust_remote_code": False}

    def write(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
        """Write weights, config, tokenizer and code as they came; only weights, tying and precision may be new.

        The tokenizer's files are copied, not saved anew: transformers 4, which EXAONE's code was made for, reads them.

        Raises:
            OSError: the disk, or the source can no longer be read.
        """
        directory.mkdir(parents=True, exist_ok=True)
        tied = bool(model.config.tie_word_embeddings)
        tensors = {
            _exaone_name(name): tensor
            for name, tensor in model.state_dict().items()
            if not (tied and name == "lm_head.weight")
        }
        save_torch_state_dict(tensors, directory, max_shard_size=MAX_SHARD_SIZE)
        self._write_config(model, tied, directory)
        for name in {*_CARRIED, *tokenizer.vocab_files_names.values()}:
            self._carry(name, directory)
        self._carry_code(directory)

    def _write_config(self, model: PreTrainedModel, tied: bool, directory: Path) -> None:
        config = self._json("config.json")
        if not config:
            raise OSError(
                f"{self.source} has no config.json any more; expected the one that was there when it was read"
            )
        if config.get("tie_word_embeddings", _DEFAULTS["tie_word_embeddings"]) != tied:
            config["tie_word_embeddings"] = tied
        for key in [key for key in ("torch_dtype", "dtype") if key in config] or ["torch_dtype"]:
            config[key] = str(model.dtype).removeprefix("torch.")
        text = json.dumps(config, indent=2, ensure_ascii=False)
        (directory / "config.json").write_text(f"{text}\n", encoding="utf-8")

    def _carry_code(self, directory: Path) -> None:
        """Copy the modules that config and tokenizer name in auto_map, and those that these import."""
        wanted = [*_auto_modules(self._json("config.json")), *_auto_modules(self._json("tokenizer_config.json"))]
        seen: set[str] = set()
        while wanted:
            module = wanted.pop()
            if module in seen:
                continue
            seen.add(module)
            if module.isidentifier() and self._carry(f"{module}.py", directory):
                wanted += get_relative_imports(directory / f"{module}.py")
            else:
                log.warning(
                    "%s has no %s.py, which its auto_map or code names, so the export has none either; "
                    "loading the export with trust_remote_code would fail",
                    self.source,
                    module,
                )

    def _carry(self, name: str, directory: Path) -> bool:
        path = self._find(name)
        if path is not None:
            shutil.copyfile(path, directory / name)
        return path is not None

    def _json(self, name: str) -> dict[str, Any]:
        path = self._find(name)
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path else {}
        return values

    def _find(self, name: str) -> Path | None:
        """A file of the source, which is downloaded if need be; none if the source has no such file."""
        try:
            path = cached_file(self.source, name, revision=self.revision)
        except OSError:
            return None
        return Path(path) if path else None


def _exaone_name(name: str) -> str:
    for pattern, exaone in _TO_EXAONE.items():
        renamed, count = re.subn(pattern, exaone, name)
        if count:
            return renamed
    return name


def _auto_modules(config: dict[str, Any]) -> Iterator[str]:
    """Modules beside the config that its auto_map names; those of another repository ("org/name--…") stay there."""
    for value in (config.get("auto_map") or {}).values():
        for reference in value if isinstance(value, list) else [value]:
            if reference and "--" not in reference:
                yield reference.rpartition(".")[0]
