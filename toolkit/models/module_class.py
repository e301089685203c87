"""Extend the class of a single module."""

from __future__ import annotations

from torch import nn


def extend_class(module: nn.Module, extension: type[nn.Module]) -> None:
    """Put the methods of ``extension`` before those of the module's class; its parameters keep their names."""
    original_class = type(module)
    module.__class__ = type(f"{extension.__name__}{original_class.__name__}", (extension, original_class), {})


def extended_class(module: nn.Module, extension: type[nn.Module]) -> type[nn.Module]:
    """Return the class that ``extend_class`` put ``extension`` before; the module's own if it did not."""
    own = type(module)
    return next((each.__bases__[-1] for each in own.__mro__ if extension in each.__bases__[:-1]), own)


def restore_class(module: nn.Module, extension: type[nn.Module]) -> None:
    """Take the methods of ``extension`` away again, if the module has them."""
    module.__class__ = extended_class(module, extension)
