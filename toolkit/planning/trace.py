"""Trace one micro batch on the meta device: log every allocation, and count every product."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch
from torch import nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from toolkit.data.batches import Batch
from toolkit.data.examples import Example
from toolkit.planning.meta_operators import infer
from toolkit.split.prefix import Prefix
from toolkit.split.suffix import Suffix
from toolkit.split.supervised_loss import supervised_loss, tile_width

Pass = Literal["prefix", "forward", "backward"]
Product = Literal["matrices", "attention"]
Kind = Literal["gradients", "activations", "logits", "workspace"]
_KINDS: tuple[Kind, ...] = ("gradients", "activations", "logits", "workspace")


@dataclass(frozen=True)
class BatchShape:
    """Hold the sizes of a micro batch that its cost depends on."""

    rows: int
    tokens: int
    """Length of each row, padding included."""
    supervised: int
    """Supervised positions of all rows together."""
    packed: tuple[int, ...] = ()
    """Lengths of the samples that are packed into the one row; empty where rows are padded."""

    @property
    def pairs(self) -> int:
        """Return the pairs of tokens of one sample, or of one padded row: attention's cost grows with them."""
        return sum(length**2 for length in self.packed) or self.rows * self.tokens**2


@dataclass
class Allocation:
    """Hold one allocation: alive from event ``birth`` to event ``death``, counted in allocations and releases."""

    birth: int
    bytes: int
    kind: Kind = "workspace"
    death: int | None = None


@dataclass(frozen=True)
class Trace:
    """Hold what one micro batch of a shape allocates and computes on one rank."""

    shape: BatchShape
    records: tuple[Allocation, ...] = field(repr=False)
    flops: dict[tuple[Pass, Product], int]
    """Floating-point operations as torch.utils.flop_counter counts them: 2 a multiply-add."""
    end_of_forward: int
    """The event at which forward and loss were done."""
    most_in_prefix: int
    """The most bytes at once before the suffix begins."""

    @cached_property
    def _events(self) -> list[tuple[Allocation, int]]:
        """Return allocations (1) and releases (-1) in order."""
        events = [(r.birth, r, 1) for r in self.records]
        events += [(r.death, r, -1) for r in self.records if r.death is not None]
        return [(record, sign) for _, record, sign in sorted(events, key=lambda event: event[0])]

    def kept(self, kind: Kind) -> int:
        """Return the bytes of ``kind`` that are alive between forward and backward."""
        return sum(r.bytes for r in self.records if r.kind == kind and _alive(r, self.end_of_forward))

    def most(self, kind: Kind) -> int:
        """Return the most bytes of ``kind`` that are alive at once."""
        return self.peak({other: float(other == kind) for other in _KINDS})[kind]

    def peak(self, weights: dict[Kind, float] | None = None) -> dict[Kind, int]:
        """Return the bytes by kind at the moment when their sum is largest.

        Args:
            weights: how much a byte of each kind counts; an engine that partitions gradients keeps a share of them.
        """
        weigh = dict.fromkeys(_KINDS, 1.0) | (weights or {})
        now: Counter[Kind] = Counter()
        best: dict[Kind, int] = {}
        total = most = 0.0
        for record, sign in self._events:
            now[record.kind] += sign * record.bytes
            total += sign * record.bytes * weigh[record.kind]
            if sign > 0 and total > most:
                most, best = total, dict(now)
        return {kind: int(best.get(kind, 0) * weigh[kind]) for kind in _KINDS}


def trace(
    prefix: Prefix | None, suffix: Suffix, trained: Iterable[nn.Parameter], shape: BatchShape, vocabulary: int
) -> Trace:
    """Run forward, loss and backward of one micro batch on meta tensors.

    Args:
        prefix: of a model on the meta device; None where there is none.
        suffix: of the same model, its blocks checkpointed or not.
        trained: the parameters that get gradients.
        shape: rows of equal length; more than one row are taken as padded, as rows of different length are, unless
            they are packed.
        vocabulary: rows of the head.

    Raises:
        RuntimeError: the model looks at the content of a tensor, which meta tensors have not.
    """
    batch = _batch(shape)
    parts = [part for part in (prefix, suffix) if part is not None]
    element_size = next(suffix.parameters()).element_size()
    standing = (t for part in parts for t in (*part.parameters(), *part.buffers()))
    log = _AllocationLog(shape, vocabulary, element_size, standing)
    with log, _fused_attention(log):
        log.phase = "prefix"
        hidden = prefix(batch) if prefix is not None else None
        most_in_prefix = log.most
        log.phase = "forward"
        loss = supervised_loss(suffix, hidden, batch, 1.0)
        end_of_forward = log.mark_activations()
        log.phase = "backward"
        loss.backward()  # type: ignore[no-untyped-call]
        for parameter in trained:
            if parameter.grad is not None:
                log.mark(parameter.grad, "gradients")
                parameter.grad = None
    return Trace(shape, tuple(log.records), dict(log.flops), end_of_forward, most_in_prefix)


def _batch(shape: BatchShape) -> Batch:
    size = (shape.rows, shape.tokens)
    ids = torch.zeros(size, dtype=torch.long, device="meta")
    return Batch(
        input_ids=ids,
        attention_mask=torch.ones_like(ids) if shape.rows > 1 else None,
        supervised=torch.zeros(size, dtype=torch.bool, device="meta"),
        targets=torch.zeros(shape.supervised, dtype=torch.long, device="meta"),
        tokens=shape.rows * shape.tokens,
        examples=tuple(Example((0,) * length, 1) for length in shape.packed),
        position_ids=ids if shape.packed else None,
        boundaries=torch.zeros(len(shape.packed) + 1, dtype=torch.int32, device="meta") if shape.packed else None,
    )


