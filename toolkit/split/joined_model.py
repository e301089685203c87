"""The model in one piece again: the trained suffix as it stands, on top of the prefix.

Generation needs both halves with their key-value caches, which transformers manages for whole models only. Nothing is
copied: the parameters above the frost line are those that train, and the blocks below it are the prefix's own, for as
long as they are loaded.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from transformers import PreTrainedModel

from toolkit.models.anatomy import Anatomy
from toolkit.split.module_tree import StandIn, copy_module_tree
from toolkit.split.prefix import Prefix


class JoinedModel:
    """Joins prefix and suffix to a whole model. It is no module, so that no engine looks into it.

    Args:
        model: the whole model, its mask already applied, before an engine has its parameters.
        anatomy: its parts.
        boundary: b, where it is cut; none where it is kept whole.
    """

    def __init__(self, model: PreTrainedModel, anatomy: Anatomy, boundary: int | None) -> None:
        blocks = [f"{anatomy.blocks}.{index}" for index in range(boundary or 0)]
        self._below = [] if boundary is None else [*anatomy.embeddings, *blocks]
        stands: dict[nn.Module, nn.Module] = {(old := model.get_submodule(name)): StandIn(old) for name in self._below}
        self._frame = copy_module_tree(model, stands)

    @contextmanager
    def joined(self, prefix: Prefix | None) -> Iterator[PreTrainedModel]:
        """Provide the whole model without dropout; it needs its prefix if it was cut."""
        frame = self._frame
        stands = {name: frame.get_submodule(name) for name in self._below}
        training = prefix.training if prefix is not None else False
        try:
            for name in stands:
                assert prefix is not None
                frame.set_submodule(name, prefix.model.get_submodule(name))
            device = next(p.device for p in self._frame.parameters() if not p.is_meta)
            for module in frame.modules():
                for name, buffer in module.named_buffers(recurse=False):
                    module._buffers[name] = buffer.to(device)
            frame.eval()
            yield frame
        finally:
            for name, stand in stands.items():
                frame.set_submodule(name, stand)
            if prefix is not None:
                prefix.train(training)
