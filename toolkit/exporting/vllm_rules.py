"""Say whether vLLM can serve a directory of adapters, by the rules that its sources have.

Read were ``peft_helper.py``, ``lora_model.py``, ``lora_weights.py`` and ``utils.py`` in ``vllm/lora``, and
``vllm/config/lora.py``, of vLLM 0.22. It reads r and lora_alpha for all adapters, and neither rank_pattern nor
alpha_pattern; it refuses DoRA, modules_to_save, and every tensor that is no lora_A or lora_B.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from toolkit.mask.layer_mask import LayerMask

if TYPE_CHECKING:
    from peft import LoraConfig

_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Values of ``--max-lora-rank``."""


def vllm_advice(config: LoraConfig, mask: LayerMask) -> tuple[str, bool]:
    """Return how vLLM serves the directory, or why it does not and what to do; and whether it computes what trained."""
    reasons = []
    if config.use_dora:
        reasons.append("it has no DoRA")
    if config.modules_to_save:
        reasons.append(f"it takes no whole modules (here {', '.join(config.modules_to_save)})")
    if config.trainable_token_indices:
        reasons.append("it takes no rows of tables")
    if config.rank_pattern or config.alpha_pattern:
        reasons.append("it reads one rank and alpha for all adapters, and these have several")
    if config.r > _RANKS[-1]:
        reasons.append(f"its highest rank is {_RANKS[-1]}, and this one is {config.r}")
    if reasons:
        return (
            f"vLLM cannot serve this directory: {'; '.join(reasons)}. For vLLM, export the run as a model, without "
            "--adapter"
        ), False
    flags = f"--enable-lora --max-lora-rank {next(rank for rank in _RANKS if rank >= config.r)}"
    if mask.quantised:
        held = " and ".join(layers.precision for layers in mask.quantised)
        return (
            f"vLLM ({flags}) would lay these adapters onto the plain base, and they trained on layers in {held}: "
            "something near. For what was validated, export the run as a model, without --adapter"
        ), False
    return f"vLLM takes this directory with {flags}, by the rules in its sources", True
