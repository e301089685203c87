"""Say on the card of an export which base the adapters of quantised layers trained on, and how to load it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from toolkit.checkpoint.delta import Delta
from toolkit.exporting.peft_rows import resize_call
from toolkit.mask.layer_mask import LayerMask


def merged_base_text(mask: LayerMask) -> str:
    """Return the paragraph for the card of a merged model; empty if nothing was quantised."""
    if not mask.quantised:
        return ""
    return (
        f"\n\nIn training {_held_text(mask)}. Their weights here are the dequantised values, to which the adapters' "
        "updates were added in float32 before they were rounded once: what was validated. So they differ from the base "
        "model's also where no adapter stands."
    )


def adapter_card(
    delta: Delta, source: str, rows: int, stored: Mapping[str, Mapping[str, Any]], base_name: Callable[[str], str]
) -> str:
    """Return the README.md of a peft directory whose adapters trained on quantised layers.

    Args:
        delta: what trained.
        source: Hub id or directory of the base model, for transformers.
        rows: rows that its token tables need for added tokens; 0 if none were added.
        stored: header entries of the base model's files by tensor name, which may lack the first parts of names.
        base_name: maps a module's name to that in the base model's own class.
    """
    base = delta.base.config
    quantised = {base_name(module) for layers in delta.mask.quantised for module in layers.modules}
    if {layers.precision for layers in delta.mask.quantised} == {"nf4"}:
        skipped = _skipped(stored, quantised)
        resize = f"\n{resize_call(rows)}" if rows else ""
        how = f"""bitsandbytes loads the base with the same values in these layers and no others (its kernels may round
products otherwise):

```python
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

config = BitsAndBytesConfig(
    load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=torch.{base.dtype},
    llm_int8_skip_modules={skipped!r},
)
base = AutoModelForCausalLM.from_pretrained({source!r}, dtype=torch.{base.dtype}, quantization_config=config){resize}
model = PeftModel.from_pretrained(base, "this directory")
```"""
    else:
        how = (
            "bitsandbytes has no such base: its load_in_8bit (LLM.int8()) also quantises activations, which this "
            "training did not. Export the run as a whole model for what was validated, to the bit of one rounding."
        )
    return f"""---
base_model: {base.name_or_path}
library_name: peft
tags: [frostline, lora]
---

# Adapters of {base.name_or_path}

Trained with Frostline on {base.name_or_path} (revision {base.revision or "unpinned"}, SHA-256 of its weights as
{base.dtype} {delta.base.sha256}), where {_held_text(delta.mask)}. On the plain base
model the adapters compute something near to what was validated, and not the same.

{how}
"""


def _held_text(mask: LayerMask) -> str:
    """Return how many layers were held in which precision, as a clause."""
    counts = " and ".join(f"{len(layers.modules)} in {layers.precision}" for layers in mask.quantised)
    return f"the frozen linear layers of the adapted blocks were held in fewer bits ({counts}, by bitsandbytes)"


def _skipped(stored: Mapping[str, Mapping[str, Any]], quantised: set[str]) -> list[str]:
    """Return the modules that stay as they are, each by its whole name, and the head.

    A block's name would do where versions of transformers compare whole parts of names; 5.14 takes model.layers.2 for
    the beginning of model.layers.26, too.
    """
    modules = [name.removesuffix(".weight") for name, entry in stored.items() if len(entry["shape"]) == 2]
    first = min(quantised)
    prefix = next((first.removesuffix(module) for module in modules if first.endswith(f".{module}")), "")
    kept = (module for module in (f"{prefix}{name}" for name in modules) if module not in quantised)
    return list(dict.fromkeys(["lm_head", *kept]))
