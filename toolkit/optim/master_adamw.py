"""AdamW in one pass over memory: clip, upcast, update and write-back, piece by piece.

A step moves some 30 bytes per trained element and computes little, so memory traffic is its cost. Moments and masters
lie in flat buffers; a piece of them, small enough for the processor's caches, goes through all there is to do before
the next one is touched. The number of kernels follows the bytes, not the number of tensors.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from toolkit.config.schema import OptimName
from toolkit.optim.flat_buffers import FlatBuffers, FlatState, OptimizerState, TensorState
from toolkit.optim.gradients import Clipping
from toolkit.optim.low_bit_state import LowBitState
from toolkit.optim.moments import BLOCK, SMALLEST, moment_format

LARGEST_PIECE = 2**22
"""Elements updated at once on a GPU, where that takes longer than the launch of three kernels; the most anywhere."""


def piece_size(device: torch.device) -> int:
    """Return the elements updated at once: on a CPU so many that all they need fits the second-level caches."""
    return min(2**17 * torch.get_num_threads(), LARGEST_PIECE) if device.type == "cpu" else LARGEST_PIECE


class MasterAdamW(torch.optim.AdamW):
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101) on float32 masters of low-precision parameters.

    bfloat16 keeps 8 bits of mantissa: at a learning rate of 1e-5 most AdamW updates are smaller than half a unit in
    the last place and would round to nothing. The masters take the updates; the parameters are their rounded copies
    (Micikevicius et al., arXiv 1710.03740). Parameters that are float32 already are their own masters.

    ``step`` is, with ``g`` the gradients of all tensors as one vector,

        g *= min(1, max_norm / (norm(g) + 1e-6)); AdamW(masters, g); parameters[:] = masters

    and changes nothing where ``norm(g)`` is NaN or infinite. Nothing in it waits for a GPU, unless ``name`` keeps
    moments in fewer bits: then it waits for the norm, as the training step does right after it.

    Args:
        parameters: by name, contiguous and all on one device.
        settings: parameter groups as torch.optim.AdamW takes them; they hold all of ``parameters``.
        max_norm: what the gradient's 2-norm is clipped to; 0 does not clip.
        accumulates: a step has more than one backward pass; gradients are added up in float32.
        ranks: gradients are summed over the process group if there is more than one, in float32 too.
        piece: elements updated at once; none takes ``piece_size``. A multiple of ``BLOCK`` for 8 bits.
        name: as the recipe's ``optim.name``: how moments and masters are stored.
        tables: ``id`` of the parameters that are embedding tables; in 8 bits they keep float32 moments.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        settings: Sequence[dict[str, Any]],
        max_norm: float,
        accumulates: bool = False,
        ranks: int = 1,
        piece: int | None = None,
        name: OptimName = "adamw",
        tables: Collection[int] = (),
    ) -> None:
        self._max_norm, self._ranks = max_norm, ranks
        device = next(iter(parameters.values())).device
        piece = piece or piece_size(device)
        assert name == "adamw" or piece % BLOCK == 0
        longest = min(piece, sum(p.numel() for p in parameters.values()))
        self._scratch = torch.empty(longest, device=device)
        self._states: list[OptimizerState] = []
        make = _StateFactory(name, tables, self._scratch, piece, accumulates, ranks)
        groups = []
        for index, group in enumerate(settings):
            made = list(make(index, group["params"]))
            self._states += made
            groups.append({**group, "params": [tensor for state in made for tensor in _updated_tensors(state)]})
        super().__init__(groups, fused=True)
        states = {p: one for state in self._states for p, one in zip(state.parameters, state.states, strict=True)}
        self.by_name: dict[str, TensorState] = {name: states[parameter] for name, parameter in parameters.items()}
        """State of each tensor, in the order of ``parameters``."""
        for one in states.values():
            if isinstance(one, FlatState):  # as torch.optim.AdamW keeps it
                self.state[one.master] = {kind: getattr(one, kind) for kind in ("step", "exp_avg", "exp_avg_sq")}
        self._squares = torch.zeros(sum(len(state.slices) for state in self._states), device=device)
        self.grad_norm = torch.zeros((), device=device)
        """Norm of the gradient before clipping, as the last ``step`` saw it; reading it waits for the device."""

    @torch.no_grad()
    def collect(self) -> None:
        """Add the gradients of a backward pass to the float32 sums and free them, where there are sums."""
        for state in self._states:
            if state.is_summed:
                state.collect()

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """Clip, update masters and moments, round the masters into the parameters, free the gradients."""
        for state in self._states:
            state.begin()
            if self._ranks > 1:
                dist.all_reduce(state.gradients[0])
        self.grad_norm = self._norm()
        clipping = Clipping(self.grad_norm, self._max_norm)
        for state in self._states:
            state.update(self.param_groups[state.group], clipping)
            state.end()

    @torch.no_grad()
    def write_back(self) -> None:
        """Round the masters into the parameters, after the masters were set from outside."""
        for state in self._states:
            state.write_back()

    def sample(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield ``OptimizerState.sample`` of all tensors, for ``toolkit.optim.update_monitor``."""
        for state in self._states:
            yield state.sample()

    def _norm(self) -> torch.Tensor:
        """Return the 2-norm of all gradients, a float32 scalar on their device.

        On a CPU torch adds a tensor's squares up in one float32 number a lane, which is wrong by 0.3 % for 42 million
        elements (torch 2.13), and first copies bfloat16 to float32. A piece is exact to 1e-5 and stays in the cache.
        On a GPU the kernel reads bfloat16 and adds up in a tree.
        """
        if self._scratch.device.type != "cpu":
            return norm_at_once([gradient for state in self._states for gradient in state.gradients])
        squares = iter(self._squares.unbind())
        for state in self._states:
            for part in state.slices:
                gradient = state.gradient(part)
                torch.dot(gradient, gradient, out=next(squares))
        return self._squares.sum().sqrt()


