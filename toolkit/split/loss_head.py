"""The head of a suffix, which computes logits or their loss, and the shortcuts at the top of a suffix."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from toolkit.mask.row_layers import HeadWithRows
from toolkit.split.logit_tiles import LogitFunction
from toolkit.split.module_tree import EndOfPass
from toolkit.split.supervised_loss import linear_cross_entropy


@dataclass(frozen=True)
class Shortcuts:
    """Shortcuts at the top of the suffix, in addition to running the head on the supervised positions alone."""

    tiled: bool = False
    """Head and cross entropy are computed together, in tiles of the vocabulary; else all logits come first."""
    norm: bool = False
    """The final norm runs on the supervised positions alone."""
    mlp: bool = False
    """The last block's MLP runs on the supervised positions alone."""

    @property
    def text(self) -> str:
        """Describe the shortcuts for the log."""
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
        """Return the head's own output, or with ``targets`` the summed cross entropy of the logits.

        ``hidden`` is [1, S, hidden_size]; ``args`` and ``kwargs`` are further arguments of the head's own forward. The
        others are those of ``linear_cross_entropy``, for a head that is ``nn.Linear``.
        """
        if targets is None:
            return super().forward(hidden, *args, **kwargs)
        linear: Any = self  # with targets, this class extends nn.Linear
        rows = self.trained_rows() if isinstance(self, HeadWithRows) else None
        return linear_cross_entropy(
            hidden.squeeze(0), linear.weight, linear.bias, targets, processing, in_float32=in_float32, rows=rows
        )
