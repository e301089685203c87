"""Optimizers for DeepSpeed, which puts its own flat float32 partitions in the place of their parameters."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from toolkit.config.schema import OptimConfig, OptimName, TrainConfig
from toolkit.mask.layer_mask import ParameterGroup
from toolkit.optim.groups import parameter_groups
from toolkit.optim.master_adamw import piece_size
from toolkit.optim.moments import MOMENTS, SMALLEST, Float32, MomentFormat, moment_format
from toolkit.optim.state_fragments import MASTER, FragmentState

KEEPS_FLOAT32 = "keeps_float32"
"""Key of a parameter group of embedding tables, whose moments stay in float32 where others take 8 bits."""


def build_optimizer(
    parameters: Mapping[str, nn.Parameter],
    groups: Sequence[ParameterGroup],
    train: TrainConfig,
    optim: OptimConfig,
    tables: Collection[int] = (),
) -> torch.optim.Optimizer:
    """Build the AdamW (Loshchilov and Hutter, arXiv 1711.05101) of ``optim.name`` for DeepSpeed.

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
        settings = list(_split_tables(settings, tables))
    return PartitionedAdamW(settings, optim.name)


def _split_tables(settings: Sequence[dict[str, Any]], tables: Collection[int]) -> Iterator[dict[str, Any]]:
    """Yield embedding tables in groups of their own: a partition is stored in one format as a whole."""
    for group in settings:
        for keeps in (False, True):
            own = [p for p in group["params"] if (id(p) in tables) is keeps]
            if own:
                yield {**group, "params": own, KEEPS_FLOAT32: keeps}


