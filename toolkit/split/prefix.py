"""The frozen prefix: a copy of the model's module tree without the modules above the frost line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

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
from toolkit.split.module_tree import (
    Absent,
    BlockList,
    PassThrough,
    PrefixEnd,
    StopForward,
    copy_module_tree,
    entry_name,
    hidden_of,
    with_hidden,
)


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
        self._block_list = anatomy.blocks
        self._blocks = list(self.model.get_submodule(anatomy.blocks).children())[:boundary]
        self._embedding_size = int(model.get_input_embeddings().weight.shape[1])
        self._with_position_ids = needs_position_ids(model)
        self.frozen = frozen
        if frozen is not None:
            frozen.attach(self.model)

    def block_output_counts(self) -> list[int | None]:
        """Return the number of outputs of each block; None for one that returns a bare tensor instead of a tuple."""
        return self._output_counts

    @cached_property
    def _output_counts(self) -> list[int | None]:
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
        return self._run(batch, input_ids=batch.input_ids)

    @torch.no_grad()
    def forward_from(self, boundary: int, hidden: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Return what ``forward`` does, from the hidden states [B, T, hidden_size] that enter block ``boundary``.

        The blocks below it do not run. ``boundary`` is from 1 to b - 1; ``toolkit.split.exactness.continues_exactly``
        finds out whether a model computes the same so.
        """
        with self._passing(boundary, hidden):
            return self._run(batch, inputs_embeds=hidden.new_zeros(*hidden.shape[:2], self._embedding_size))

    @contextmanager
    def _passing(self, boundary: int, hidden: torch.Tensor) -> Iterator[None]:
        """Let nothing run below ``boundary``, and give ``hidden`` to the block there, whatever comes to it."""
        modules = self.model.get_submodule(self._block_list)._modules
        below = list(modules.items())[:boundary]
        counts = self.block_output_counts()
        hook = self._blocks[boundary].register_forward_pre_hook(
            lambda module, args, kwargs: with_hidden(hidden, args, kwargs), with_kwargs=True
        )
        modules.update(
            {
                name: PassThrough(block, count)
                for (name, block), count in zip(below, counts, strict=False)
                if block is not None
            }
        )
        try:
            yield
        finally:
            modules.update(below)
            hook.remove()

    def states_at(self, boundary: int, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the hidden states that enter block ``boundary`` and what ``forward`` returns, of one pass."""
        entering: list[torch.Tensor] = []
        hook = self._blocks[boundary].register_forward_pre_hook(
            lambda module, args, kwargs: entering.append(hidden_of(args, kwargs).clone()), with_kwargs=True
        )
        try:
            end = self(batch)
        finally:
            hook.remove()
        return entering[0], end

    def _run(self, batch: Batch, **inputs: Any) -> torch.Tensor:
        """Run the model's own code up to the first module above the frost line."""
        try:
            with masks_without_checks(batch.is_packed):
                self.model(**inputs, **batch.forward_inputs(self._with_position_ids), use_cache=False)
        except StopForward as stop:
            return hidden_of(*stop.call)
        raise RuntimeError("the prefix never reached the frost line")
