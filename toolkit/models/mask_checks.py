"""Let transformers make its attention masks without asking the device what the host knows of a batch.

Before it makes a mask, transformers reads two facts from the device: whether the positions restart within a row, which
means that samples are packed, and whether a row is padded. Each answer is a wait, in which a GPU's queue runs empty. A
batch knows both. The masks are the same, and so is the attention that they lead to.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import masking_utils

_PACKED, _SKIPPED = "find_packed_sequence_indices", "_ignore_causal_mask_sdpa"
"""The two functions that ask, in transformers 5.14 to 5.23. In a version that names them otherwise it asks again."""


@contextmanager
def masks_without_checks(is_packed: bool) -> Iterator[None]:
    """Run a model's forward pass on a training batch within: rows padded on the right, if at all, and no cache.

    ``is_packed`` says whether several samples share a row. transformers' functions are put back on leaving.
    """
    originals = {name: vars(masking_utils)[name] for name in (_PACKED, _SKIPPED) if name in vars(masking_utils)}
    if _PACKED in originals:
        masking_utils.find_packed_sequence_indices = _sample_numbers if is_packed else _no_samples
    if _SKIPPED in originals:
        masking_utils._ignore_causal_mask_sdpa = functools.partial(_skips_mask, originals[_SKIPPED])
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(masking_utils, name, original)


def _no_samples(position_ids: torch.Tensor) -> None:
    """Say that no row has several samples."""


def _sample_numbers(position_ids: torch.Tensor) -> torch.Tensor:
    """Return each token's sample in its row, [B, T] from 0: a sample begins where positions do not count on."""
    restarts = torch.diff(position_ids, prepend=position_ids[:, :1] - 1, dim=-1) != 1
    return restarts.cumsum(-1)


def _skips_mask(original: Callable[..., bool], padding_mask: torch.Tensor | None, *args: Any, **kwargs: Any) -> bool:
    """Return whether the causal kernel needs no mask: never for a batch with a padding mask, which has padding."""
    return padding_mask is None and original(padding_mask, *args, **kwargs)
