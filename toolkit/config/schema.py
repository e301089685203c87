"""The recipe: every key of a run, typed, documented and bounded.

The docstring under a field is its help text; the defaults are the reference recipe (top four blocks and the
language-model head, bfloat16, AdamW at 1e-5, 10 % linear warmup, micro batch 1, 3 epochs, clipping at 1.0).
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from toolkit.config.data_schema import DataConfig as DataConfig
from toolkit.config.mask_schema import MaskConfig as MaskConfig
from toolkit.config.section import Section, is_none, switch
from toolkit.runtime.paths import is_directory


def _as_token_list(value: Any) -> Any:
    """Wrap a single token in a list; reject what is no text, is blank, or is there twice."""
    value = [value] if isinstance(value, str) else value
    for index, token in enumerate(value if isinstance(value, list) else ()):
        if not isinstance(token, str) or not token.strip():
            raise ValueError(f'{token!r} is no token; expected a text such as "<triage>"')
        if token in value[:index]:
            raise ValueError(f"{token!r} is there twice; expected each token once")
    return value


def _as_trackers(value: Any) -> Any:
    """Turn one name into a list, and none into an empty one; reject a name that is there twice."""
    names = [value] if isinstance(value, str) or value is None else value
    if isinstance(names, list) and len(names) == 1 and (names[0] is None or is_none(names[0])):
        return []
    for index, name in enumerate(names if isinstance(names, list) else ()):
        if name in names[:index]:
            raise ValueError(f"{name!r} is there twice; expected each tracker once")
    return names


class ModelConfig(Section):
    """Which model is tuned, and how it is loaded."""

    name_or_path: str = "bundled:smollm2-135m"
    """Hub id (org/name), local directory, or bundled:smollm2-135m."""

    revision: str | None = None
    """Branch, tag or commit of a Hub model; a full commit hash where trust_remote_code is on."""

    delta: str | None = None
    """Start from what an earlier run trained: the directory of a run, one of its checkpoints or an exported delta. Its
    tensors are laid onto the model; optimizer, schedule and row order begin anew, and the mask may be another."""

    add_tokens: Annotated[list[str], BeforeValidator(_as_token_list)] = Field(default=[])
    """Tokens to add to the tokenizer, each with a row in the embeddings and in the head that starts as the mean of the
    others; mask.train: {rows: {select: embeddings, from: added}} trains them (docs/rows.md)."""

    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Precision of the weights in the forward and backward pass; the optimizer's masters are always float32."""

    attn_implementation: Literal["eager", "sdpa", "flash_attention_2"] | None = None
    """Attention kernel; none lets transformers choose."""

    trust_remote_code: bool = False
    """Run Python code that ships with the model. Off unless you have read that code."""

    @model_validator(mode="after")
    def _require_pinned_revision(self) -> ModelConfig:
        """Require a full commit hash where code of a Hub model is run."""
        on_hub = re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", self.name_or_path) and not is_directory(self.name_or_path)
        if self.trust_remote_code and on_hub and not re.fullmatch(r"[0-9a-f]{40}", self.revision or ""):
            raise ValueError(
                f"trust_remote_code is on for {self.name_or_path}, but revision is {self.revision!r}; expected the "
                "full commit hash whose code you have read (40 hexadecimal digits)"
            )
        return self


