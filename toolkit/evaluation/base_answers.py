"""The everyday prompts that come with Frostline, and a base's own answers to them, which are generated once a model."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from toolkit.data.examples import Encoder
from toolkit.evaluation.outputs import Asked, generate_answers
from toolkit.inference.open_model import OpenedModel
from toolkit.models.float32_gradients import use_faster_forward
from toolkit.models.identity import config_values, module_classes, remote_code
from toolkit.models.weight_fingerprint import fingerprint
from toolkit.runtime.cache_root import cache_root
from toolkit.runtime.distributed import World
from toolkit.runtime.paths import replace_text
from toolkit.runtime.privacy import make_directory
from toolkit.runtime.shipped import shipped_file
from toolkit.tasks.sample import Sample, ask

log = logging.getLogger("frostline")

PROMPTS = "evaluation/everyday_prompts.jsonl"
"""Lines of topic, language and prompt: 30 Korean and 30 English ones."""
MAX_LENGTH = 2048
"""Longest prompt in tokens, whatever a run's ``data.max_length`` is."""


def everyday_prompts() -> list[str]:
    """Return the prompts in their order."""
    lines = shipped_file(PROMPTS).read_text(encoding="utf-8").splitlines()
    return [str(json.loads(line)["prompt"]) for line in lines]


def base_answers(opened: OpenedModel, prompts: Sequence[str], asked: Asked) -> list[str]:
    """Return a model's greedy answers to prompts, each asked alone: from the cache, or generated and kept there.

    A file of the cache is that of one model: of the same weights and precision, the same prompts as its chat template
    renders them, and the same settings of generation. One that is damaged is made again.
    """
    samples = [ask(prompt) for prompt in prompts]
    key = _key(opened, samples, asked.max_new_tokens)
    path = cache_root() / "base_answers" / f"{key}.json"
    if (answers := _read(path, key, len(samples))) is not None:
        log.info("the base's answers to %d everyday prompts are those in %s", len(samples), path)
        return answers
    world = World()
    use_faster_forward(opened.loaded.model.to(world.device), world.device)
    answers = generate_answers(opened, samples, asked, MAX_LENGTH)
    try:
        make_directory(path.parent)
        replace_text(path, json.dumps(_content(key, answers), ensure_ascii=False, indent=1) + "\n", 0o600)
    except OSError as error:
        log.warning("%s cannot be written (%s): the base's answers will be generated again", path, error.strerror)
    return answers


def _key(opened: OpenedModel, samples: Sequence[Sample], max_new_tokens: int) -> str:
    """Return what names the answers of a model: 64 hex digits."""
    loaded = opened.loaded
    encoder = Encoder(loaded.tokenizer, MAX_LENGTH, loaded.ends, opened.rendering)
    settings = {**loaded.model.generation_config.to_dict(), "transformers_version": None}
    parts = [
        fingerprint(loaded.model, loaded.on_disk), str(loaded.model.dtype), max_new_tokens, encoder.stop_ids(),
        [encoder.prompt_ids(sample) for sample in samples], settings, config_values(loaded.model.config),
        remote_code(module_classes(loaded.model)),
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def _content(key: str, answers: Sequence[str]) -> dict[str, Any]:
    digest = hashlib.sha256(json.dumps(list(answers)).encode()).hexdigest()
    return {"model": key, "sha256": digest, "answers": list(answers)}


def _read(path: Path, key: str, count: int) -> list[str] | None:
    """Return the answers in a file; None if there is none, or it is damaged or another model's, which is logged."""
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        answers = [str(answer) for answer in found["answers"]]
        if len(answers) == count and found == _content(key, answers):
            return answers
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        pass
    log.warning("%s is damaged, or another model's: the base's answers are generated again", path)
    return None
