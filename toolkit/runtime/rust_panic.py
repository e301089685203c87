"""Turn a panic of a library in Rust, which is no ``Exception``, into an error of the model whose file caused it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from toolkit.runtime.errors import ModelError


def is_panic(error: BaseException) -> bool:
    """Return whether PyO3 raised it for a panic: its class derives from BaseException and has no public name."""
    return type(error).__name__ == "PanicException" and type(error).__module__ == "pyo3_runtime"


def panic_error(error: BaseException) -> ModelError:
    """Return the error for a panic."""
    text = " ".join(str(error).split())[:300]
    return ModelError(
        f"the tokenizers library ended in a panic ({text}): a file of the tokenizer, such as tokenizer.json, asks for "
        "what it cannot do. Restore the tokenizer's files"
    )


@contextmanager
def explain_panic() -> Iterator[None]:
    """Raise ModelError for a panic of the body."""
    try:
        yield
    except BaseException as error:
        if is_panic(error):
            raise panic_error(error) from None
        raise
