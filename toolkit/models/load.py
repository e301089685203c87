"""Load a causal language model and its tokenizer from a Hub id, a directory, or the bundled package."""

from __future__ import annotations

import hashlib
import logging
import tempfile
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import nn
from transformers import AutoTokenizer, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from toolkit.config.schema import ModelConfig
from toolkit.models.anatomy import Anatomy
from toolkit.models.anatomy_detection import detect_anatomy
from toolkit.models.bundled import bundled_directory, cache_root
from toolkit.models.checkpoint_contents import examine
from toolkit.models.directory import check_directory
from toolkit.models.disk_offload import OnDisk, detach_offloaded, device_map, silence_accelerate
from toolkit.models.end_tokens import model_ends
from toolkit.models.exaone import ExaoneFormat, is_exaone
from toolkit.models.quirks import turn_off_layerdrop
from toolkit.models.rotary import make_rotary_per_sample
from toolkit.models.source_files import SourceFiles
from toolkit.models.storage_format import StorageFormat, TransformersFormat
from toolkit.models.weight_files import Comparison, read_stored
from toolkit.runtime import hub
from toolkit.runtime.errors import FrostlineError, ModelError
from toolkit.runtime.out_of_memory import is_out_of_memory
from toolkit.runtime.paths import is_directory

log = logging.getLogger("frostline")

Dtype = Literal["bfloat16", "float16", "float32"]
"""A precision that a model can be stored in."""


@dataclass(frozen=True)
class LoadedModel:
    """A model in the precision of the recipe, on the CPU, with its tokenizer and its parts."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    anatomy: Anatomy
    form: StorageFormat
    """What it was read from and is written back as."""
    on_disk: Mapping[str, OnDisk] = field(default_factory=dict)
    """Parameters that were not loaded, by name; in the model they are on the meta device."""
    ends: tuple[int, ...] = ()
    """The tokens that end a text by the model's own account."""

    def save(self, directory: Path, ends: Collection[int] = ()) -> Comparison:
        """Write model and tokenizer into ``directory`` in the form they came in.

        Args:
            directory: is created.
            ends: tokens that end an answer, for generation_config.json.

        Returns:
            How the weights compare with the source's.

        Raises:
            OSError: the disk, or what is to be copied from the source.
        """
        return self.form.write(self.model, self.tokenizer, directory, ends)


