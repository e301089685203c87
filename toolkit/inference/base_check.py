"""Refuse a base model that is not the one that a run or delta was trained on, or whose code nobody allowed."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from toolkit.checkpoint.base_identity import TO_READ, UNKNOWN_PARTS, differences, identify
from toolkit.checkpoint.delta import Base
from toolkit.config.schema import ModelConfig
from toolkit.data.tokenizer_digest import digest
from toolkit.models.identity import config_values
from toolkit.models.load import LoadedModel
from toolkit.models.weight_fingerprint import fingerprint
from toolkit.runtime.errors import CheckpointError, ModelError

log = logging.getLogger("frostline")


def require_same_base(loaded: LoadedModel, base: Base, config: ModelConfig) -> None:
    """Refuse a base model, loaded by ``config`` and without a mask, that is not the one that ``base`` describes.

    A changed generation config is logged: neither losses nor weights depend on it. So is a ``base`` that an earlier
    version recorded, of which the weights alone are compared.

    Raises:
        CheckpointError: its weights, config, tokenizer or code are others.
    """
    if fingerprint(loaded.model, loaded.on_disk) != base.sha256:
        raise CheckpointError(
            f"these tensors were trained on other weights than {config.name_or_path} holds now as "
            f"{config.dtype} (SHA-256 differs); name the original model and its model.dtype"
        )
    if base.identity is None:
        log.info("%s: %s", config.name_or_path, UNKNOWN_PARTS)
        return
    now = identify(loaded)
    _refuse(config.name_or_path, differences(base.identity, now, TO_READ))
    for change in differences(base.identity, now, ("generation_config",)):
        log.warning("%s: since the training %s; answers may be others for it", config.name_or_path, change)


def require_same_template(tokenizer: PreTrainedTokenizerBase, base: Base) -> None:
    """Refuse a tokenizer whose chat template is not that of the training that ``base`` belongs to.

    Raises:
        CheckpointError: it is another.
    """
    now = {"chat_template": digest(tokenizer.chat_template or "")}
    _refuse(base.config.name_or_path, differences(base.identity, now, ("chat_template",)))


def require_same_config(config: PretrainedConfig, base: Base) -> None:
    """Refuse a config.json that is not the one of the training; no weights need be there.

    Settings that loading the weights adds or drops are not compared.

    Raises:
        CheckpointError: a setting is another.
    """
    values = config_values(config)
    if base.config.add_tokens:
        values.pop("vocab_size", None)  # the tables became longer
    _refuse(base.config.name_or_path, differences(base.identity, {"config": values}, ("config",)))


def require_trust(config: ModelConfig, trust_remote_code: bool) -> None:
    """Raise ModelError if ``config``, which a run or delta chose, runs the model's own code and the user does not."""
    if config.trust_remote_code and not trust_remote_code:
        raise ModelError(
            f"these tensors were trained on {config.name_or_path} with its own code (model.trust_remote_code), and "
            "whoever wrote them chose that; if you have read that code, pass --trust-remote-code"
        )


def _refuse(name: str, changes: Sequence[str]) -> None:
    if changes:
        raise CheckpointError(
            f"these tensors were trained on {name} as it was then: {'; '.join(changes)}. Restore it, or name a copy of "
            "the original with --base"
        )
