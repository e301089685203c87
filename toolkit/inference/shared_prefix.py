"""Answer several tasks about one note: the tokens that their prompts begin with alike pass the frozen blocks once.

A causal model's hidden states at a token are a function of the tokens up to it. Below the lowest frost line of all
tasks the blocks are the same, so what they compute of the common leading tokens is too: keys and values of every block
there, and the hidden states that enter the first block above. Each task goes on from these.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel

from toolkit.data.model_limits import padding_id
from toolkit.inference.answering import LOW_PRECISION_TOLERANCE, PADDING_TOLERANCE, Answerer, next_logits
from toolkit.models.anatomy import Anatomy
from toolkit.runtime.out_of_memory import explain_out_of_memory
from toolkit.split.module_tree import StopForward, entry_name, hidden_of
from toolkit.tasks.sample import Sample

log = logging.getLogger("frostline")


class SharedPrefix:
    """Answers samples of one note by several answerers, whose models are alike below block ``boundary``.

    ``boundary`` is the lowest frost line of them all; 0 shares nothing. So does a model that does not give the same
    logits in this way, which the first note shows and the log says.
    """

    def __init__(self, answerers: Mapping[str, Answerer], boundary: int) -> None:
        self._answerers, self._boundary = answerers, boundary
        self._exact: bool | None = None if boundary > 0 else False
        self.shared_tokens = 0
        """Tokens, of all notes, that passed the frozen blocks once for all tasks."""

    def answer(self, samples: Mapping[str, Sample], row: int) -> dict[str, str]:
        """Return each answerer's answer to its own sample of a note, which is row ``row``.

        Raises:
            QuestionError, ModelError, UsageError: as ``Answerer.batches``.
        """
        prompts = {name: answerer.prompt(samples[name], row) for name, answerer in self._answerers.items()}
        note = self.begin({name: prompt.ids for name, prompt in prompts.items()})
        return {
            name: answerer.answer_prompt(prompts[name], row, note.cache(name, prompts[name].ids))
            for name, answerer in self._answerers.items()
        }

    def begin(self, ids: Mapping[str, Sequence[int]]) -> SharedNote:
        """Run what prompts over one note, token ids by the names of their answerers, have in common."""
        common = common_length(list(ids.values())) if ids else 0
        if self._exact is None and common:
            self._exact = self._first_is_exact(ids, common)
        start = None
        if self._exact and common:
            start = self._start(next(iter(ids.values()))[:common])
            self.shared_tokens += common
        return SharedNote(start, self._cache)

    def _start(self, ids: Sequence[int]) -> _Start:
        """Run the common tokens through the shared blocks."""
        loaded = next(iter(self._answerers.values())).loaded
        with explain_out_of_memory("generation", f"1 x {len(ids)} tokens", "shorter notes"):
            return run_prefix(loaded.model, loaded.anatomy, self._boundary, ids)

    def _cache(self, name: str, start: _Start) -> DynamicCache:
        """Run the common tokens through a task's own blocks, and return keys and values of all blocks."""
        loaded = self._answerers[name].loaded
        with explain_out_of_memory("generation", f"1 x {start.ids.shape[1]} tokens", "shorter notes"):
            return continue_prefix(loaded.model, loaded.anatomy, self._boundary, start)

    def _first_is_exact(self, ids: Mapping[str, Sequence[int]], common: int) -> bool:
        """Return whether each prompt of a note has the same next token after the shared prefix; log it if not."""
        if any(answerer.loaded.model._is_stateful for answerer in self._answerers.values()):
            log.info("this model keeps a state in place of keys and values: each task reads the note by itself")
            return False
        try:
            start = self._start(next(iter(ids.values()))[:common])
            exact = all(self._is_exact(name, ids[name], start) for name in ids)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError, TypeError, AttributeError, IndexError) as error:
            log.debug("shared prefix: %s", error)  # of a model's own code, which cannot go on from such a cache
            exact = False
        if not exact:
            log.info("this model does not give the same after a shared prefix: each task reads the note by itself")
        return exact

    def _is_exact(self, name: str, ids: Sequence[int], start: _Start) -> bool:
        """Return whether the logits after a prompt are those without the shared prefix, but for rounding."""
        loaded = self._answerers[name].loaded
        pad_id = padding_id(loaded.tokenizer, loaded.model)
        alone = next_logits(loaded.model, ids, pad_id)
        options = {"past_key_values": self._cache(name, start), "cache_implementation": None}
        after = next_logits(loaded.model, ids, pad_id, **options)
        most = PADDING_TOLERANCE.get(loaded.model.dtype, LOW_PRECISION_TOLERANCE) * float(alone.abs().max())
        return float((after - alone).abs().max()) <= most