class PartitionedAdamW(torch.optim.Optimizer):
    """AdamW on flat float32 masters with moments in 8 bits or bfloat16.

    ``state[p]`` holds plain tensors and the number of updates. As with torch's fused AdamW, ``step`` divides gradients
    by ``grad_scale`` and does nothing where ``found_inf`` is not 0.

    Args:
        settings: parameter groups with lr, betas, eps, weight_decay, and ``KEEPS_FLOAT32`` where that is so.
        name: as the recipe's ``optim.name``; another than ``adamw``.
    """

    grad_scale: torch.Tensor | None = None
    """Scalar; none where DeepSpeed has clipped already."""
    found_inf: torch.Tensor | None = None
    """Scalar; none where DeepSpeed itself skips such a step."""

    def __init__(self, settings: Sequence[dict[str, Any]], name: OptimName) -> None:
        super().__init__(settings, {KEEPS_FLOAT32: False})
        self._name = name
        self._formats: dict[torch.device, MomentFormat] = {}
        self._float32 = Float32()

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient, slice by slice; the gradient is overwritten."""
        if self.found_inf is not None and self.found_inf:
            return
        factor = 1.0 if self.grad_scale is None else 1 / float(self.grad_scale)
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None and p.numel():
                    self._update(p, group, factor)

    def _update(self, p: torch.Tensor, group: dict[str, Any], factor: float) -> None:
        storage = self._format_of(p, group)
        if not self.state[p]:
            self.state[p] = {"step": 0, **storage.create(p.numel(), p.device)}
        state = self.state[p]
        state["step"] += 1
        moments = {kind: tensor for kind, tensor in state.items() if kind != "step"}
        assert p.grad is not None
        master, gradient = p.detach().view(-1), p.grad.detach().reshape(-1).float()
        piece = piece_size(p.device)
        for start in range(0, p.numel(), piece):
            span = slice(start, min(start + piece, p.numel()))
            storage.update(moments, span, master[span], gradient[span], group, state["step"], factor)

    def _format_of(self, p: torch.Tensor, group: dict[str, Any]) -> MomentFormat:
        if self._name != "adamw_bf16" and (group[KEEPS_FLOAT32] or p.numel() < SMALLEST):
            return self._float32
        if p.device not in self._formats:
            self._formats[p.device] = moment_format(self._name, piece_size(p.device), p.device)
        return self._formats[p.device]

    def moving(self, p: torch.Tensor, index: int, chosen: torch.Tensor) -> torch.Tensor:
        """Return True for those ``chosen`` elements of a partition whose first moment is not zero; it has state."""
        return self._format_of(p, self.param_groups[index]).moving(self.state[p], chosen)

    def moment_state(self, p: torch.Tensor, index: int) -> tuple[MomentFormat, dict[str, Any]]:
        """Return the format and the state of a partition of parameter group ``index``; zeros if new."""
        storage = self._format_of(p, self.param_groups[index])
        if not self.state[p]:
            self.state[p] = {"step": 0, **storage.create(p.numel(), p.device)}
        return storage, self.state[p]


class PartitionMoments:
    """The moments of a partition in float32, for as long as they are read or written in slices.

    Args:
        optimizer: that updates it.
        master: the partition.
        index: of its parameter group.
    """

    def __init__(self, optimizer: PartitionedAdamW, master: torch.Tensor, index: int) -> None:
        self.master = master.detach().view(-1)
        self._format, self.state = optimizer.moment_state(master, index)
        self._exact: dict[str, torch.Tensor] | None = None
        self._is_written = self._is_stored = False
        self.starts: list[int] = []

    def part(self, part: slice) -> _PartitionSlice:
        """Return the state of a slice; a layout's slices are always asked for in the same order."""
        self.starts.append(part.start)
        return _PartitionSlice(self, part, is_first=len(self.starts) == 1)

    def exact(self) -> dict[str, torch.Tensor]:
        """Return both moments in float32."""
        if self._exact is None:
            moments = self._format.read(self.state)
            self._exact = {kind: moment.clone() for kind, moment in zip(MOMENTS, moments, strict=True)}
        return self._exact

    def write(self, part: slice, tensors: Mapping[str, torch.Tensor], updates: int) -> None:
        """Set float32 values of a slice; ``save`` stores them."""
        for kind, values in tensors.items():
            whole = self.master if kind == MASTER else self.exact()[kind]
            whole[part].copy_(values)
        self.state["step"] = updates
        self._is_written = True

    def raw(self) -> dict[str, torch.Tensor]:
        """Return the moments as they are stored, and where the slices begin."""
        moments = {kind: tensor.cpu() for kind, tensor in self.state.items() if kind != "step"}
        return {**moments, "starts": torch.tensor(self.starts)}

    def set_raw(self, raw: Mapping[str, torch.Tensor]) -> None:
        """Set what ``raw`` returned, if the slices begin in the same places."""
        if raw["starts"].tolist() != self.starts:
            return
        for kind, tensor in self.state.items():
            if kind != "step":
                tensor.copy_(raw[kind])
        self._is_stored = True

    def save(self) -> None:
        """Store what was written, unless ``set_raw`` has set it as it is stored."""
        if self._is_written and not self._is_stored:
            self._format.write(self.state, *(self.exact()[kind] for kind in MOMENTS))


@dataclass(frozen=True)
class _PartitionSlice(FragmentState):
    """The state of a slice of a partition."""

    whole: PartitionMoments
    part: slice
    is_first: bool

    @property
    def updates(self) -> int:
        return int(self.whole.state["step"])

    def read(self) -> Mapping[str, torch.Tensor]:
        exact = self.whole.exact()
        return {MASTER: self.whole.master[self.part], **{kind: exact[kind][self.part] for kind in MOMENTS}}

    @torch.no_grad()
    def write(self, tensors: Mapping[str, torch.Tensor], updates: int) -> None:
        self.whole.write(self.part, tensors, updates)

    def raw(self) -> dict[str, torch.Tensor]:
        return self.whole.raw() if self.is_first else {}

    def set_raw(self, raw: Mapping[str, torch.Tensor]) -> None:
        self.whole.set_raw(raw)
