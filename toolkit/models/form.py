"""The form a model has on disk: how it becomes a transformers model, and how it is written back the way it came."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)


class Form(Protocol):
    """Reads a checkpoint into a model that transformers knows, and writes such a model back in the same form."""

    def read(self, options: dict[str, Any]) -> tuple[PreTrainedModel, dict[str, Any]]:
        """The model and transformers' loading information.

        Args:
            options: for ``from_pretrained``, ``output_loading_info`` among them.

        Raises:
            OSError: the checkpoint cannot be found.
            ValueError: it cannot be understood.
        """

    def tokenizer_options(self) -> dict[str, Any]:
        """What ``AutoTokenizer.from_pretrained`` needs beside the source.

        Raises:
            OSError: the checkpoint cannot be found.
            ValueError: it cannot be understood.
        """

    def write(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
        """Write ``model`` and its tokenizer into ``directory``, which is created.

        Raises:
            OSError: the disk, or what is to be copied from the source.
        """


def refuse_kernels(config: PretrainedConfig, trust_remote_code: bool) -> None:
    """Refuse a config that names an attention kernel on the Hub, which is compiled code.

    Raises:
        ValueError: it does, and ``trust_remote_code`` is off.
    """
    named = str(getattr(config, "_attn_implementation", None) or "")
    if "/" in named and not trust_remote_code:
        raise ValueError(
            f"its config.json asks for the attention kernel {named} from the Hub, which is code; remove "
            "attn_implementation from it, or read that code and set model.trust_remote_code"
        )


@dataclass(frozen=True)
class TransformersForm:
    """What transformers itself loads and saves."""

    source: str
    revision: str | None
    trust_remote_code: bool

    def read(self, options: dict[str, Any]) -> tuple[PreTrainedModel, dict[str, Any]]:
        """As ``AutoModelForCausalLM`` reads it.

        Raises:
            OSError: the checkpoint cannot be found.
            ValueError: transformers does not know its model type, or its config asks for code.
        """
        shared = self.tokenizer_options()
        config = AutoConfig.from_pretrained(self.source, **shared)
        refuse_kernels(config, self.trust_remote_code)
        model, info = AutoModelForCausalLM.from_pretrained(self.source, config=config, **shared, **options)
        return model, info

    def tokenizer_options(self) -> dict[str, Any]:
        """Revision, and whether the source's own code may run."""
        return {"revision": self.revision, "trust_remote_code": self.trust_remote_code}

    def write(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
        """As ``save_pretrained`` writes both.

        Raises:
            OSError: the disk.
        """
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
