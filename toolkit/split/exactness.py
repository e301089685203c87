"""Check that a model cut at a frost line computes what the whole one does."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from toolkit.data.batches import Batch
from toolkit.data.layout import lay_out, unpad
from toolkit.models.probe import evaluation_mode
from toolkit.split.logit_processing import MODEL_CODE_ERRORS
from toolkit.split.prefix import Prefix
from toolkit.split.suffix import Suffix


def split_is_exact(model: PreTrainedModel, prefix: Prefix, suffix: Suffix, batch: Batch) -> bool:
    """Return whether the split model gives the whole model's logits on ``batch``, to within its run-to-run noise.

    Some architectures read the token ids, or the first block's output, again above the line; they cannot be cut.
    """
    # a suffix too, so that the head runs on the same rows: other shapes round otherwise
    uncut = Suffix(model, suffix.anatomy, None)
    # with offloaded weights, the whole model loads the same ones
    for unit in prefix.frozen.units if prefix.frozen is not None else ():
        uncut.model.set_submodule(unit.module, prefix.model.get_submodule(unit.module))
    with evaluation_mode(model, prefix, suffix, uncut):
        try:
            whole, repeated = (uncut.logits(None, batch).float() for _ in range(2))
            cut = suffix.logits(prefix(batch), batch).float()
        except MODEL_CODE_ERRORS:
            return False  # the architecture looked for something that the cut removed
        noise = (whole - repeated).abs().max()  # 0, but for kernels that add up in no fixed order
        return whole.shape == cut.shape and bool(((whole - cut).abs() <= noise).all())


def continues_exactly(prefix: Prefix, boundary: int, batch: Batch) -> bool:
    """Return whether ``Prefix.forward_from`` gives the bits that ``forward`` does on ``batch``, padding left out.

    It is given zeros at padding, as the cache lays rows out. A model that hands more than hidden states from block to
    block fails, and so does one in which padding reaches the samples.
    """
    entering, whole = prefix.states_at(boundary, batch)
    try:
        again = prefix.forward_from(boundary, lay_out(unpad(entering, batch), batch), batch)
    except MODEL_CODE_ERRORS:
        return False
    return all(map(torch.equal, unpad(whole, batch), unpad(again, batch)))