def _alive(record: Allocation, event: int) -> bool:
    return record.birth <= event and (record.death is None or record.death > event)


class _AllocationLog(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Note when each storage is allocated and released, and count products by pass.

    Args:
        shape: of the micro batch.
        vocabulary: columns of the logits.
        element_size: bytes of one logit in the model's precision.
        standing: parameters and buffers, which are there before and after.
    """

    def __init__(self, shape: BatchShape, vocabulary: int, element_size: int, standing: Iterable[torch.Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.phase: Pass = "prefix"
        self.records: list[Allocation] = []
        self.flops: Counter[tuple[Pass, Product]] = Counter()
        self._shape = shape
        width = tile_width(shape.supervised, vocabulary, element_size)
        self._widths = {vocabulary, width, vocabulary % width}
        self._standing = {tensor.untyped_storage()._cdata for tensor in standing}
        self._live: dict[int, Allocation] = {}
        self._event = 0
        self._now = 0
        self.most = 0
        """The most bytes at once so far."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default and args[0].dtype == torch.bool:
            # transformers asks whether the mask or the positions allow plain causal attention; those of one sample do
            return self._shape.rows == 1 and not self._shape.packed
        out = infer(func, args, kwargs)
        if formula := flop_registry.get(func._overloadpacket):
            self.flops[self.phase, self._product(args, out)] += formula(*args, **kwargs, out_val=out)
        elif "grouped_mm" in str(func):  # a mixture's experts, which the registry does not know (torch 2.13)
            self.flops[self.phase, "matrices"] += 2 * args[0].numel() * args[1].shape[-1]
        for tensor in (out,) if isinstance(out, torch.Tensor) else tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.is_meta:
                self._note(tensor)
        return out

    def mark(self, tensor: torch.Tensor, kind: Kind) -> None:
        """Set the kind of ``tensor``'s storage."""
        if record := self._live.get(tensor.untyped_storage()._cdata):
            record.kind = kind

    def mark_activations(self) -> int:
        """Mark what is alive now and is no logits as kept for backward; return the event."""
        for record in self._live.values():
            if record.kind == "workspace":
                record.kind = "activations"
        return self._event

    def count_attention(self, flops: int) -> None:
        """Add what a fused attention kernel computes."""
        self.flops[self.phase, "attention"] += flops

    def _note(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._live or key in self._standing:
            return
        self._event += 1
        record = Allocation(self._event, storage.nbytes())
        if tensor.dim() > 1 and tensor.shape[-1] in self._widths:
            record.kind = "logits"
        self.records.append(record)
        self._live[key] = record
        self._now += record.bytes
        self.most = max(self.most, self._now)
        weakref.finalize(storage, self._release, key)

    def _release(self, key: int) -> None:
        if record := self._live.pop(key, None):
            self._event += 1
            record.death = self._event
            self._now -= record.bytes

    def _product(self, args: tuple[Any, ...], out: Any) -> Product:
        """Return whose product it is; attention that is not fused multiplies batches of T x T matrices."""
        square = (self._shape.tokens, self._shape.tokens)
        batched = [t for t in (*args, out) if isinstance(t, torch.Tensor) and t.dim() == 3]
        return "attention" if any(tuple(t.shape[-2:]) == square for t in batched) else "matrices"


@contextmanager
def _fused_attention(log: _AllocationLog) -> Iterator[None]:
    """Put ``_MetaAttention`` in the place of scaled_dot_product_attention, which on meta would write out T x T scores.

    A function mode would not do: autograd's backward leaves it, and recomputation runs there.
    """
    kernel = functional.scaled_dot_product_attention

    def fused(query: Any, key: Any, value: Any, attn_mask: Any = None, *args: Any, **kwargs: Any) -> Any:
        if attn_mask is not None and attn_mask.dtype != query.dtype:  # a boolean mask becomes a bias
            attn_mask = torch.empty_like(attn_mask, dtype=query.dtype)
        return _MetaAttention.apply(query, key, value, attn_mask, log)  # type: ignore[no-untyped-call]

    functional.scaled_dot_product_attention = fused
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = kernel


class _MetaAttention(torch.autograd.Function):
    """Allocate and count as the fused kernels do (Dao et al., arXiv 2205.14135): no scores, T logarithms a head.

    Backward computes the scores again: five products for the two of forward.
    """

    @staticmethod
    def forward(ctx: Any, query: Any, key: Any, value: Any, bias: Any, log: _AllocationLog) -> torch.Tensor:
        batch, heads, length, size = query.shape
        out: torch.Tensor = query.new_empty(batch, length, heads, value.shape[-1]).transpose(1, 2)
        logarithms = query.new_empty(batch, heads, length, dtype=torch.float32)
        ctx.save_for_backward(query, key, value, bias, out, logarithms)
        ctx.pairs, ctx.log = batch * heads * length * key.shape[-2], log
        log.count_attention(2 * ctx.pairs * (size + value.shape[-1]))
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        query, key, value, *_ = ctx.saved_tensors
        ctx.log.count_attention(2 * ctx.pairs * (3 * query.shape[-1] + 2 * value.shape[-1]))
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), None, None