class SharedNote:
    """Holds what the common tokens of one note gave; each task goes on from it, as often as it is asked."""

    def __init__(self, start: _Start | None, run: Callable[[str, _Start], DynamicCache]) -> None:
        self._start, self._run = start, run
        self._ids = () if start is None else tuple(start.ids[0].tolist())
        self._caches: dict[str, DynamicCache] = {}

    def cache(self, name: str, ids: Sequence[int]) -> DynamicCache | None:
        """Return keys and values of the common tokens for a prompt that goes on from them; None for another prompt."""
        if self._start is None or len(ids) <= len(self._ids) or tuple(ids[: len(self._ids)]) != self._ids:
            return None
        if name not in self._caches:
            self._caches[name] = self._run(name, self._start)
        cache = copy.copy(self._caches[name])
        cache.layers = [copy.copy(layer) for layer in cache.layers]  # updates make new tensors, not longer ones
        return cache


class _Start:
    """Holds what the shared blocks give of common tokens."""

    def __init__(self, ids: torch.Tensor, hidden: torch.Tensor, cache: DynamicCache, forms: list[int | None]) -> None:
        self.ids, self.hidden, self.cache = ids, hidden, cache
        self.forms = forms
        """Number of outputs of each shared block; None for one that returns a bare tensor."""


def common_length(prompts: Sequence[Sequence[int]]) -> int:
    """Return how many leading tokens all prompts share, at least one less than the shortest has."""
    most = min(map(len, prompts)) - 1
    return next((at for at in range(most) if len({prompt[at] for prompt in prompts}) > 1), most)


@torch.no_grad()
def run_prefix(model: PreTrainedModel, anatomy: Anatomy, boundary: int, ids: Sequence[int]) -> _Start:
    """Run token ids through the embeddings and blocks 0 … ``boundary`` - 1 of a model, keeping keys and values."""
    blocks = list(model.get_submodule(anatomy.blocks).children())[:boundary]
    tokens = torch.tensor([list(ids)], device=model.device)
    cache, forms = DynamicCache(config=model.config), list[int | None]()

    def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        raise StopForward(args, kwargs)

    def note(module: nn.Module, args: Any, output: Any) -> None:
        forms.append(len(output) if isinstance(output, tuple | list) else None)

    entry = model.get_submodule(entry_name(anatomy, boundary))
    handles = [entry.register_forward_pre_hook(stop, with_kwargs=True)]
    handles += [block.register_forward_hook(note) for block in blocks]
    try:
        model.base_model(input_ids=tokens, past_key_values=cache, use_cache=True)
    except StopForward as end:
        return _Start(tokens, hidden_of(*end.call), cache, forms)
    finally:
        for handle in handles:
            handle.remove()
    raise RuntimeError("the prefix never reached the frost line")


@torch.no_grad()
def continue_prefix(model: PreTrainedModel, anatomy: Anatomy, boundary: int, start: _Start) -> DynamicCache:
    """Run the blocks from ``boundary`` on over what ``run_prefix`` gave; return a cache with all blocks' tokens."""
    blocks = list(model.get_submodule(anatomy.blocks).children())[:boundary]
    cache = DynamicCache(config=model.config)
    with _passed_by(blocks, start):
        model.base_model(input_ids=start.ids, past_key_values=cache, use_cache=True)
    shared = [copy.copy(layer) for layer in start.cache.layers[:boundary]]  # updates make new tensors, not longer ones
    cache.layers[:boundary] = shared
    return cache


@contextmanager
def _passed_by(blocks: Sequence[nn.Module], start: _Start) -> Iterator[None]:
    """Have blocks return the hidden states of ``start`` without computing anything."""

    def forward_of(outputs: int | None) -> Any:
        result = start.hidden if outputs is None else (start.hidden, *(None,) * (outputs - 1))
        return lambda *args, **kwargs: result

    before = [vars(block).get("forward") for block in blocks]
    for block, outputs in zip(blocks, start.forms, strict=True):
        vars(block)["forward"] = forward_of(outputs)
    try:
        yield
    finally:
        for block, own in zip(blocks, before, strict=True):
            del vars(block)["forward"]
            if own is not None:
                vars(block)["forward"] = own
