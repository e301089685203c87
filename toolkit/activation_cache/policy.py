"""Decide whether a run caches its prefix, name what makes that impossible, and open the store."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib import metadata
from pathlib import Path

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel

import toolkit
from toolkit.activation_cache.eviction import cache_writer
from toolkit.activation_cache.namespace import NAMESPACE_FILE, SHA256, Namespace, bytes_of
from toolkit.activation_cache.store import ActivationStore
from toolkit.config.policy import Decision, decide_cache
from toolkit.config.schema import PrefixConfig
from toolkit.data.batches import collate
from toolkit.data.examples import Example
from toolkit.data.rows import Rows
from toolkit.mask.layer_mask import LayerMask
from toolkit.models.float32_gradients import has_float32_forward
from toolkit.models.identity import config_values, module_classes, remote_code
from toolkit.models.load import LoadedModel
from toolkit.models.weight_fingerprint import fingerprint_of
from toolkit.runtime.cache_root import cache_root
from toolkit.runtime.distributed import World
from toolkit.runtime.own_files import is_real_file
from toolkit.runtime.paths import replace_text, sources_hash
from toolkit.runtime.privacy import is_shared_with_group
from toolkit.split.prefix import Prefix

log = logging.getLogger("frostline")

_SPLIT_CHECK = "split.json"
"""File of a namespace, written by ``save_split_check``."""

_PREFIX_SOURCES = ("data/batches.py", "models", "split", "frozen", "activation_cache")
"""Source files and folders of this package that determine what a prefix computes; part of the fingerprints."""


def mask_obstacle(mask: LayerMask) -> str | None:
    """Return why the prefix under this mask is no function of the data alone; None if it is one."""
    if not mask.has_prefix:
        return "nothing below the trained tensors is frozen"
    if mask.tied == "head_only":
        return "mask.tied is head_only: the embeddings move with every step"
    return None


def limit_obstacle(settings: PrefixConfig, size: int) -> str | None:
    """Return why samples of ``size`` bytes exceed ``prefix.cache_limit_gib``; None if they do not."""
    limit = settings.cache_limit_gib
    if limit is None or size <= limit * 2**30:
        return None
    return f"the samples need {format_size(size)}, prefix.cache_limit_gib allows {limit:g} GiB"


def has_dropout(model: nn.Module) -> bool:
    """Return whether a module has a dropout rate above 0: a guess for plans; runs try it (``uncacheable_reason``)."""
    rates = [value for module in model.modules() for name, value in vars(module).items() if "dropout" in name]
    rates += [module.p for module in model.modules() if isinstance(module, nn.Dropout)]
    return any(isinstance(rate, float) and rate > 0 for rate in rates)


def prefix_fingerprints(
    loaded: LoadedModel, boundary: int, settings: PrefixConfig, device: torch.device
) -> dict[str, str]:
    """Return, by name, everything that ``hidden[b]`` of a sample depends on beside its token ids; b is ``boundary``."""
    model, anatomy = loaded.model, loaded.anatomy
    modules_above = [f"{anatomy.blocks}.{index}." for index in range(boundary, anatomy.block_count)]
    modules_above += [f"{module}." for module in (anatomy.norm, anatomy.head) if module]
    below_boundary = {
        name: tensor
        for name, tensor in model.state_dict(keep_vars=True).items()
        if not name.startswith(tuple(modules_above))
    }
    config, code = config_values(model.config), remote_code(module_classes(model))
    sources = sources_hash(Path(toolkit.__file__).parent, *_PREFIX_SOURCES)
    is_quantised = settings.precision != "model" or any(name.endswith(".weight_codes") for name in below_boundary)
    return {
        "weights": fingerprint_of(below_boundary, loaded.on_disk),
        "config": hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest(),
        "architecture": type(model).__name__,
        "boundary": str(boundary),
        "attention": str(model.config._attn_implementation),
        "precision": settings.precision,
        "device": device.type,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "frostline": f"{toolkit.__version__} (sources {sources})",
        **({"bitsandbytes": metadata.version("bitsandbytes")} if is_quantised else {}),
        **({"code": json.dumps(code)} if code else {}),
        **({"products": "float32"} if has_float32_forward(model) else {}),
    }


def open_store(
    settings: PrefixConfig, fingerprints: Mapping[str, str], model: PreTrainedModel, world: World
) -> ActivationStore:
    """Open the store of the hidden states of the prefix with these ``prefix_fingerprints``; every rank calls it."""
    limit = settings.cache_limit_gib
    namespace = Namespace(fingerprints, int(model.config.get_text_config().hidden_size), model.dtype)
    limit_bytes = None if limit is None else int(limit * 2**30)
    is_shared = settings.share == "group"
    return ActivationStore(_root(settings), namespace, limit_bytes, writer=cache_writer(world), is_shared=is_shared)


def settings_of_a_run(settings: PrefixConfig) -> PrefixConfig:
    """Return the settings by which a run's cache is opened to evaluate it, whoever wrote the run.

    A directory that it names is used only if it is a cache already, else the default one; modes stay as they are.
    """
    if settings.cache_dir and not namespaces_of(settings):
        log.info("prefix.cache_dir of the run, %s, is no cache here; the default one is used", settings.cache_dir)
        settings = settings.model_copy(update={"cache_dir": None})
    is_shared = any(map(is_shared_with_group, (_root(settings), *namespaces_of(settings))))
    return settings.model_copy(update={"share": "group" if is_shared else None})


def _root(settings: PrefixConfig) -> Path:
    return Path(settings.cache_dir) if settings.cache_dir else cache_root() / "activations"


def namespaces_of(settings: PrefixConfig) -> list[Path]:
    """Return the directories of hidden states in a cache; none of what is no cache."""
    try:
        found = list(_root(settings).iterdir())
    except OSError:
        return []
    return [path for path in found if SHA256.fullmatch(path.name) and is_real_file(path / NAMESPACE_FILE)]


def save_split_check(store: ActivationStore, output_counts: Sequence[int | None]) -> None:
    """Save that the split is exact and the prefix deterministic, with ``Prefix.block_output_counts``.

    A later run whose samples are all stored then need not load the prefix. If the disk refuses, it checks again.
    """
    with suppress(OSError):
        replace_text(store.directory / _SPLIT_CHECK, json.dumps({"returned": list(output_counts)}), 0o600)


def read_split_check(store: ActivationStore) -> list[int | None] | None:
    """Return the output counts of a split that passed its checks; None if no such file can be read."""
    try:
        output_counts = json.loads((store.directory / _SPLIT_CHECK).read_text(encoding="utf-8"))["returned"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return output_counts if isinstance(output_counts, list) else None


def uncacheable_reason(prefix: Prefix, example: Example, store: ActivationStore, world: World) -> str | None:
    """Run the prefix on an example; return why its hidden states cannot be cached, or None if they can."""
    batch = collate([example], pad_id=0).to(world.device)
    rng_state = torch.get_rng_state()
    prefix.train()
    in_train_mode = [prefix(batch) for _ in range(2)]
    prefix.eval()
    in_eval_mode = prefix(batch)
    prefix.train()
    torch.set_rng_state(rng_state)
    if not all(torch.equal(hidden, in_eval_mode) for hidden in in_train_mode):
        return "the prefix gives other values each time (dropout or router noise)"
    width, dtype = in_eval_mode.shape[-1], in_eval_mode.dtype
    if (width, dtype) != (store.namespace.width, store.namespace.dtype):
        return f"the prefix gives {width} values of {dtype} a token, which its config does not say"
    return None


def decide(settings: PrefixConfig, examples: Sequence[Example], passes: float, store: ActivationStore) -> Decision:
    """Decide whether caching pays and fits, by ``toolkit.config.policy.decide_cache`` and what the store holds.

    ``examples`` are those of training and validation; ``passes`` are the epochs over the training rows while the mask
    stays the same.

    Raises:
        ConfigError: ``prefix.cache`` is ``on`` and the samples exceed the limit or the disk.
    """
    samples = Rows.of(examples).distinct()
    lengths, lacking = samples.lengths, store.lacking(samples.keys)
    missing = int(lacking.sum())
    width, dtype = store.namespace.width, store.namespace.dtype
    size = bytes_of(int(lengths.sum()), len(samples), width, dtype)
    new = bytes_of(int(lengths[lacking].sum()), missing, width, dtype)
    obstacle, room = limit_obstacle(settings, size), store.available_bytes()
    if obstacle is None and new > room:
        obstacle = f"{format_size(new)} are to be written to {store.directory}, which has room for {format_size(room)}"
    decision = decide_cache(settings, obstacle, passes, is_complete=not missing)
    if not decision.on:
        return decision
    there = f"{len(samples) - missing} of {len(samples)} samples are there"
    return Decision(True, f"{decision.reason}: {format_size(size)}, {there}, {store.directory}")


def format_size(count: float) -> str:
    """Format a number of bytes in GiB or MiB."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**29 else f"{count / 2**20:.1f} MiB"