def load(
    config: ModelConfig,
    tokenizer: PreTrainedTokenizerBase | None = None,
    anatomy: Anatomy | None = None,
    blocks_on_disk: int = 0,
) -> LoadedModel:
    """Load the model and tokenizer that ``config`` names.

    Weights are read from safetensors only: pickled checkpoints can run code.

    Args:
        config: the recipe's model section.
        tokenizer: if it is loaded already.
        anatomy: the model's parts, if they are known already.
        blocks_on_disk: that many blocks from the first on are not loaded; needs ``anatomy``.

    Raises:
        ModelError: nothing of that name, no safetensors, weights missing from the checkpoint, quantised weights, or
            not a causal language model.
    """
    source = resolve_source(config.name_or_path)
    tokenizer = tokenizer or load_tokenizer(config)
    if anatomy is not None and blocks_on_disk:
        model, form, on_disk = _load_upper_part(source, config, anatomy, blocks_on_disk)
    else:
        model, form = _load_weights(source, config, {})
        on_disk = {}
    turn_off_layerdrop(model)
    make_rotary_per_sample(model)
    model.config.use_cache = False  # a key-value cache serves generation, not training
    ends = model_ends(source, config.revision)
    return LoadedModel(model, tokenizer, anatomy or detect_anatomy(model), form, on_disk, ends)


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """Load the model's tokenizer with the one chat template that is used.

    Its padding token falls back to the end-of-text token; where it has no template, that in chat_template.json is
    taken, which transformers gives to processors alone.

    Raises:
        ModelError: there is none, it has no end-of-text token, or several templates and none that is the default.
    """
    source = resolve_source(config.name_or_path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **_form(source, config).tokenizer_options())
    except Exception as error:  # as for the weights
        if isinstance(error, FrostlineError) or is_out_of_memory(error):
            raise
        raise ModelError(
            hub_says(source, error)
            or f"{source} (model.name_or_path): its tokenizer or config.json cannot be read. {_first_lines(error)}"
        ) from None
    tokenizer.chat_template = _chat_template(tokenizer, source, config)
    if tokenizer.eos_token is None:
        raise ModelError(
            f"the tokenizer of {source} has no end-of-text token (eos_token); set one in its tokenizer_config.json"
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _chat_template(tokenizer: PreTrainedTokenizerBase, source: str, config: ModelConfig) -> str | None:
    found: str | dict[str, str] | None = tokenizer.chat_template
    if not found:
        try:
            found = SourceFiles(source, config.revision).chat_template_json()
        except (OSError, ValueError) as error:
            raise ModelError(f"model.name_or_path {source!r} cannot be loaded. {_first_lines(error)}") from None
        if found:
            log.info("%s: the chat template is that in its chat_template.json", source)
    if not isinstance(found, dict):
        return found
    name = "default" if "default" in found else next(iter(found))
    if name != "default" and len(found) > 1:
        raise ModelError(
            f"the tokenizer of {source} has {len(found)} chat templates ({', '.join(sorted(found))}) and none named "
            'default; name the one to use "default" in its tokenizer_config.json or additional_chat_templates'
        )
    if len(found) > 1:
        log.info("%s: of its chat templates (%s) the one named default is used", source, ", ".join(sorted(found)))
    return found[name]


def stored_dtype(name: str) -> Dtype:
    """Return the precision that the model is stored in by its config.json; bfloat16 where that is silent.

    Raises:
        ModelError: as ``resolve_source``.
    """
    try:
        values, _ = PretrainedConfig.get_config_dict(resolve_source(name))
    except OSError:
        values = {}  # ``load`` says what is wrong with it
    text = values.get("text_config")
    for level in (values, text if isinstance(text, dict) else {}):
        found = str(level.get("dtype") or level.get("torch_dtype")).removeprefix("torch.")
        if found in ("bfloat16", "float16", "float32"):
            return cast(Dtype, found)
    return "bfloat16"


def resolve_source(name: str, needs_weights: bool = True) -> str:
    """Return a directory or Hub id that transformers understands.

    Args:
        name: as the recipe has it.
        needs_weights: false accepts a directory that holds a config.json alone.

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


def hub_says(source: str, error: BaseException) -> str | None:
    """Return what to do about ``error`` where the Hub or the network failed, not the model."""
    return None if is_directory(source) else hub.explain(error, source)


def fingerprint(model: nn.Module, on_disk: Mapping[str, OnDisk] | None = None) -> str:
    """Hash name, dtype, shape and bytes of every parameter, tied ones once (SHA-256); identifies a base model.

    Args:
        model: with all its weights in their original precision, but for
        on_disk: those that were not loaded; each is read, and its memory given back, in turn.
    """
    return fingerprint_of(dict(model.named_parameters()), on_disk)


def fingerprint_of(tensors: Mapping[str, torch.Tensor], on_disk: Mapping[str, OnDisk] | None = None) -> str:
    """Hash name, dtype, shape and bytes of ``tensors`` in the order of their names; see ``fingerprint``."""
    elsewhere = on_disk or {}

    def digest(item: tuple[str, torch.Tensor]) -> bytes:
        name, tensor = item
        stored = elsewhere.get(name)
        if stored is not None:
            tensor = stored.read()
        sha = hashlib.sha256(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        sha.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        if stored is not None:
            stored.file.advise([stored.name], needed=False)
        return sha.digest()

    with ThreadPoolExecutor() as pool:
        digests = list(pool.map(digest, sorted(tensors.items())))
    return hashlib.sha256(b"".join(digests)).hexdigest()


def _form(source: str, config: ModelConfig) -> StorageFormat:
    if is_exaone(source, config.revision) and not config.trust_remote_code:
        return ExaoneFormat(source, config.revision)
    return TransformersFormat(source, config.revision, config.trust_remote_code)


def _load_upper_part(
    source: str, config: ModelConfig, anatomy: Anatomy, blocks_on_disk: int
) -> tuple[PreTrainedModel, StorageFormat, dict[str, OnDisk]]:
    """Load all but the first blocks; what a checkpoint holds in another form than the model's is written anew first."""
    root = cache_root()
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".offload-", dir=root) as folder:
        options = {"device_map": device_map(anatomy, blocks_on_disk), "offload_folder": folder}
        with silence_accelerate():
            model, form = _load_weights(source, config, options)
        return model, form, detach_offloaded(model)  # mapped: the folder's files stay readable without their names


def _load_weights(source: str, config: ModelConfig, more: dict[str, Any]) -> tuple[PreTrainedModel, StorageFormat]:
    options: dict[str, Any] = {
        "dtype": getattr(torch, config.dtype),
        "attn_implementation": config.attn_implementation,
        "use_safetensors": True,
        "output_loading_info": True,
        **more,
    }
    try:
        form = _form(source, config)
        model, info = form.read(options)
    except Exception as error:  # a damaged config or checkpoint makes transformers raise anything
        if isinstance(error, FrostlineError) or is_out_of_memory(error):
            raise
        raise ModelError(
            hub_says(source, error) or f"model.name_or_path {source!r} cannot be loaded. {_first_lines(error)}"
        ) from None
    stored = read_stored(form.files)
    examine(model, stored, form.targets(model, stored), source)
    if missing := sorted(info["missing_keys"]):
        raise ModelError(
            f"{source} lacks {len(missing)} tensors of {type(model).__name__} ({', '.join(missing[:3])} …); "
            "they would start at random. Expected a complete checkpoint"
        )
    return model, form


def _first_lines(error: BaseException) -> str:
    text = " ".join(str(error).split())
    if not isinstance(error, (OSError, ValueError)):
        text = f"{type(error).__name__}: {text}"
    return text if len(text) <= 400 else f"{text[:400]}…"
