"""The key of a sample: what identifies its token ids in the token store and in the activation cache."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256

import numpy as np
import torch


def sample_key(token_ids: Sequence[int] | torch.Tensor) -> str:
    """Return the SHA-256 of the token ids, as 64-bit integers, little end first."""
    return sha256(np.asarray(token_ids, dtype="<i8").tobytes()).hexdigest()
