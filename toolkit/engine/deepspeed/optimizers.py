"""AdamW for DeepSpeed, which replaces the optimizer's parameters by its own flat float32 partitions."""

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
"""Key of a parameter group: True for embedding tables, whose moments stay in float32 in the 8-bit optimizers."""


def build_optimizer(
    parameters: Mapping[str, nn.Parameter],
    groups: Sequence[ParameterGroup],
    train: TrainConfig,
    optim: OptimConfig,
    tables: Collection[int] = (),
) -> torch.optim.Optimizer:
    """Build the AdamW (Loshchilov and Hutter, arXiv 1711.05101) of ``optim.name`` for DeepSpeed.

    Args:
        parameters: trainable parameters by name.
        groups: parameter groups of the mask, which together name all of ``parameters``.
        train: the recipe's training section.
        optim: the recipe's optimizer section.
        tables: ``id`` of each embedding weight.
    """
    settings = parameter_groups(parameters, groups, train, optim)
    if optim.name == "adamw":
        return torch.optim.AdamW(settings, lr=train.learning_rate, fused=True)
    if optim.name != "adamw_bf16":
        settings = list(_split_tables(settings, tables))
    return PartitionedAdamW(settings, optim.name)


def _split_tables(settings: Sequence[dict[str, Any]], tables: Collection[int]) -> Iterator[dict[str, Any]]:
    """Yield parameter groups with embedding tables in separate ones: a partition's moments all have one format."""
    for group in settings:
        for keeps in (False, True):
            members = [p for p in group["params"] if (id(p) in tables) is keeps]
            if members:
                yield {**group, "params": members, KEEPS_FLOAT32: keeps}


class PartitionedAdamW(torch.optim.Optimizer):
    """AdamW on flat float32 masters with moments in 8 bits or bfloat16.

    ``state[p]`` holds the tensors of a ``MomentFormat`` and the number of updates. Like torch's fused AdamW, ``step``
    divides gradients by ``grad_scale`` and does nothing if ``found_inf`` is not 0.

    Args:
        settings: parameter groups with lr, betas, eps, weight_decay, and optionally ``KEEPS_FLOAT32``.
        name: the recipe's ``optim.name``; any but ``adamw``.
    """

    grad_scale: torch.Tensor | None = None
    """Divisor that clips the gradient, a scalar; None if DeepSpeed clips."""
    found_inf: torch.Tensor | None = None
    """1 if the gradient is not finite, a scalar; None if DeepSpeed skips such steps itself."""

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
                    self._update_partition(p, group, factor)

    def _update_partition(self, p: torch.Tensor, group: dict[str, Any], factor: float) -> None:
        """Take one step of AdamW on a partition, with its gradient multiplied by ``factor``."""
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
        """Return the moment format of a partition: that of ``optim.name``; float32 for small ones and embeddings."""
        if self._name != "adamw_bf16" and (group[KEEPS_FLOAT32] or p.numel() < SMALLEST):
            return self._float32
        if p.device not in self._formats:
            self._formats[p.device] = moment_format(self._name, piece_size(p.device), p.device)
        return self._formats[p.device]

    def moving(self, p: torch.Tensor, index: int, chosen: torch.Tensor) -> torch.Tensor:
        """Return for each element ``chosen`` of a partition whether its first moment is not zero.

        The partition, of parameter group ``index``, must have state.
        """
        return self._format_of(p, self.param_groups[index]).moving(self.state[p], chosen)

    def moment_state(self, p: torch.Tensor, index: int) -> tuple[MomentFormat, dict[str, Any]]:
        """Return moment format and state of a partition of parameter group ``index``; create missing state as zeros."""
        storage = self._format_of(p, self.param_groups[index])
        if not self.state[p]:
            self.state[p] = {"step": 0, **storage.create(p.numel(), p.device)}
        return storage, self.state[p]


class PartitionMoments:
    """Float32 copies of a partition's low-bit moments, for reading or writing them in slices.

    Args:
        optimizer: optimizer that holds the moments.
        master: flat float32 master of the partition.
        index: index of its parameter group.
    """

    def __init__(self, optimizer: PartitionedAdamW, master: torch.Tensor, index: int) -> None:
        self.master = master.detach().view(-1)
        self._format, self.state = optimizer.moment_state(master, index)
        self._exact: dict[str, torch.Tensor] | None = None
        self._is_written = self._is_stored = False
        self.starts: list[int] = []

    def slice_state(self, part: slice) -> _PartitionSlice:
        """Return the state of a slice; slices are always requested in the order of the partition's layout."""
        self.starts.append(part.start)
        return _PartitionSlice(self, part, is_first=len(self.starts) == 1)

    def exact(self) -> dict[str, torch.Tensor]:
        """Return float32 copies of both moments by kind, made on the first call."""
        if self._exact is None:
            moments = self._format.read(self.state)
            self._exact = {kind: moment.clone() for kind, moment in zip(MOMENTS, moments, strict=True)}
        return self._exact

    def write(self, part: slice, tensors: Mapping[str, torch.Tensor], updates: int) -> None:
        """Set float32 values of a slice; the moments reach the optimizer with ``save``."""
        for kind, values in tensors.items():
            target = self.master if kind == MASTER else self.exact()[kind]
            target[part].copy_(values)
        self.state["step"] = updates
        self._is_written = True

    def raw(self) -> dict[str, torch.Tensor]:
        """Return the moments in their stored format, and the starts of the slices for ``set_raw`` to compare."""
        moments = {kind: tensor.cpu() for kind, tensor in self.state.items() if kind != "step"}
        return {**moments, "starts": torch.tensor(self.starts)}

    def set_raw(self, raw: Mapping[str, torch.Tensor]) -> None:
        """Restore the result of ``raw``, if the partition has the same slices; else the float32 values stay."""
        if raw["starts"].tolist() != self.starts:
            return
        for kind, tensor in self.state.items():
            if kind != "step":
                tensor.copy_(raw[kind])
        self._is_stored = True

    def save(self) -> None:
        """Quantise written float32 moments into the optimizer's state, unless ``set_raw`` restored it exactly."""
        if self._is_written and not self._is_stored:
            self._format.write(self.state, *(self.exact()[kind] for kind in MOMENTS))


@dataclass(frozen=True)
class _PartitionSlice(FragmentState):
    """State of a slice of a partition; ``FragmentState`` documents the methods."""

    partition: PartitionMoments
    part: slice
    is_first: bool

    @property
    def updates(self) -> int:
        return int(self.partition.state["step"])

    def read(self) -> Mapping[str, torch.Tensor]:
        exact = self.partition.exact()
        return {MASTER: self.partition.master[self.part], **{kind: exact[kind][self.part] for kind in MOMENTS}}

    @torch.no_grad()
    def write(self, tensors: Mapping[str, torch.Tensor], updates: int) -> None:
        self.partition.write(self.part, tensors, updates)

    def raw(self) -> dict[str, torch.Tensor]:
        return self.partition.raw() if self.is_first else {}

    def set_raw(self, raw: Mapping[str, torch.Tensor]) -> None:
        self.partition.set_raw(raw)
