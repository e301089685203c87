"""Load a causal language model and its tokenizer from a Hub id, a directory, or the bundled package."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
from transformers import AutoTokenizer, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from toolkit.config.schema import ModelConfig
from toolkit.models.added_tokens import add_token_rows, add_tokens, token_ids, write_tokens
from toolkit.models.anatomy import Anatomy
from toolkit.models.anatomy_detection import detect_anatomy
from toolkit.models.bundled import bundled_directory
from toolkit.models.checkpoint_contents import check_contents
from toolkit.models.directory import IS_ADAPTER, check_directory
from toolkit.models.disk_offload import OnDisk, detach_offloaded, device_map, silence_accelerate
from toolkit.models.exaone import ExaoneFormat, is_exaone
from toolkit.models.generation_file import check_generation_file
from toolkit.models.quirks import turn_off_layerdrop
from toolkit.models.rotary import make_rotary_per_sample
from toolkit.models.source_files import SourceFiles, config_levels
from toolkit.models.storage_format import StorageFormat
from toolkit.models.weight_files import StoredTensors, WeightComparison
from toolkit.runtime import hub
from toolkit.runtime.cache_root import cache_root
from toolkit.runtime.errors import FrostlineError, ModelError
from toolkit.runtime.out_of_memory import is_out_of_memory
from toolkit.runtime.paths import is_directory
from toolkit.runtime.rust_panic import explain_panic

log = logging.getLogger("frostline")

Dtype = Literal["bfloat16", "float16", "float32"]
"""A precision that a model can be stored in."""


@dataclass(frozen=True)
class LoadedModel:
    """A model in the precision of the recipe, on the CPU, with its tokenizer and its parts."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    anatomy: Anatomy
    storage_format: StorageFormat
    """Format that it was read from and is written back in."""
    on_disk: Mapping[str, OnDisk] = field(default_factory=dict)
    """Parameters that stay in their files, by name; in the model they are on the meta device."""
    ends: tuple[int, ...] = ()
    """End-of-text tokens that the model's config files name."""

    def save(self, directory: Path, ends: Collection[int] = ()) -> WeightComparison:
        """Write model and tokenizer in the format that they were read from; see ``StorageFormat.write``."""
        comparison = self.storage_format.write(self.model, self.tokenizer, directory, ends)
        if self.anatomy.added:
            write_tokens(self.tokenizer, directory)
        return comparison


def load(
    config: ModelConfig,
    tokenizer: PreTrainedTokenizerBase | None = None,
    anatomy: Anatomy | None = None,
    blocks_on_disk: int = 0,
) -> LoadedModel:
    """Load the model and tokenizer that ``config`` names.

    Tables get rows for ``config.add_tokens``, which a given ``tokenizer`` has already; it may have more. Weights are
    read from safetensors only: pickled checkpoints can run code. Those of the first ``blocks_on_disk``
    blocks stay in their files if ``anatomy`` says which they are.

    Raises:
        ModelError: nothing of that name, no safetensors, weights missing from the checkpoint, quantised weights, or
            not a causal language model; or as ``add_tokens`` and ``add_token_rows``.
    """
    source = resolve_source(config.name_or_path)
    tokenizer = tokenizer or load_tokenizer(config)
    added = token_ids(tokenizer, config.add_tokens)
    on_disk: dict[str, OnDisk] = {}
    if anatomy is not None and blocks_on_disk:
        model, storage_format, on_disk = _load_with_blocks_on_disk(source, config, anatomy, blocks_on_disk)
    else:
        model, storage_format = _load_weights(source, config, {})
    turn_off_layerdrop(model)
    make_rotary_per_sample(model)
    model.config.use_cache = False  # a key-value cache serves generation, not training
    if added:
        add_token_rows(model, added)
    anatomy = anatomy or replace(detect_anatomy(model), added=added)
    return LoadedModel(model, tokenizer, anatomy, storage_format, on_disk, storage_format.files.end_tokens())


