"""A stretch of the moments of a flat vector: one tensor's part of a partition that DeepSpeed made of many."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from toolkit.engine.moments import BLOCK, MOMENTS, Form, State, part


@dataclass(frozen=True)
class Window:
    """Elements ``start`` to ``stop`` of a ``state`` that ``form`` stores. In 8 bits neighbours may share a scale."""

    form: Form
    state: State
    start: int
    stop: int

    def read(self) -> dict[str, torch.Tensor]:
        """Copies of both moments in float32 [stop - start]."""
        inside = slice(self.start - self._first, self.stop - self._first)
        values = self.form.read(self._blocks())
        return {kind: whole[inside].clone() for kind, whole in zip(MOMENTS, values, strict=True)}

    def write(self, values: Mapping[str, torch.Tensor]) -> None:
        """Store float32 [stop - start] of some moments; what shares a scale with them is rounded again."""
        blocks = self._blocks()
        whole = [moment.clone() for moment in self.form.read(blocks)]
        for kind, moment in zip(MOMENTS, whole, strict=True):
            if kind in values:
                moment[self.start - self._first : self.stop - self._first].copy_(values[kind])
        self.form.write(blocks, whole[0], whole[1])

    def raw(self) -> dict[str, torch.Tensor]:
        """Views of what is stored: the elements' codes or numbers, and the scales of all blocks they reach into."""
        blocks = self._blocks()
        inside = slice(self.start - self._first, self.stop - self._first)
        return {kind: tensor if kind.endswith("_scales") else tensor[inside] for kind, tensor in blocks.items()}

    def set_raw(self, raw: Mapping[str, torch.Tensor]) -> None:
        """Take in what ``raw`` of the same stretch gave; after every ``write`` to a neighbour that shares a scale."""
        for kind, own in self.raw().items():
            own.copy_(raw[kind])

    @property
    def _first(self) -> int:
        """Where the first block begins."""
        return self.start // BLOCK * BLOCK

    def _blocks(self) -> State:
        """Views of the whole blocks that the stretch reaches into."""
        blocks = slice(self.start // BLOCK, math.ceil(self.stop / BLOCK))
        elements = slice(self._first, min(blocks.stop * BLOCK, self.state[MOMENTS[0]].numel()))
        return {
            kind: part(tensor, blocks if kind.endswith("_scales") else elements)
            for kind, tensor in self.state.items() if kind != "step"
        }  # fmt: skip
