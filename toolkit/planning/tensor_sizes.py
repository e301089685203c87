"""Count the elements of a split model by what an engine does with them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TensorSizes:
    """Sizes of the tensors of a split model, in elements."""

    shared: int
    """Elements that prefix and suffix share: a frozen tied embedding."""
    trained: tuple[int, ...]
    """Size of each trained tensor."""
    frozen: tuple[int, ...]
    """Size of each frozen tensor of the suffix, including shared ones."""
    width: int
    """Bytes of an element in the model's precision."""
    tables: tuple[int, ...] = ()
    """Those of ``trained`` that are embedding tables."""
    quantised: int = 0
    """Bytes of the suffix's layers in 8 or 4 bits, which no engine partitions or offloads."""

    @property
    def total(self) -> int:
        """Return the trained elements."""
        return sum(self.trained)
