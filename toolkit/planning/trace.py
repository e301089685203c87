"""Trace one micro batch on the meta device: log every allocation, and count the FLOPs of every matrix product."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, Literal

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from toolkit.data.batches import Batch
from toolkit.data.examples import Example
from toolkit.planning.meta_operators import infer, meta_attention
from toolkit.split.loss_head import Shortcuts
from toolkit.split.prefix import Prefix
from toolkit.split.suffix import Suffix
from toolkit.split.supervised_loss import supervised_loss, tile_width

Pass = Literal["prefix", "forward", "backward"]
Product = Literal["matrices", "attention"]
Kind = Literal["gradients", "activations", "logits", "workspace"]
_KINDS: tuple[Kind, ...] = ("gradients", "activations", "logits", "workspace")


@dataclass(frozen=True)
class BatchShape:
    """Sizes of a micro batch that determine its cost."""

    rows: int
    tokens: int
    """Length of each row, padding included."""
    supervised: int
    """Supervised positions of all rows together."""
    packed: tuple[int, ...] = ()
    """Lengths of the samples packed into the one row; empty if rows are padded."""

    @property
    def pairs(self) -> int:
        """Return the number of token pairs within samples or padded rows, to which attention's cost is proportional."""
        return sum(length**2 for length in self.packed) or self.rows * self.tokens**2


@dataclass
class Allocation:
    """One allocated storage."""

    bytes: int
    kind: Kind = "workspace"


Event = tuple[Allocation, Literal[1, -1]]
"""An allocation (1), or its release (-1)."""


@dataclass(frozen=True)
class Trace:
    """Allocations and FLOPs of one micro batch on one rank."""

    shape: BatchShape
    events: tuple[Event, ...] = field(repr=False)
    """Allocations and releases in order."""
    flops: dict[tuple[Pass, Product], int]
    """Floating-point operations as torch.utils.flop_counter counts them: 2 for a multiply-add."""
    end_of_forward: int
    """Number of events until the end of forward and loss."""
    most_in_prefix: int
    """Peak bytes of the prefix alone."""
    mixes_samples: bool
    """True if attention ran over several packed samples at once."""

    def kept(self, kind: Kind) -> int:
        """Return the bytes of ``kind`` that are held between forward and backward."""
        return sum(sign * held.bytes for held, sign in self.events[: self.end_of_forward] if held.kind == kind)

    def most(self, kind: Kind) -> int:
        """Return the peak bytes of ``kind`` alone."""
        return self.peak({other: float(other == kind) for other in _KINDS})[kind]

    def peak(self, weights: dict[Kind, float] | None = None) -> dict[str, int]:
        """Return the bytes by kind at the moment when their weighted sum is largest.

        Args:
            weights: factor of each kind, 1 by default; below 1 for gradients that an engine partitions over ranks.
        """
        weight_of = dict.fromkeys(_KINDS, 1.0) | (weights or {})
        now: Counter[Kind] = Counter()
        best: dict[Kind, int] = {}
        total = most = 0.0
        for held, sign in self.events:
            now[held.kind] += sign * held.bytes
            total += sign * held.bytes * weight_of[held.kind]
            if total > most:
                most, best = total, dict(now)
        return {kind: int(best.get(kind, 0) * weight_of[kind]) for kind in _KINDS}


def trace(
    prefix: Prefix | None, suffix: Suffix, trained: Iterable[nn.Parameter], shape: BatchShape, vocabulary: int
) -> Trace:
    """Run forward, loss and backward of one micro batch on meta tensors.

    Args:
        prefix: prefix of a model on the meta device; None if the model has no frozen prefix.
        suffix: suffix of the same model, with or without activation checkpointing.
        trained: parameters that get gradients.
        shape: shape of the micro batch; several rows are traced with a padding mask, although they have equal length.
        vocabulary: vocabulary size, the rows of the head.

    Raises:
        RuntimeError: the model reads the content of a tensor, which a meta tensor lacks.
    """
    batch = _meta_batch(shape)
    log = _allocation_log(prefix, suffix, shape, vocabulary)
    with log, meta_attention(log.count_attention):
        hidden = prefix(batch) if prefix is not None else None
        most_in_prefix = max(accumulate(sign * held.bytes for held, sign in log.events), default=0)
        log.phase = "forward"
        loss = supervised_loss(suffix, hidden, batch, 1.0)
        log.mark_activations()
        end_of_forward = len(log.events)
        log.phase = "backward"
        loss.backward()  # type: ignore[no-untyped-call]
        for parameter in trained:
            if parameter.grad is not None:
                log.mark(parameter.grad, "gradients")
                parameter.grad = None
    mixes_samples = bool(shape.packed) and not log.attention_lengths <= set(shape.packed)
    return Trace(shape, tuple(log.events), dict(log.flops), end_of_forward, most_in_prefix, mixes_samples)


def choose_shortcuts(prefix: Prefix | None, suffix: Suffix, shape: BatchShape) -> Shortcuts:
    """Choose the shortcuts of a suffix on the meta device, as a run does on a batch of its own.

    Raises:
        RuntimeError: as ``trace``; also if the suffix needs more than hidden states from below the frost line, so that
            the model cannot be cut there.
    """
    batch = _meta_batch(shape)
    log = _allocation_log(prefix, suffix, shape, vocabulary=1)
    with log, meta_attention(log.count_attention):
        hidden = prefix(batch) if prefix is not None else None
        if hidden is not None and _reads_embeddings(suffix, hidden, batch):
            raise RuntimeError("above the frost line, the model reads its input embeddings again")
        return suffix.choose_shortcuts(hidden, batch)