class TrainConfig(Section):
    """The training loop."""

    epochs: Annotated[int, Field(ge=1)] = 3
    """Passes over the training rows."""

    max_steps: Annotated[int, Field(ge=1)] | None = None
    """Stop after this many optimizer steps, and plan the schedule for them; none runs all epochs."""

    micro_batch_size: Annotated[int, Field(ge=1)] = 1
    """Rows a rank computes at once."""

    gradient_accumulation_steps: Annotated[int, Field(ge=1)] = 1
    """Micro batches a rank adds up before one optimizer step."""

    micro_batch_tokens: Annotated[int, Field(ge=16)] | None = None
    """Cut a step into micro batches of up to so many tokens, padding included, instead of a number of rows: many short
    rows or few long ones. A step still takes micro_batch_size x gradient_accumulation_steps rows for each rank."""

    learning_rate: Annotated[float, Field(gt=0)] = 1e-5
    """Peak learning rate."""

    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    """Decoupled weight decay of AdamW (arXiv 1711.05101)."""

    warmup_ratio: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Share of all steps over which the learning rate rises linearly from 0."""

    scheduler: Literal["linear", "cosine", "constant_with_warmup"] = "linear"
    """Course of the learning rate after warmup; linear and cosine end at 0."""

    max_grad_norm: Annotated[float, Field(ge=0)] = 1.0
    """Clip the gradient to this global 2-norm; 0 does not clip."""

    max_skipped_steps: Annotated[int, Field(ge=1)] = 3
    """A step whose loss or gradient is NaN or infinite on any rank changes nothing and is skipped; stop the run after
    this many in a row."""

    metric_for_best_model: str = "loss"
    """What the best checkpoint is best by, and early stopping watches: the validation loss, or one of
    output.evaluate_metrics, the higher or the lower of which is better as the metric has it."""

    early_stopping_patience: Annotated[int, Field(ge=1)] | None = None
    """End the run once train.metric_for_best_model has not been better than before in so many validations in a row
    (output.evaluate_every_steps, and each epoch's end). The best has a checkpoint, which --step best takes; none trains
    to the end."""

    early_stopping_threshold: Annotated[float, Field(ge=0)] = 0.0
    """By how much it must be better to count."""

    gradient_checkpointing: Annotated[Literal["auto", "on", "off"], BeforeValidator(switch)] = "auto"
    """Recompute the trained blocks' activations in backward; auto does so when they would not fit in memory."""

    reduce_dtype: Literal["float32", "bfloat16"] | None = None
    """Precision in which several ranks sum their gradients; bfloat16 halves what they exchange and rounds every sum.
    None takes float32, and with --ds what the DeepSpeed file says, or else model.dtype (docs/deepspeed.md)."""

    seed: Annotated[int, Field(ge=0, lt=2**32)] = 42
    """Seed of the row order, the validation split and dropout."""


REMOVED_OPTIMIZER = "adamw_bf16"
"""Value of ``optim.name`` in earlier versions."""

OptimName = Literal["adamw", "adamw_8bit", "paged_adamw_8bit"]
"""How AdamW keeps its state."""


def _refuse_removed(name: Any) -> Any:
    """Refuse an optimizer of earlier versions, which ``recipe.read_saved`` reads in finished runs."""
    if name == REMOVED_OPTIMIZER:
        raise ValueError(
            f"{name} was removed; write adamw_8bit, which takes as many bytes. An interrupted run goes on with it and "
            "--resume-override; finished ones evaluate, generate and export as before (docs/optimizers.md)"
        )
    return name


class OptimConfig(Section):
    """AdamW: what takes its updates, and in how many bits its two moments are kept."""

    name: Annotated[OptimName, BeforeValidator(_refuse_removed)] = "adamw"
    """adamw keeps masters and moments in float32. adamw_8bit keeps moments in 8 bits (bitsandbytes), paged_adamw_8bit
    also lets a full GPU push them to the host. All keep small updates (docs/optimizers.md)."""

    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    """Decay rates of the first and second moment."""

    eps: Annotated[float, Field(gt=0)] = 1e-8
    """Added to the denominator of the update."""


class PrefixConfig(Section):
    """The frozen prefix, what lies below the lowest trained block: how its weights and what they compute are kept."""

    cache: Annotated[Literal["auto", "on", "off"], BeforeValidator(switch)] = "auto"
    """Compute each sample's hidden states at the frost line once and read them from disk afterwards, also in later
    runs; auto does so where samples are read more than once and the disk has room, on refuses to run without."""

    cache_dir: str | None = None
    """Where hidden states are kept; none takes activations in $FROSTLINE_CACHE, else in ~/.cache/frostline."""

    cache_limit_gib: Annotated[float, Field(gt=0)] | None = None
    """Most GiB that all hidden states in cache_dir may take; the least recently used go first. None sets no limit."""

    share: Literal["group"] | None = None
    """Who else may read and write the hidden states, from which rows can be recovered: group is cache_dir's."""

    precision: Literal["model", "int8", "nf4"] = "model"
    """How the frozen blocks are stored: model as they are, int8 in half of 16 bits, nf4 in a good quarter. What trains
    keeps its precision, and exports hold the original weights (docs/frozen-weights.md)."""

    placement: Literal["device", "cpu", "disk"] = "device"
    """Where the frozen blocks and embeddings are kept between two uses: cpu leaves them in the host's memory and disk
    in files, and each block comes to the device for its use, so that the model may be larger than the GPU."""


class OutputConfig(Section):
    """The run directory: what is written, and when."""

    dir: str | None = None
    """Run directory; none takes runs/RECIPE, or the next free runs/RECIPE-N beside finished or different runs."""

    share: Literal["group"] | None = None
    """Who else may read and write the run directory: group is that of the directory (docs/privacy.md)."""

    save_every_steps: Annotated[int, Field(ge=1)] | None = None
    """Also commit a checkpoint every so many steps; the end of each epoch always commits one."""

    keep: Annotated[int, Field(ge=1)] = 1
    """How many checkpoints to keep beside the one of the best validation score; older ones are removed after a newer
    one is committed."""

    async_save: bool | None = None
    """Write checkpoints in the background: training goes on once the state is copied to the host's memory, which it
    takes a second time, page-locked on a GPU; none does so on a GPU and not on a CPU."""

    evaluate_every_steps: Annotated[int, Field(ge=1)] | None = None
    """Also compute the validation loss every so many steps; the end of each epoch always does."""

    evaluate_metrics: tuple[str, ...] = ()
    """Metrics of evaluate.py to compute with each validation loss, such as accuracy or macro_f1 by the likelihood of
    options; those of generated answers, such as chrf++ or rouge_l, are of output.sample_answers rows
    (docs/evaluation.md)."""

    sample_answers: Annotated[int, Field(ge=0)] = 0
    """With each validation loss, have so many of the held-out questions answered and show the answers beside their
    references in TensorBoard; 0 generates nothing (docs/tensorboard.md)."""

    sample_tokens: Annotated[int, Field(ge=1)] = 96
    """Longest sample answer in tokens."""

    report: tuple[Literal["en", "ko"], ...] = ("en",)
    """Languages of the report that the run ends with, report.html and report.ko.html, for which it is scored beside its
    base on the validation rows; [] writes none (docs/report.md)."""

    report_answers: Annotated[int, Field(ge=0)] = 20
    """So many of the validation rows are answered for the report, by the run and by its base."""

    report_to: Annotated[list[Literal["tensorboard", "wandb", "mlflow"]], BeforeValidator(_as_trackers)] = Field(
        default=["tensorboard"]
    )
    """Where the curves are shown beside metrics.jsonl: tensorboard, wandb, mlflow, several of them, or none. wandb and
    mlflow get numbers and the recipe, no rows and no answers; each is an extra to install (docs/trackers.md)."""

    resume: Literal["auto", "must", "never"] = "auto"
    """auto continues an interrupted run of the same recipe, from the newest checkpoint that is whole; must insists on
    the latest; never refuses a used directory."""

    @model_validator(mode="after")
    def _require_place_for_answers(self) -> OutputConfig:
        """Refuse sample answers that nobody would see."""
        if self.sample_answers and "tensorboard" not in self.report_to:
            raise ValueError(
                f"sample_answers is {self.sample_answers}, but report_to leaves out tensorboard, where alone answers "
                "are shown; add tensorboard to it, or set sample_answers: 0"
            )
        return self


class RunConfig(Section):
    """A whole run. Field defaults < recipe file < command-line flags."""

    model: ModelConfig = ModelConfig()
    mask: MaskConfig = MaskConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    optim: OptimConfig = OptimConfig()
    prefix: PrefixConfig = PrefixConfig()
    output: OutputConfig = OutputConfig()

    @model_validator(mode="after")
    def _check_evaluate_metrics(self) -> RunConfig:
        """Require validation rows for metrics of them, and the metric that checkpoints are chosen by to be one."""
        chosen, metrics = self.train.metric_for_best_model, self.output.evaluate_metrics
        if metrics and self.data.validation is None:
            raise ValueError(
                f"output.evaluate_metrics is [{', '.join(metrics)}], but data.validation is none, so that there are no "
                "rows to compute them on; hold rows out with data.validation"
            )
        if chosen != "loss" and chosen not in metrics:
            raise ValueError(
                f"train.metric_for_best_model is {chosen}, which is not computed; expected loss, or one of "
                f"output.evaluate_metrics ([{', '.join(metrics)}])"
            )
        return self

    @model_validator(mode="after")
    def _check_early_stopping(self) -> RunConfig:
        """Require validation rows for early stopping."""
        if self.train.early_stopping_patience is not None and self.data.validation is None:
            raise ValueError(
                f"train.early_stopping_patience is {self.train.early_stopping_patience}, but data.validation is none, "
                "so that there is no validation loss to watch; hold rows out with data.validation"
            )
        if self.train.early_stopping_threshold and self.train.early_stopping_patience is None:
            raise ValueError(
                f"train.early_stopping_threshold is {self.train.early_stopping_threshold:g} and does nothing without "
                "train.early_stopping_patience; set that too, or leave both out"
            )
        return self