def load_tokenizer(config: ModelConfig, directory: Path | None = None) -> PreTrainedTokenizerBase:
    """Load the model's tokenizer, or that in ``directory``, with ``config.add_tokens`` and one chat template at most.

    A missing padding token falls back to the end-of-text token, and a missing template to chat_template.json, which
    transformers reads for processors alone.

    Raises:
        ModelError: there is none, it has no end-of-text token, or several templates and none that is the default.
    """
    source = str(directory) if directory else resolve_source(config.name_or_path)
    try:
        options = {} if directory else _choose_format(source, config).tokenizer_options()
        with explain_panic(), hub.downloads(source):
            tokenizer = AutoTokenizer.from_pretrained(source, **options)
    except Exception as error:  # as for the weights
        if isinstance(error, FrostlineError) or is_out_of_memory(error):
            raise
        raise ModelError(
            explain_hub_error(source, error)
            or f"{source} (model.name_or_path): its tokenizer or config.json cannot be read. {_one_line(error)}"
        ) from None
    tokenizer.chat_template = _choose_chat_template(tokenizer, source, config)
    if tokenizer.eos_token is None:
        raise ModelError(
            f"the tokenizer of {source} has no end-of-text token (eos_token); set one in its tokenizer_config.json"
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if config.add_tokens:
        add_tokens(tokenizer, config.add_tokens)
    return tokenizer


def _choose_chat_template(tokenizer: PreTrainedTokenizerBase, source: str, config: ModelConfig) -> str | None:
    """Choose the tokenizer's one chat template, or that in chat_template.json; None if there is neither."""
    templates: str | dict[str, str] | None = tokenizer.chat_template
    if not templates:
        try:
            templates = SourceFiles(source, config.revision).chat_template_json()
        except (OSError, ValueError) as error:
            raise ModelError(f"model.name_or_path {source!r} cannot be loaded. {_one_line(error)}") from None
        if templates:
            log.info("%s: the chat template is that in its chat_template.json", source)
    if not isinstance(templates, dict):
        return templates
    if len(templates) == 1:
        return next(iter(templates.values()))
    names = ", ".join(sorted(templates))
    if "default" not in templates:
        raise ModelError(
            f"the tokenizer of {source} has {len(templates)} chat templates ({names}) and none named default; name "
            'the one to use "default" in its tokenizer_config.json or additional_chat_templates'
        )
    log.info("%s: of its chat templates (%s) the one named default is used", source, names)
    return templates["default"]


def end_tokens_of(config: ModelConfig) -> tuple[int, ...]:
    """Return the end-of-text tokens that the model's config files name; its weights need not be there.

    Raises:
        ModelError: as ``resolve_source``.
    """
    return SourceFiles(resolve_source(config.name_or_path, needs_weights=False), config.revision).end_tokens()


def stored_dtype(name: str, revision: str | None = None) -> Dtype:
    """Return the precision that config.json says the weights are stored in; bfloat16 if it does not say.

    Raises:
        ModelError: as ``resolve_source``.
    """
    try:
        values, _ = PretrainedConfig.get_config_dict(resolve_source(name), revision=revision)
    except OSError:
        values = {}  # ``load`` says what is wrong with it
    for level in config_levels(values):
        dtype = str(level.get("dtype") or level.get("torch_dtype")).removeprefix("torch.")
        if dtype in get_args(Dtype):
            return cast(Dtype, dtype)
    return "bfloat16"


def resolve_source(name: str, needs_weights: bool = True) -> str:
    """Resolve ``model.name_or_path`` to a directory or Hub id that transformers understands.

    With ``needs_weights`` False a directory with a config.json alone will do.

    Raises:
        ModelError: neither a directory, nor shaped like a Hub id, nor a bundled model; or a directory that cannot, or
            must not, be loaded (see ``toolkit.models.directory``).
    """
    if name.startswith("bundled:"):
        return str(bundled_directory(name))
    if name and is_directory(name):
        check_directory(Path(name), needs_weights)
        return name
    if not hub.is_hub_id(name, may_be_bare=True):
        raise ModelError(
            f"model.name_or_path {name!r} is not an existing directory"
            + (f", although {Path(name).parent}/ is one" if name and is_directory(Path(name).parent) else "")
            + "; expected that, a Hub id (org/name) or bundled:NAME"
        )
    hub.set_limits()
    return name


def is_exaone_source(source: str, config: ModelConfig) -> bool:
    """Return True if ``source`` is an EXAONE 3.x model, which is loaded as the equivalent Llama.

    Raises:
        ModelError: the model has no readable config.
    """
    try:
        with hub.downloads(source):
            return is_exaone(source, config.revision) and not config.trust_remote_code
    except (OSError, ValueError) as error:
        text = " ".join(str(error).split())[:400]
        raise ModelError(
            explain_hub_error(source, error) or f"model.name_or_path {source!r}: no readable config.json. {text}"
        ) from None


def explain_hub_error(source: str, error: BaseException) -> str | None:
    """Return a message for the user if the Hub or the network caused ``error``; None if the model did."""
    return None if is_directory(source) else hub.explain(error, source)


def _choose_format(source: str, config: ModelConfig) -> StorageFormat:
    """Choose how the source is read: as EXAONE 3.x, or by transformers."""
    if is_exaone(source, config.revision) and not config.trust_remote_code:
        return ExaoneFormat(source, config.revision)
    return StorageFormat(source, config.revision, config.trust_remote_code)


def _load_with_blocks_on_disk(
    source: str, config: ModelConfig, anatomy: Anatomy, blocks_on_disk: int
) -> tuple[PreTrainedModel, StorageFormat, dict[str, OnDisk]]:
    """Load all but the first blocks; accelerate writes those whose stored layout or dtype differs into files first."""
    root = cache_root()
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".offload-", dir=root) as folder:
        options = {"device_map": device_map(anatomy, blocks_on_disk), "offload_folder": folder}
        with silence_accelerate():
            model, storage_format = _load_weights(source, config, options)
        # the files are mapped: they stay readable when the folder is deleted
        return model, storage_format, detach_offloaded(model)


