"""The frozen prefix: a copy of the model's module tree in which nothing above the frost line is left."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel

from toolkit.data.batches import Batch
from toolkit.frozen.weight_offload import FrozenWeights
from toolkit.models.anatomy import Anatomy
from toolkit.models.probe import probe_blocks
from toolkit.models.rotary import needs_lengths
from toolkit.split.module_tree import Absent, Arrival, Arrived, copy_module_tree, entry_name


class Prefix(nn.Module):
    """Embeddings and blocks 0 … b-1: token ids to ``hidden[b]``, without gradients.

    Args:
        model: the whole model, its mask already applied.
        anatomy: its parts.
        boundary: b, from 0 to the number of blocks; at 0 it is the embeddings alone.
        frozen: weights that were taken out of ``model`` and are loaded for each block; none where it has its own.
    """

    def __init__(
        self, model: PreTrainedModel, anatomy: Anatomy, boundary: int, frozen: FrozenWeights | None = None
    ) -> None:
        super().__init__()
        blocks = list(model.get_submodule(anatomy.blocks).children())
        entry = model.get_submodule(entry_name(anatomy, boundary))
        replaced: dict[nn.Module, nn.Module] = {block: Absent(block) for block in blocks[boundary:]}
        for above in filter(None, (anatomy.norm, anatomy.head)):
            replaced[model.get_submodule(above)] = Absent()
        replaced[entry] = Arrival(entry)
        self.model = copy_module_tree(model, replaced, own_parameters=True)
        self._blocks = list(self.model.get_submodule(anatomy.blocks).children())[:boundary]
        self._with_lengths = needs_lengths(model)
        self.frozen = frozen
        if frozen is not None:
            frozen.attach(self.model)

    def returned(self) -> list[int | None]:
        """Return the length of each block's output tuple; none where it returns the hidden states alone."""
        device = self.frozen.device if self.frozen is not None else None
        outputs = dict(probe_blocks(self.model, self._blocks, device))
        return [
            len(outputs[block]) if isinstance(outputs.get(block), (tuple, list)) else None for block in self._blocks
        ]

    @torch.no_grad()
    def forward(self, batch: Batch) -> torch.Tensor:
        """Return the hidden states [B, T, hidden_size] that enter block b (or the final norm above the last block)."""
        try:
            self.model(input_ids=batch.input_ids, **batch.layout(self._with_lengths), use_cache=False)
        except Arrived as arrived:
            return arrived.hidden
        raise RuntimeError("the prefix never reached the frost line")
