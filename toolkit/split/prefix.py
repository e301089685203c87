"""The frozen prefix: a copy of the model's module tree without the modules above the frost line."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel

from toolkit.data.batches import Batch
from toolkit.frozen.weight_offload import FrozenWeights
from toolkit.models.anatomy import Anatomy
from toolkit.models.mask_checks import masks_without_checks
from toolkit.models.module_class import extend_class
from toolkit.models.probe import probe_blocks
from toolkit.models.rotary import needs_position_ids
from toolkit.split.module_tree import Absent, BlockList, PrefixEnd, StopForward, copy_module_tree, entry_name, hidden_of


class Prefix(nn.Module):
    """Embeddings and blocks 0 … b-1: token ids to ``hidden[b]``, without gradients.

    ``boundary`` is b, from 0 (the embeddings alone) to the number of blocks. ``frozen`` holds offloaded weights, which
    are loaded block by block; None if ``model`` has them all.
    """

    def __init__(
        self, model: PreTrainedModel, anatomy: Anatomy, boundary: int, frozen: FrozenWeights | None = None
    ) -> None:
        super().__init__()
        blocks = list(model.get_submodule(anatomy.blocks).children())
        entry = model.get_submodule(entry_name(anatomy, boundary))
        placeholders: dict[nn.Module, nn.Module] = {block: Absent(block) for block in blocks[boundary:]}
        for above in filter(None, (anatomy.norm, anatomy.head)):
            placeholders[model.get_submodule(above)] = Absent()
        placeholders[entry] = PrefixEnd(entry)
        self.model = copy_module_tree(model, placeholders, own_parameters=True)
        extend_class(self.model.get_submodule(anatomy.blocks), BlockList)
        self._blocks = list(self.model.get_submodule(anatomy.blocks).children())[:boundary]
        self._with_position_ids = needs_position_ids(model)
        self.frozen = frozen
        if frozen is not None:
            frozen.attach(self.model)

    def block_output_counts(self) -> list[int | None]:
        """Return the number of outputs of each block; None for one that returns a bare tensor instead of a tuple."""
        device = self.frozen.device if self.frozen is not None else None
        outputs = dict(probe_blocks(self.model, self._blocks, device))
        return [
            len(outputs[block]) if isinstance(outputs.get(block), (tuple, list)) else None for block in self._blocks
        ]

    @torch.no_grad()
    def forward(self, batch: Batch) -> torch.Tensor:
        """Return the hidden states [B, T, hidden_size] that enter block b (or the final norm above the last block).

        The model's own code runs until it calls the first module above the frost line, whose placeholder ends it by
        an exception.
        """
        try:
            with masks_without_checks(batch.is_packed):
                self.model(input_ids=batch.input_ids, **batch.forward_inputs(self._with_position_ids), use_cache=False)
        except StopForward as stop:
            return hidden_of(*stop.call)
        raise RuntimeError("the prefix never reached the frost line")