def _load_weights(source: str, config: ModelConfig, extra: dict[str, Any]) -> tuple[PreTrainedModel, StorageFormat]:
    """Load the model with ``extra`` arguments of ``from_pretrained``; refuse an incomplete or quantised checkpoint."""
    options: dict[str, Any] = {
        "dtype": getattr(torch, config.dtype),
        "attn_implementation": config.attn_implementation,
        "use_safetensors": True,
        "output_loading_info": True,
        **extra,
    }
    try:
        storage_format = _choose_format(source, config)
        if storage_format.files.find("adapter_config.json"):  # transformers would load the base that it names
            raise ModelError(f"{source} (model.name_or_path) {IS_ADAPTER}")
        with hub.downloads(source):
            check_generation_file(storage_format.files)
            model, info = storage_format.read(options)
    except Exception as error:  # a damaged config or checkpoint makes transformers raise anything
        if isinstance(error, FrostlineError) or is_out_of_memory(error):
            raise
        raise ModelError(
            explain_hub_error(source, error) or f"model.name_or_path {source!r} cannot be loaded. {_one_line(error)}"
        ) from None
    stored = StoredTensors(storage_format.files)
    check_contents(model, stored, storage_format.model_names(model, stored), source)
    if missing := sorted(info["missing_keys"]):
        raise ModelError(
            f"{source} lacks {len(missing)} tensors of {type(model).__name__} ({', '.join(missing[:3])} …); "
            "they would start at random. Expected a complete checkpoint"
        )
    return model, storage_format


def _one_line(error: BaseException) -> str:
    """Return an error's message in one line of at most 400 characters, after its type if that is unusual."""
    text = " ".join(str(error).split())
    if not isinstance(error, (OSError, ValueError)):
        text = f"{type(error).__name__}: {text}"
    return text if len(text) <= 400 else f"{text[:400]}…"
