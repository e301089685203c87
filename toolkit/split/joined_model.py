"""Join the prefix and the trained suffix to a whole model again, for generation.

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
    """Joins prefix and suffix to a whole model. It is no ``nn.Module``, so that no engine wraps its parameters.

    Args:
        model: the whole model with its mask applied, before an engine wraps its parameters.
        anatomy: parts of ``model``.
        boundary: b, the block that it is cut below; None if it is not cut.
    """

    def __init__(self, model: PreTrainedModel, anatomy: Anatomy, boundary: int | None) -> None:
        blocks = [f"{anatomy.blocks}.{index}" for index in range(boundary or 0)]
        self._prefix_modules = [] if boundary is None else [*anatomy.embeddings, *blocks]
        stand_ins: dict[nn.Module, nn.Module] = {
            (original := model.get_submodule(name)): StandIn(original) for name in self._prefix_modules
        }
        self._model = copy_module_tree(model, stand_ins)

    @contextmanager
    def joined(self, prefix: Prefix | None) -> Iterator[PreTrainedModel]:
        """Yield the whole model in evaluation mode; the prefix is taken out of it again, in its own mode, on leaving.

        Args:
            prefix: the loaded prefix; None if the model was not cut.
        """
        model = self._model
        stand_ins = {name: model.get_submodule(name) for name in self._prefix_modules}
        training = prefix.training if prefix is not None else False
        try:
            for name in stand_ins:
                assert prefix is not None
                model.set_submodule(name, prefix.model.get_submodule(name))
            device = next(p.device for p in self._model.parameters() if not p.is_meta)
            for module in model.modules():
                for name, buffer in module.named_buffers(recurse=False):
                    module._buffers[name] = buffer.to(device)
            model.eval()
            yield model
        finally:
            for name, stand_in in stand_ins.items():
                model.set_submodule(name, stand_in)
            if prefix is not None:
                prefix.train(training)
