"""AdamW for DeepSpeed, which replaces the optimizer's parameters by its own flat float32 partitions."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn

from toolkit.config.schema import OptimConfig, OptimName, TrainConfig
from toolkit.mask.layer_mask import ParameterGroup
from toolkit.optim.groups import parameter_groups
from toolkit.optim.master_adamw import piece_size
from toolkit.optim.moments import Float32, MomentFormat, has_float32_moments, moment_format
from toolkit.optim.state_fragments import MASTER, MOMENTS, FragmentState

KEEPS_FLOAT32 = "keeps_float32"
"""Key of a parameter group: True for embedding tables, whose moments stay in float32 in the 8-bit optimizers."""


def build_optimizer(
    parameters: Mapping[str, nn.Parameter],
    groups: Sequence[ParameterGroup],
    train: TrainConfig,
    optim: OptimConfig,
    embedding_ids: Collection[int] = (),
) -> torch.optim.Optimizer:
    """Build the AdamW (Loshchilov and Hutter, arXiv 1711.05101) of ``optim.name`` for DeepSpeed.

    Takes the arguments of ``parameter_groups``, and the ``id`` of each embedding weight.
    """
    param_groups = parameter_groups(parameters, groups, train, optim)
    if optim.name == "adamw":
        return torch.optim.AdamW(param_groups, lr=train.learning_rate, fused=True)
    return PartitionedAdamW(list(_split_embeddings(param_groups, embedding_ids)), optim.name)


def _split_embeddings(
    param_groups: Sequence[dict[str, Any]], embedding_ids: Collection[int]
) -> Iterator[dict[str, Any]]:
    """Yield parameter groups with embeddings in separate ones: a partition's moments all have one format."""
    for group in param_groups:
        for is_embedding in (False, True):
            members = [p for p in group["params"] if (id(p) in embedding_ids) is is_embedding]
            if members:
                yield {**group, "params": members, KEEPS_FLOAT32: is_embedding}


class PartitionedAdamW(torch.optim.Optimizer):
    """AdamW on flat float32 masters with moments in 8 bits.

    ``state[p]`` holds the tensors of a ``MomentFormat`` and the number of updates. Like torch's fused AdamW, ``step``
    divides gradients by ``grad_scale`` and does nothing if ``found_inf`` is not 0.

    Args:
        param_groups: parameter groups with lr, betas, eps, weight_decay, and optionally ``KEEPS_FLOAT32``.
        name: the recipe's ``optim.name``; any but ``adamw``.
    """

    grad_scale: torch.Tensor | None = None
    """Divisor that clips the gradient, a scalar; None if DeepSpeed clips."""
    found_inf: torch.Tensor | None = None
    """1 if the gradient is not finite, a scalar; None if DeepSpeed skips such steps itself."""

    def __init__(self, param_groups: Sequence[dict[str, Any]], name: OptimName) -> None:
        super().__init__(param_groups, {KEEPS_FLOAT32: False})
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
        storage, state = self.moment_state(p, group)
        state["step"] += 1
        assert p.grad is not None
        master, gradient = p.detach().view(-1), p.grad.detach().reshape(-1).float()
        piece = piece_size(p.device)
        for start in range(0, p.numel(), piece):
            span = slice(start, min(start + piece, p.numel()))
            storage.update(state, span, master[span], gradient[span], group, state["step"], factor)

    def moment_state(self, p: torch.Tensor, group: dict[str, Any]) -> tuple[MomentFormat, dict[str, Any]]:
        """Return moment format and state of a partition of ``group``; create missing state as zeros."""
        storage = self._format_of(p, group)
        if not self.state[p]:
            self.state[p] = {"step": 0, **storage.create(p.numel(), p.device)}
        return storage, self.state[p]

    def _format_of(self, p: torch.Tensor, group: dict[str, Any]) -> MomentFormat:
        if has_float32_moments(self._name, p.numel(), group[KEEPS_FLOAT32]):
            return self._float32
        if p.device not in self._formats:
            self._formats[p.device] = moment_format(self._name, p.device)
        return self._formats[p.device]


class PartitionMoments:
    """Float32 copies of a partition's low-bit moments, for reading or writing them in slices."""

    def __init__(self, optimizer: PartitionedAdamW, master: torch.Tensor, group: dict[str, Any]) -> None:
        self._master = master.detach().view(-1)
        self._format, self.state = optimizer.moment_state(master, group)
        self.is_written = self.is_restored = False
        self.starts: list[int] = []

    def slice_state(self, part: slice) -> _PartitionSlice:
        """Return the state of a slice; slices are always requested in the order of the partition's layout."""
        self.starts.append(part.start)
        return _PartitionSlice(self, part, is_first=len(self.starts) == 1)

    @cached_property
    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the flat master, and float32 copies of both moments, by kind."""
        moments = zip(MOMENTS, self._format.read(self.state), strict=True)
        return {MASTER: self._master, **{kind: moment.clone() for kind, moment in moments}}

    def save(self) -> None:
        """Quantise written float32 moments into the optimizer's state, unless ``set_raw`` restored it exactly."""
        if self.is_written and not self.is_restored:
            self._format.write(self.state, *(self.tensors[kind] for kind in MOMENTS))


@dataclass(frozen=True)
class _PartitionSlice(FragmentState):
    """State of a slice of a partition; written moments reach the optimizer with ``PartitionMoments.save``."""

    partition: PartitionMoments
    part: slice
    is_first: bool

    @property
    def updates(self) -> int:
        return int(self.partition.state["step"])

    def read(self) -> Mapping[str, torch.Tensor]:
        return {kind: tensor[self.part] for kind, tensor in self.partition.tensors.items()}

    @torch.no_grad()
    def write(self, tensors: Mapping[str, torch.Tensor], updates: int) -> None:
        for kind, values in tensors.items():
            self.partition.tensors[kind][self.part].copy_(values)
        self.partition.state["step"] = updates
        self.partition.is_written = True

    def raw(self) -> dict[str, torch.Tensor]:
        """Return all moments of the partition in their stored format, and the starts of its slices, with the first."""
        if not self.is_first:
            return {}
        moments = {kind: tensor.cpu() for kind, tensor in self.partition.state.items() if kind != "step"}
        return {**moments, "starts": torch.tensor(self.partition.starts)}

    def set_raw(self, raw: Mapping[str, torch.Tensor]) -> None:
        """Restore the result of ``raw``, if the partition has the same slices; else the float32 values stay."""
        if raw["starts"].tolist() != self.partition.starts:
            return
        for kind, tensor in self.partition.state.items():
            if kind != "step":
                tensor.copy_(raw[kind])
        self.partition.is_restored = True
