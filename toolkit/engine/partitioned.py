"""The optimizers that DeepSpeed is handed: it puts its own flat float32 partitions in the place of the parameters."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import nn

from toolkit.config.schema import OptimConfig, OptimName, TrainConfig
from toolkit.engine.master_adamw import piece_size
from toolkit.engine.moments import MOMENTS, SMALLEST, Float32, Form, form_of
from toolkit.engine.window import Window
from toolkit.mask.layer_mask import ParameterGroup
from toolkit.optim import parameter_groups

KEEPS_FLOAT32 = "keeps_float32"
"""Key of a parameter group of embedding tables, whose moments stay in float32 where others take 8 bits."""


def build_optimizer(
    parameters: Mapping[str, nn.Parameter],
    groups: Sequence[ParameterGroup],
    train: TrainConfig,
    optim: OptimConfig,
    tables: Collection[int] = (),
) -> torch.optim.Optimizer:
    """The AdamW (Loshchilov and Hutter, arXiv 1711.05101) of ``optim.name`` for DeepSpeed.

    Args:
        parameters: by name, what trains.
        groups: as for ``parameter_groups``.
        train: likewise.
        optim: likewise.
        tables: ``id`` of the parameters that are embedding tables.
    """
    settings = parameter_groups(parameters, groups, train, optim)
    if optim.name == "adamw":
        return torch.optim.AdamW(settings, lr=train.learning_rate, fused=True)
    if optim.name != "adamw_bf16":
        settings = list(_tables_apart(settings, tables))
    return PartitionedAdamW(settings, optim.name)


def _tables_apart(settings: Sequence[dict[str, Any]], tables: Collection[int]) -> Iterator[dict[str, Any]]:
    """Embedding tables in parameter groups of their own: a partition is stored in one form as a whole."""
    for group in settings:
        for keeps in (False, True):
            own = [p for p in group["params"] if (id(p) in tables) is keeps]
            if own:
                yield {**group, "params": own, KEEPS_FLOAT32: keeps}


class PartitionedAdamW(torch.optim.Optimizer):
    """AdamW on flat float32 masters with moments in 8 bits or bfloat16.

    Clipping and the global norm are DeepSpeed's. ``state[p]`` holds plain tensors and the number of updates, so that
    DeepSpeed's checkpoints store exactly what is kept.
    """

    def __init__(self, settings: Sequence[dict[str, Any]], name: OptimName) -> None:
        """
        Args:
            settings: parameter groups with lr, betas, eps, weight_decay, and ``KEEPS_FLOAT32`` where that is so.
            name: as the recipe's ``optim.name``; another than ``adamw``.
        """  # noqa: D205, D212
        super().__init__(settings, {KEEPS_FLOAT32: False})
        self._name = name
        self._forms: dict[torch.device, Form] = {}
        self._float32 = Float32()

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient, in stretches; the gradient is overwritten."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None and p.numel():
                    self._update(p, group)

    def _update(self, p: torch.Tensor, group: dict[str, Any]) -> None:
        form = self._form(p, group)
        if not self.state[p]:
            self.state[p] = {"step": 0, **form.create(p.numel(), p.device)}
        state = self.state[p]
        state["step"] += 1
        moments = {kind: tensor for kind, tensor in state.items() if kind != "step"}
        assert p.grad is not None
        master, gradient = p.detach().view(-1), p.grad.detach().reshape(-1).float()
        piece = piece_size(p.device)
        for start in range(0, p.numel(), piece):
            span = slice(start, min(start + piece, p.numel()))
            form.update(moments, span, master[span], gradient[span], group, state["step"], 1.0)

    def _form(self, p: torch.Tensor, group: dict[str, Any]) -> Form:
        if self._name != "adamw_bf16" and (group[KEEPS_FLOAT32] or p.numel() < SMALLEST):
            return self._float32
        if p.device not in self._forms:
            self._forms[p.device] = form_of(self._name, piece_size(p.device), p.device)
        return self._forms[p.device]

    @contextmanager
    def in_float32(self, groups: Mapping[torch.Tensor, int], changes: bool = False) -> Iterator[None]:
        """Meanwhile, have float32 moments in ``state``, where DeepSpeed looks for them; then what was there again.

        Args:
            groups: the partitions that have state, and of which parameter group each is.
            changes: store what the moments then are, instead of what they were.
        """
        kept = {p: dict(self.state[p]) for p in groups}
        for p, index in groups.items():
            moments = self._form(p, self.param_groups[index]).read(kept[p])
            self.state[p] = {"step": kept[p]["step"], **dict(zip(MOMENTS, moments, strict=True))}
        try:
            yield
            for p, index in groups.items() if changes else ():
                kept[p]["step"] = int(self.state[p]["step"])
                form = self._form(p, self.param_groups[index])
                form.write(kept[p], *(self.state[p][kind] for kind in MOMENTS))
        finally:
            self.state.update(kept)

    def moving(self, p: torch.Tensor, index: int, chosen: torch.Tensor) -> torch.Tensor:
        """Of which ``chosen`` elements of a partition the first moment is not zero; it has state."""
        return self._form(p, self.param_groups[index]).moving(self.state[p], chosen)

    def window(self, p: torch.Tensor, index: int, start: int, stop: int) -> Window:
        """A stretch of the moments of a partition of parameter group ``index``, which has state."""
        return Window(self._form(p, self.param_groups[index]), self.state[p], start, stop)

    def begin_at(self, p: torch.Tensor, index: int, age: float) -> None:
        """Give a partition of parameter group ``index`` zero moments that count as ``age`` updates old."""
        created = self._form(p, self.param_groups[index]).create(p.numel(), p.device)
        self.state[p] = {"step": int(age), **created}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As ``Optimizer.load_state_dict``, which would turn codes into float32."""
        super().load_state_dict({**state_dict, "state": {}})
        saved = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        for index, group in enumerate(self.param_groups):
            for p in group["params"]:
                stored = state_dict["state"].get(next(saved))
                if stored is None:
                    continue
                self.begin_at(p, index, stored["step"])
                for kind, tensor in self.state[p].items():
                    if kind != "step":
                        tensor.copy_(stored[kind])
