"""Exports of many model types with weights as training leaves them, and a reader of them in another process."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path
from typing import Any

import torch
from helpers import make_tokenizer
from zoo import make

from toolkit.config.schema import MaskConfig, ModelConfig
from toolkit.mask.apply import apply_mask, trainable_parameters
from toolkit.mask.layer_mask import build_mask
from toolkit.models.load import LoadedModel, load
from toolkit.runtime.errors import MaskError

IDS = torch.randint(3, 60, (2, 24), generator=torch.Generator().manual_seed(2))

READER = """
import json, sys, warnings; warnings.filterwarnings("ignore")
import torch, transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
transformers.logging.set_verbosity(60)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as known
ids = torch.tensor(json.loads(sys.argv[2]))
found = {"version": transformers.__version__}
for directory in sys.argv[3:]:
    kind = json.load(open(directory + "/config.json"))["model_type"]
    if kind not in known:
        found[directory] = "unknown"
        continue
    try:
        AutoTokenizer.from_pretrained(directory)
        model = AutoModelForCausalLM.from_pretrained(directory, torch_dtype=torch.float32).eval()
        with torch.no_grad():
            found[directory] = model(input_ids=ids, use_cache=False).logits
    except Exception as error:
        found[directory] = type(error).__name__ + ": " + " ".join(str(error).split())[:200]
torch.save(found, sys.argv[1])
"""
"""A program for any version of transformers: where to, token ids, and the directories of models."""

ADAPTER_READER = """
import json, sys, warnings; warnings.filterwarnings("ignore")
import torch, transformers
from peft import PeftModel
from transformers import AutoModelForCausalLM
transformers.logging.set_verbosity(60)
ids = torch.tensor(json.loads(sys.argv[2]))
found = {"version": transformers.__version__}
for directory in sys.argv[3:]:
    for form in ("base", "merged", "adapter"):
        source = directory + ("/merged" if form == "merged" else "/base")
        model = AutoModelForCausalLM.from_pretrained(source, torch_dtype=torch.float32)
        if form == "adapter":
            model = PeftModel.from_pretrained(model, directory + "/adapter")
        with torch.no_grad():
            found[directory, form] = model.eval()(input_ids=ids, use_cache=False).logits
torch.save(found, sys.argv[1])
"""
"""The same with folders that hold a base, a merged export and peft's directory of adapters."""


def make_base(directory: Path, name: str, tokenizer: Path) -> Path:
    """A model directory as transformers 5 saves it, with rotary bases that are no default."""
    model = make(name)
    rotary = getattr(model.config, "rope_parameters", None) or {}
    for settings in [each for each in rotary.values() if isinstance(each, dict)] or [rotary]:
        if settings.get("rope_theta"):
            settings["rope_theta"] = settings["rope_theta"] / 7 + 3
    model.save_pretrained(directory)
    shutil.copytree(tokenizer, directory, dirs_exist_ok=True)
    return directory


def as_if_trained(base: Path) -> LoadedModel:
    """The model with the last two blocks and an untied head changed, as far as its type allows."""
    loaded = load(ModelConfig(name_or_path=str(base), dtype="float32"))
    for train in (["last:2", "head"], ["last:2"], ["blocks:1,3"]):
        with contextlib.suppress(MaskError):
            mask = build_mask(MaskConfig(train=list(train), tied="untie"), loaded.anatomy)
            break
    apply_mask(loaded.model, mask, loaded.anatomy)
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in trainable_parameters(loaded.model, mask).values():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return loaded


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model.eval()(input_ids=IDS, use_cache=False).logits
    return logits


def save_tokenizer(directory: Path) -> Path:
    """The files of a tokenizer as transformers 5 saves them."""
    make_tokenizer().save_pretrained(directory)
    return directory
