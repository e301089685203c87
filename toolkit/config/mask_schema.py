"""The recipe's keys about what trains: mask, groups with settings of their own, phases."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Discriminator,
    Field,
    SerializerFunctionWrapHandler,
    Tag,
    model_serializer,
    model_validator,
)

from toolkit.config.rotation_schema import RotationConfig
from toolkit.config.section import Section, parse_mapping


def _as_phase_list(value: Any) -> Any:
    """Wrap a single phase in a list, and reject items that are not mappings."""
    value = [value] if isinstance(value, dict) else value
    if isinstance(value, list) and (other := [item for item in value if not isinstance(item, (dict, MaskPhase))]):
        raise ValueError(
            f"{other[0]!r} is not a phase; expected a mapping such as {{train: [head], until_epoch: 1}}, as a flag in "
            "quotes and one word a phase"
        )
    return value


def _as_selector_list(value: Any) -> Any:
    """Wrap a single selector or group in a list, and reject numbers, which come from an unquoted comma."""
    value = [value] if isinstance(value, (str, dict)) else value
    allowed = (str, dict, Section)
    if isinstance(value, list) and (other := [item for item in value if not isinstance(item, allowed)]):
        raise ValueError(f"{other[0]!r} is not a selector; quote one that holds a comma, as in 'blocks:10-13,28'")
    return value


def _as_rotation(value: Any) -> Any:
    """Read a mapping that was given as text, and reject what is none, such as the name of a method."""
    value = parse_mapping(value)
    if value is not None and not isinstance(value, (dict, RotationConfig)):
        raise ValueError(f"{value!r} is no rotation; expected a mapping such as {{method: lisa, every_steps: 20}}")
    return value


class MaskGroup(Section):
    """Selectors with settings of their own."""

    select: Annotated[list[str], BeforeValidator(_as_selector_list), Field(min_length=1)]
    """Selectors of the group's tensors."""

    learning_rate: Annotated[float, Field(gt=0)] | None = None
    """Peak learning rate of the group; none takes train.learning_rate."""

    weight_decay: Annotated[float, Field(ge=0)] | None = None
    """Weight decay of every tensor of the group; none takes train.weight_decay, and 0 for biases and norms."""

    def __str__(self) -> str:
        """Return the selectors, for lists of runs."""
        return "+".join(self.select)


LoraInit = Literal["kaiming", "gaussian"]
BasePrecision = Literal["model", "int8", "nf4"]


class LoraConfig(Section):
    """Low-rank adapters (LoRA, arXiv 2106.09685) beside frozen linear layers."""

    select: Annotated[list[str], BeforeValidator(_as_selector_list), Field(min_length=1)]
    """Selectors of blocks; the linear layers among what they select get an adapter."""

    targets: Annotated[list[str], BeforeValidator(_as_selector_list), Field(min_length=1)] | None = None
    """Ends of the names of the layers to adapt, such as q_proj or mlp.down_proj; none adapts every linear layer."""

    rank: Annotated[int, Field(ge=1)] = 16
    """Rank of the update."""

    alpha: Annotated[int, Field(ge=1)] | None = None
    """The update is scaled by alpha / rank, with rslora by alpha / sqrt(rank); none takes twice the rank."""

    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout of the adapters' input; the frozen prefix stays exact, because all adapters stand above it."""

    rslora: bool = False
    """Scale by the square root of the rank (rank-stabilised LoRA, arXiv 2312.03732)."""

    dora: bool = False
    """Train the magnitude of each output apart from its direction (DoRA, arXiv 2402.09353)."""

    init: LoraInit = "kaiming"
    """Random start of A; B starts at zero, so that training starts from the base model. Starts that change the base's
    weights (PiSSA, OLoRA) are left out, because frozen weights stay as they are."""

    base_precision: BasePrecision = "model"
    """Precision in which the frozen linear layers of the adapted blocks are held: int8 and nf4 quantise them (QLoRA,
    arXiv 2305.14314), all but those that train whole in some phase; exports hold the dequantised weights."""

    learning_rate: Annotated[float, Field(gt=0)] | None = None
    """Peak learning rate of the adapters; none takes train.learning_rate."""

    weight_decay: Annotated[float, Field(ge=0)] | None = None
    """Weight decay of the adapters; none takes train.weight_decay, and 0 for DoRA's magnitudes."""


