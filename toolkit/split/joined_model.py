"""Join prefix and suffix to one model again, for generation.

Generation needs both halves with their key-value caches, which transformers manages for whole models only. Nothing is
copied: the parameters above the frost line are those that train, and the blocks below it are the prefix's own, for as
long as they are loaded.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from transformers import PreTrainedModel

from toolkit.models.anatomy import Anatomy
from toolkit.models.probe import evaluation_mode
from toolkit.split.module_tree import Placeholder, copy_module_tree
from toolkit.split.prefix import Prefix


class JoinedModel:
    """A copy of the model that shares the suffix's parameters and borrows the prefix's modules to generate.

    It is no ``nn.Module``, so that no engine wraps its parameters, and made of ``model`` before an engine does. The
    model is cut below block ``boundary``; None if it is not cut.
    """

    def __init__(self, model: PreTrainedModel, anatomy: Anatomy, boundary: int | None) -> None:
        blocks = [f"{anatomy.blocks}.{index}" for index in range(boundary or 0)]
        self._prefix_modules = [] if boundary is None else [*anatomy.embeddings, *blocks]
        originals = map(model.get_submodule, self._prefix_modules)
        self._model = copy_module_tree(model, {original: Placeholder(original) for original in originals})

    @contextmanager
    def with_prefix(self, prefix: Prefix | None) -> Iterator[PreTrainedModel]:
        """Yield the whole model in evaluation mode, with the modules of ``prefix``; None if the model was not cut.

        On leaving, the placeholders of these modules are put back and their training mode is restored.
        """
        model = self._model
        placeholders = {name: model.get_submodule(name) for name in self._prefix_modules}
        try:
            for name in placeholders:
                assert prefix is not None
                model.set_submodule(name, prefix.model.get_submodule(name))
            device = next(p.device for p in model.parameters() if not p.is_meta)
            for module in model.modules():
                for name, buffer in module.named_buffers(recurse=False):
                    module._buffers[name] = buffer.to(device)
            with evaluation_mode(model):
                yield model
        finally:
            for name, placeholder in placeholders.items():
                model.set_submodule(name, placeholder)