def _reads_embeddings(suffix: Suffix, hidden: torch.Tensor, batch: Batch) -> bool:
    """Return whether a gradient reaches the zeros that a suffix gives its model as input embeddings.

    ``hidden[b]`` replaces what becomes of them at the frost line, unless the model reads them elsewhere, too.
    """
    embeddings: list[torch.Tensor] = []

    def require_gradient(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        embeddings.append(kwargs["inputs_embeds"].requires_grad_())
        return args, kwargs | {"inputs_embeds": embeddings[-1].clone()}  # some models scale it in place

    handle = suffix.model.register_forward_pre_hook(require_gradient, with_kwargs=True)
    try:
        logits = suffix.logits(hidden, batch)
    finally:
        handle.remove()
    return any(gradient is not None for gradient in torch.autograd.grad(logits.sum(), embeddings, allow_unused=True))


def _meta_batch(shape: BatchShape) -> Batch:
    """Return a micro batch of ``shape`` on the meta device."""
    size = (shape.rows, shape.tokens)
    ids = torch.zeros(size, dtype=torch.long, device="meta")
    return Batch(
        input_ids=ids,
        attention_mask=torch.ones_like(ids) if shape.rows > 1 else None,
        supervised=torch.zeros(size, dtype=torch.bool, device="meta"),
        targets=torch.zeros(shape.supervised, dtype=torch.long, device="meta"),
        tokens=shape.rows * shape.tokens,
        examples=tuple(Example.with_answer((0,) * length, 1) for length in shape.packed),
        position_ids=ids if shape.packed else None,
        cu_seqlens=torch.zeros(len(shape.packed) + 1, dtype=torch.int32, device="meta") if shape.packed else None,
    )


def _allocation_log(prefix: Prefix | None, suffix: Suffix, shape: BatchShape, vocabulary: int) -> AllocationLog:
    """Return a log for a micro batch of ``shape`` in both halves of a model."""
    width = tile_width(shape.supervised, vocabulary, next(suffix.parameters()).element_size())
    parts = [part for part in (prefix, suffix) if part is not None]
    persistent = (t for part in parts for t in (*part.parameters(), *part.buffers()))
    return AllocationLog(shape, {vocabulary, width, vocabulary % width}, persistent)


class AllocationLog(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Record when each storage is allocated and released, and count FLOPs by pass.

    Args:
        shape: shape of the micro batch.
        logit_widths: last dimensions by which logits are recognised.
        persistent: parameters and buffers, which are not recorded.
    """

    def __init__(self, shape: BatchShape, logit_widths: set[int], persistent: Iterable[torch.Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.phase: Pass = "prefix"
        self.events: list[Event] = []
        self.flops: Counter[tuple[Pass, Product]] = Counter()
        self.attention_lengths: set[int] = set()
        """Tokens of each sequence that attention ran over."""
        self._shape, self._logit_widths = shape, logit_widths
        self._persistent = {tensor.untyped_storage()._cdata for tensor in persistent}
        self._live: dict[int, Allocation] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default and args[0].dtype == torch.bool:
            # transformers asks whether mask or positions allow is_causal=True; those of one sample do
            return self._shape.rows == 1 and not self._shape.packed
        out = infer(func, args, kwargs)
        if formula := flop_registry.get(func._overloadpacket):
            self.flops[self.phase, self._product_kind(args, out)] += formula(*args, **kwargs, out_val=out)
        elif "grouped_mm" in str(func):  # mixture-of-experts layers, which flop_registry lacks (torch 2.13)
            self.flops[self.phase, "matrices"] += 2 * args[0].numel() * args[1].shape[-1]
        for tensor in (out,) if isinstance(out, torch.Tensor) else tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.is_meta:
                self._record_allocation(tensor)
        return out

    def mark(self, tensor: torch.Tensor, kind: Kind) -> None:
        """Set the kind of the storage of ``tensor``, if it is recorded."""
        if held := self._live.get(tensor.untyped_storage()._cdata):
            held.kind = kind

    def mark_activations(self) -> None:
        """Mark all storages that exist now, except logits, as activations kept for backward."""
        for held in self._live.values():
            if held.kind == "workspace":
                held.kind = "activations"

    def count_attention(self, flops: int, tokens: int) -> None:
        """Add the FLOPs of a fused attention kernel over ``tokens`` tokens, which ``_MetaAttention`` reports."""
        self.flops[self.phase, "attention"] += flops
        self.attention_lengths.add(tokens)

    def _record_allocation(self, tensor: torch.Tensor) -> None:
        """Record the storage of ``tensor`` if it is new."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._live or key in self._persistent:
            return
        is_logits = tensor.dim() > 1 and tensor.shape[-1] in self._logit_widths
        held = self._live[key] = Allocation(storage.nbytes(), "logits" if is_logits else "workspace")
        self.events.append((held, 1))
        weakref.finalize(storage, self._record_release, key)

    def _record_release(self, key: int) -> None:
        """Record the release of a storage; called when it is garbage-collected."""
        if held := self._live.pop(key, None):
            self.events.append((held, -1))

    def _product_kind(self, args: tuple[Any, ...], out: Any) -> Product:
        """Return what a product belongs to; attention that is not fused has T x T matrices among operands or result."""
        square = (self._shape.tokens, self._shape.tokens)
        batched = [t for t in (*args, out) if isinstance(t, torch.Tensor) and t.dim() == 3]
        return "attention" if any(tuple(t.shape[-2:]) == square for t in batched) else "matrices"