class LoraEntry(Section):
    """Adapters as an entry of mask.train."""

    lora: LoraConfig

    def __str__(self) -> str:
        """Return kind, rank and selectors, for lists of runs."""
        base = "" if self.lora.base_precision == "model" else f" {self.lora.base_precision}"
        return f"{'dora' if self.lora.dora else 'lora'}{self.lora.rank}{base} {'+'.join(self.lora.select)}"


def _as_first_row(value: Any) -> Any:
    """Reject what is neither a row's number nor the word added; flags arrive as strings."""
    number = int(value) if isinstance(value, str) and value.isascii() and value.isdigit() else value
    if value is None or value == "added" or (isinstance(number, int) and not isinstance(number, bool) and number >= 0):
        return number
    raise ValueError(f"{value!r} is no row; expected a number from 0 on, or added (the rows of model.add_tokens)")


class RowsConfig(Section):
    """Some rows of tables that have one row for each token; the other rows stay as they are."""

    select: Annotated[list[str], BeforeValidator(_as_selector_list), Field(min_length=1)]
    """Selectors of the tables: embeddings, head, or both."""

    from_: Annotated[int | Literal["added"] | None, BeforeValidator(_as_first_row)] = Field(None, alias="from")
    """First row that trains, a token's id; added takes the rows of the tokens that model.add_tokens adds."""

    to: Annotated[int, Field(ge=0)] | None = None
    """Last row that trains; none trains all rows from ``from`` on."""

    ids: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)] | None = None
    """Rows that train, in the place of from and to."""

    learning_rate: Annotated[float, Field(gt=0)] | None = None
    """Peak learning rate of the rows; none takes train.learning_rate."""

    weight_decay: Annotated[float, Field(ge=0)] | None = None
    """Weight decay of the rows; none takes train.weight_decay."""

    @model_validator(mode="after")
    def _names_rows_once(self) -> RowsConfig:
        """Require exactly one of from and ids, to only after a number, and rows that do not run backwards."""
        if (self.from_ is None) == (self.ids is None):
            found = "neither from nor ids" if self.ids is None else "both from and ids"
            raise ValueError(f"it has {found}; expected one of them, such as from: added")
        if self.to is None:
            return self
        if not isinstance(self.from_, int):
            raise ValueError(
                f"to is {self.to} without a number as from; expected from: FIRST beside it, or leave it out"
            )
        if self.to < self.from_:
            raise ValueError(f"it runs from {self.from_} to {self.to}, backwards; expected the first row first")
        return self

    @model_serializer(mode="wrap")
    def _with_the_recipes_key(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Write the key ``from``, which is no name in Python."""
        return {{"from_": "from"}.get(key, key): value for key, value in handler(self).items()}


class RowsEntry(Section):
    """Rows of tables as an entry of mask.train."""

    rows: RowsConfig

    def __str__(self) -> str:
        """Return the rows and the selectors, for lists of runs."""
        rows = self.rows
        if rows.ids is not None:
            which = ",".join(map(str, rows.ids))
        else:
            which = "added" if rows.from_ == "added" else f"{rows.from_}-{'' if rows.to is None else rows.to}"
        return f"rows {which} of {'+'.join(rows.select)}"


_ENTRY_OF_KEY = {"lora": LoraEntry, "rows": RowsEntry}
"""Entries that are recognised by their one key."""


def _kind_of_entry(value: Any) -> str:
    """Return which of the union of mask.train's entries a value is, so that its faults are those of that one alone."""
    if isinstance(value, dict):
        return next((kind for key, kind in _ENTRY_OF_KEY.items() if key in value), MaskGroup).__name__
    return type(value).__name__


MaskEntry = Annotated[
    Annotated[str, Tag("str")]
    | Annotated[MaskGroup, Tag(MaskGroup.__name__)]
    | Annotated[LoraEntry, Tag(LoraEntry.__name__)]
    | Annotated[RowsEntry, Tag(RowsEntry.__name__)],
    Discriminator(_kind_of_entry),
]
"""An entry of mask.train: a selector, a group of selectors with settings, adapters, or rows of tables."""


class MaskPhase(Section):
    """A mask that holds at first, and until when."""

    train: Annotated[list[MaskEntry], BeforeValidator(_as_selector_list), Field(min_length=1)]
    """What trains in this phase; as mask.train."""

    freeze: Annotated[list[str], BeforeValidator(_as_selector_list)] = Field(default=[])
    """Selectors of what stays frozen in this phase though train selects it."""

    until_epoch: Annotated[int, Field(ge=1)] | None = None
    """The phase ends with this epoch, counted from 1 over the whole run."""

    until_step: Annotated[int, Field(ge=1)] | None = None
    """The phase ends with this optimizer step, counted from 1 over the whole run; give this or until_epoch."""

    @property
    def end(self) -> str:
        """End of the phase, as ``epoch N`` or ``step N``."""
        return f"epoch {self.until_epoch}" if self.until_epoch is not None else f"step {self.until_step}"

    @model_validator(mode="after")
    def _has_one_end(self) -> MaskPhase:
        """Require exactly one of until_epoch and until_step."""
        if self.until_epoch is None and self.until_step is None:
            raise ValueError("it has neither until_epoch nor until_step; say when the phase ends with one of them")
        if self.until_epoch is not None and self.until_step is not None:
            raise ValueError(
                f"it has until_epoch {self.until_epoch} and until_step {self.until_step}; a phase ends once: drop one"
            )
        return self


class MaskConfig(Section):
    """Which tensors train; everything else is frozen."""

    train: Annotated[list[MaskEntry], BeforeValidator(_as_selector_list), Field(min_length=1)] = Field(
        default=["last:4", "head"]
    )
    """What trains: selectors such as last:N, blocks:LIST, head, glob:PATTERN (docs/layer-mask.md), groups, adapters
    (docs/adapters.md), or rows of tables (docs/rows.md)."""

    freeze: Annotated[list[str], BeforeValidator(_as_selector_list)] = Field(default=[])
    """Selectors of what stays frozen though mask.train selects it."""

    schedule: Annotated[list[MaskPhase], BeforeValidator(_as_phase_list)] = Field(default=[])
    """Phases before the one of mask.train and mask.freeze (docs/schedule.md), each a mapping of train, freeze and
    until_epoch or until_step; none trains one mask throughout."""

    rotation: Annotated[RotationConfig | None, BeforeValidator(_as_rotation)] = None
    """Blocks of mask.train that take turns, as in {method: lisa, blocks: 2, every_steps: 20}; what else mask.train
    selects trains throughout (docs/schedule.md). none trains all of it at once."""

    tied: Literal["error", "untie", "both", "head_only"] = "error"
    """A selected head that shares the embeddings' tensor: error refuses, untie gives the head a copy, both trains it as
    one tensor, head_only trains it through the head alone."""

    @property
    def changes(self) -> bool:
        """Return True if what trains changes during the run."""
        return bool(self.schedule) or self.rotation is not None

    @model_validator(mode="after")
    def _changes_in_one_way(self) -> MaskConfig:
        """Reject a schedule beside a rotation."""
        if self.schedule and self.rotation is not None:
            raise ValueError("mask.schedule and mask.rotation both say what trains when; leave out one of them")
        return self

    @model_validator(mode="after")
    def _ends_in_order(self) -> MaskConfig:
        """Require neighbouring phases with ends in the same unit to end one after the other.

        Ends in different units are compared by ``toolkit.mask.schedule.phase_ends``, which knows the steps of an epoch.
        """
        for index, (before, phase) in enumerate(zip(self.schedule, self.schedule[1:], strict=False), start=1):
            for unit in ("until_epoch", "until_step"):
                first, second = getattr(before, unit), getattr(phase, unit)
                if first is not None and second is not None and second <= first:
                    raise ValueError(
                        f"mask.schedule.{index} ends with {phase.end}, the phase before it with {before.end}; "
                        "expected each phase to end after the one before it"
                    )
        return self
