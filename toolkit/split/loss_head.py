"""The head of a suffix, which computes logits or their loss, and the short cuts at the top of a suffix."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from toolkit.split.module_tree import EndOfPass
from toolkit.split.supervised_loss import LogitFunction, linear_cross_entropy


@dataclass(frozen=True)
class Shortcuts:
    """Short cuts at the top of the suffix, beside a head that sees supervised positions alone."""

    tiled: bool = False
    """Head and cross entropy are one step over tiles of the vocabulary, instead of logits and their loss."""
    norm: bool = False
    """The final norm runs on the supervised positions alone."""
    mlp: bool = False
    """The last block's MLP runs on the supervised positions alone."""

    @property
    def text(self) -> str:
        """Describe them for the log."""
        parts = [name for name, on in (("the last MLP", self.mlp), ("the final norm", self.norm), ("head", True)) if on]
        loss = "in tiles of the vocabulary" if self.tiled else "from their whole logits, for this architecture's head"
        return f"{', '.join(parts)}; loss {loss}"


class LossHead(EndOfPass):
    """Extends the class of the model's head, which can then compute the loss of its logits.

    The loss is computed within the head's forward, because ZeRO-3 gathers the weight for just that and for the backward
    of what it returns.
    """

    def forward(
        self,
        hidden: torch.Tensor,
        *args: Any,
        targets: torch.Tensor | None = None,
        processing: LogitFunction | None = None,
        in_float32: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Return the head's own output, or the summed cross entropy of the logits.

        Args:
            hidden: [1, S, hidden_size].
            args: as the model's code gives them.
            targets: [S], for the loss of a head that is a product with a matrix; none is for its output.
            processing: from the head's output to the logits; none where that is nothing.
            in_float32: products are computed in float32 (see ``toolkit.models.float32_gradients``).
            kwargs: as the model's code gives them.
        """
        if targets is None:
            return super().forward(hidden, *args, **kwargs)
        matrix: Any = self  # whose class extends nn.Linear then
        return linear_cross_entropy(
            hidden.squeeze(0), matrix.weight, matrix.bias, targets, processing, in_float32=in_float32
        )
