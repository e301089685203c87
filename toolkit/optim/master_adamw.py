"""AdamW in one pass over memory: clip, upcast, update and write-back.

A step moves some 30 bytes per trained element and computes little, so memory traffic is its cost. Moments and masters
lie in flat buffers. On CUDA a kernel of our own does all at once (``toolkit.optim.fused_adamw``). Elsewhere each piece,
small enough for the CPU's caches, is clipped, updated and written back before the next one is touched. The number of
kernels follows the bytes, not the number of tensors.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from toolkit.config.schema import OptimName
from toolkit.optim.flat_buffers import FlatBuffers, OptimizerState
from toolkit.optim.gradient_buckets import GradientBuckets
from toolkit.optim.gradients import Clipping
from toolkit.optim.low_bit_state import LowBitState
from toolkit.optim.moments import BLOCK, has_float32_moments, moment_format
from toolkit.optim.state_fragments import FragmentState
from toolkit.optim.update_kernels import KernelFactory

LARGEST_PIECE = 2**22
"""Most elements updated at once on a CPU."""
GPU_PIECE = 320 * 65_536
"""Elements updated at once on a GPU: one launch of torch's multi-tensor kernels, 320 blocks of 65,536. With four times
fewer an H100 took 29 % longer; with six times more 6 % less, for 0.4 GiB of workspace (2026-11-27)."""


def piece_size(device: torch.device) -> int:
    """Return how many elements to update at once: on a CPU as many as fit the L2 caches with their state."""
    return min(2**17 * torch.get_num_threads(), LARGEST_PIECE) if device.type == "cpu" else GPU_PIECE


class MasterAdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101) on float32 masters of low-precision parameters.

    bfloat16 keeps 8 bits of mantissa: at a learning rate of 1e-5 most AdamW updates are smaller than half a unit in
    the last place and would round to nothing. The masters take the updates; the parameters are their rounded copies
    (Micikevicius et al., arXiv 1710.03740). Parameters that are float32 already are their own masters.

    ``step`` is, with ``g`` the gradients of all tensors as one vector,

        g *= min(1, max_norm / (norm(g) + 1e-6)); AdamW(masters, g); parameters[:] = masters

    and changes nothing where ``norm(g)`` is NaN or infinite. Nothing in it waits for a GPU, unless ``name`` keeps
    moments in fewer bits: then it waits for the norm, as the training step does right after it.

    Args:
        parameters: trainable parameters by name, contiguous and all on one device.
        param_groups: parameter groups as torch.optim.AdamW takes them; they hold all of ``parameters``.
        max_norm: largest 2-norm of the gradient after clipping; 0 turns clipping off.
        accumulates: True if a step has more than one backward pass, whose gradients are accumulated in float32.
        buckets: sums the gradients of ``parameters`` over ranks; None for one rank.
        piece: elements updated at once, a multiple of ``BLOCK`` unless ``name`` is ``adamw``; None for ``piece_size``.
        name: the recipe's ``optim.name``, which sets how moments and masters are stored.
        embedding_ids: ``id`` of each embedding weight; the 8-bit optimizers keep float32 moments for these.
        kernels: makes kernels of our own for the parameters' device (``kernel_choice``); None for torch's.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        param_groups: Sequence[dict[str, Any]],
        max_norm: float,
        accumulates: bool = False,
        buckets: GradientBuckets | None = None,
        piece: int | None = None,
        name: OptimName = "adamw",
        embedding_ids: Collection[int] = (),
        kernels: KernelFactory | None = None,
    ) -> None:
        super().__init__(param_groups, {})
        self._max_norm, self._buckets = max_norm, buckets
        device = next(iter(parameters.values())).device
        piece = piece or piece_size(device)
        assert name == "adamw" or piece % BLOCK == 0
        scratch = None
        if kernels is None or name != "adamw":
            scratch = torch.empty(min(piece, sum(p.numel() for p in parameters.values())), device=device)
        accumulates = accumulates and buckets is None  # buckets accumulate gradients themselves
        self._states = list(_create_states(param_groups, name, embedding_ids, scratch, accumulates, kernels))
        by_parameter = {p: one for state in self._states for p, one in zip(state.parameters, state.states, strict=True)}
        self.by_name: dict[str, FragmentState] = {name: by_parameter[p] for name, p in parameters.items()}
        """State of each tensor, in the order of ``parameters``."""
        self._squares: torch.Tensor | None = None
        if kernels or device.type == "cpu":
            self._squares = torch.zeros(sum(state.parts for state in self._states), device=device)
        self.grad_norm = torch.zeros((), device=device)
        """2-norm of the last step's gradient before clipping; reading it waits for the device."""

    @contextmanager
    def collecting(self, is_last: bool) -> Iterator[None]:
        """Collect the gradients of the backward pass in the body; in the last of a step, ranks begin to sum them.

        Raises:
            ModelError: as ``GradientBuckets.collecting``.
        """
        with nullcontext() if self._buckets is None else self._buckets.collecting(is_last):
            yield
        self.collect()

    @torch.no_grad()
    def collect(self) -> None:
        """Accumulate the gradients of a backward pass in float32 and free them; called after every backward pass.

        Does nothing for tensors that need no accumulation buffer (``Gradients.is_summed``).
        """
        for state in self._states:
            if state.is_summed:
                state.collect()

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """Sum gradients over ranks, clip, update masters and moments, write back to the parameters, free gradients."""
        summed = None if self._buckets is None else self._buckets.wait()
        for state in self._states:
            state.begin(summed)
        del summed  # each state frees its own
        self.grad_norm = self._compute_grad_norm()
        clipping = Clipping(self.grad_norm, self._max_norm)
        for state in self._states:
            state.update(self.param_groups[state.group], clipping)
            state.end()

    @torch.no_grad()
    def write_back(self) -> None:
        """Copy the masters into the parameters, rounded; for when masters were loaded or set from outside."""
        for state in self._states:
            state.write_back()

    def sample(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield ``OptimizerState.sample`` of all tensors, for ``toolkit.optim.update_monitor``."""
        for state in self._states:
            yield state.sample()

    def _compute_grad_norm(self) -> torch.Tensor:
        """Return the 2-norm of all gradients, a float32 scalar on their device.

        On a CPU torch adds a tensor's squares up in one float32 number a lane, which is wrong by 0.3 % for 42 million
        elements (torch 2.13), and first copies bfloat16 to float32. A piece is exact to 1e-5 and stays in the cache.
        On a GPU the kernels read bfloat16 and add up in a tree.
        """
        if self._squares is None:
            return total_norm([gradient for state in self._states for gradient in state.gradients])
        parts = self._squares.split_with_sizes([state.parts for state in self._states])
        for state, squares in zip(self._states, parts, strict=True):
            state.square(squares)
        return self._squares.sum().sqrt()


def total_norm(gradients: list[torch.Tensor]) -> torch.Tensor:
    """Return the 2-norm of all ``gradients`` together, a float32 scalar, in three calls however many there are."""
    norm: torch.Tensor = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients, 2, dtype=torch.float32)))
    return norm


def _create_states(
    param_groups: Sequence[dict[str, Any]], name: OptimName, embedding_ids: Collection[int],
    scratch: torch.Tensor | None, accumulates: bool, kernels: KernelFactory | None,
) -> Iterator[OptimizerState]:  # fmt: skip
    """Yield the state of each parameter group: flat buffers by precision, then low-bit states by tensor."""
    low_bit_format = None
    if name != "adamw":
        assert scratch is not None
        low_bit_format = moment_format(name, scratch.device)
    for index, group in enumerate(param_groups):
        flat: dict[torch.dtype, list[nn.Parameter]] = {}
        low_bit = []
        for p in group["params"]:
            if has_float32_moments(name, p.numel(), id(p) in embedding_ids):
                flat.setdefault(p.dtype, []).append(p)
            else:
                low_bit.append(p)
        for dtype in sorted(flat, key=lambda dtype: dtype == torch.float32):  # low precision first
            yield FlatBuffers(index, flat[dtype], None if kernels else scratch, accumulates, kernels)
        for p in low_bit:
            assert low_bit_format is not None
            assert scratch is not None
            yield LowBitState(index, p, scratch, accumulates, low_bit_format, kernels)