def norm_at_once(gradients: list[torch.Tensor]) -> torch.Tensor:
    """Return the 2-norm of all ``gradients`` together, a float32 scalar, in three calls whatever their number."""
    norm: torch.Tensor = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients, 2, dtype=torch.float32)))
    return norm


class _StateFactory:
    """Makes the optimizer state of a parameter group."""

    def __init__(
        self, name: OptimName, tables: Collection[int], scratch: torch.Tensor, piece: int, accumulates: bool, ranks: int
    ) -> None:
        self._name, self._tables = name, tables
        self._common = scratch, piece, accumulates, ranks
        self._format = None if name == "adamw" else moment_format(name, scratch.numel(), scratch.device)
        self._splits = torch.empty_like(scratch) if name == "adamw_bf16" else None

    def __call__(self, index: int, parameters: Sequence[nn.Parameter]) -> Iterator[OptimizerState]:
        flat = [p for p in parameters if self._stays_float32(p)]
        for kind in ([p for p in flat if (p.dtype == torch.float32) is exact] for exact in (False, True)):
            if kind:
                yield FlatBuffers(index, kind, *self._common)
        for parameter in parameters:
            if not self._stays_float32(parameter):
                assert self._format is not None
                yield LowBitState(index, parameter, *self._common, self._format, self._splits)

    def _stays_float32(self, parameter: nn.Parameter) -> bool:
        if self._name in ("adamw", "adamw_bf16"):
            return self._name == "adamw"
        return parameter.numel() < SMALLEST or id(parameter) in self._tables


def _updated_tensors(state: OptimizerState) -> list[torch.Tensor]:
    """Return what stands for the tensors of a state in ``param_groups``."""
    return [s.master if isinstance(s, FlatState) else p for s, p in zip(state.states, state.parameters, strict=True)]
