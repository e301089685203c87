"""Rotation: which blocks of a mask train in which turn of a run. Imports no torch.

LISA (Pan et al., arXiv 2403.17919) draws blocks and trains embeddings and head throughout; BAdam (Luo et al., arXiv
2404.02827) goes through the parts one by one, with fresh moments; ``frostline``, our own, draws as LISA does, and only
above a frost line. What a turn trains follows from recipe, model and the turn's number alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain

from toolkit.config.mask_schema import MaskConfig
from toolkit.config.rotation_schema import RotationConfig
from toolkit.mask.layer_mask import LayerMask, build_mask
from toolkit.models.anatomy import Anatomy
from toolkit.runtime.errors import ConfigError, MaskError


@dataclass(frozen=True)
class RotatingPart:
    """A part of the model whose trained tensors take turns with other parts: a block; for badam also what is around."""

    label: str
    """Index of a block, or the names of the parts around the blocks."""
    names: frozenset[str]
    parameters: int


@dataclass(frozen=True)
class RotationTurn:
    """A span of steps in which the same parts train."""

    end: int
    """Optimizer steps done when it ends."""
    parts: tuple[int, ...]
    """Indices among ``Rotation.parts``, rising."""


@dataclass(frozen=True)
class Rotation:
    """A rotation of the parts of a mask; all turns have the frost line of that mask."""

    config: RotationConfig
    pool: LayerMask
    """Everything that trains in some turn."""
    parts: tuple[RotatingPart, ...]
    """What takes turns, from input to head."""
    reaches_bottom: bool
    """True if what trains in every turn has parts below the blocks, so that each gradient goes through all of them."""

    @property
    def drops_moments(self) -> bool:
        """Return True if each turn begins with fresh moments, even of a part that has just trained."""
        return self.config.method == "badam"

    def turns(self, total_steps: int) -> list[RotationTurn]:
        """Return the turns of a run; if the same blocks are drawn twice in a row, these are one turn.

        Raises:
            ConfigError: there would be one turn alone: the run ends within the first, or all draw the same blocks.
        """
        every = self.config.every_steps
        turns: list[RotationTurn] = []
        for number, start in enumerate(range(0, total_steps, every)):
            turn = RotationTurn(min(start + every, total_steps), self._drawn(number))
            if turns and turns[-1].parts == turn.parts and not self.drops_moments:
                turns.pop()
            turns.append(turn)
        if turns[1:]:
            return turns
        if every >= total_steps:
            fault = (
                f"mask.rotation.every_steps is {every}, but the run has {total_steps} steps, so that only the first "
                "turn would train; expected less than the steps of the run: shorten the turns or train longer"
            )
        else:
            fault = (
                f"mask.rotation.seed is {self.config.seed}, with which all turns of the run's {total_steps} steps draw "
                f"the same blocks ({self.labels(turns[0])}), so that nothing would rotate; shorten the turns, train "
                "longer or take another seed"
            )
        raise ConfigError([fault], "recipe, read against the number of rows")

    def mask(self, parts: Sequence[int]) -> LayerMask:
        """Return the mask of a turn, given the indices of what trains in it."""
        resting = frozenset().union(*(part.names for index, part in enumerate(self.parts) if index not in parts))
        groups = [replace(group, names=tuple(n for n in group.names if n not in resting)) for group in self.pool.groups]
        return replace(
            self.pool,
            trainable=tuple(tensor for tensor in self.pool.trainable if tensor.name not in resting),
            groups=tuple(group for group in groups if group.names),
        )

    def costly_masks(self) -> list[LayerMask]:
        """Return the masks of the turns that may need most memory, to plan them in the place of all.

        A turn needs no more than another one whose gradients go as deep and that trains as many parameters. For each
        lowest part the largest ones above it are taken, among equal ones the lowest: the last block computes less. Of
        the turns thus found those that another one outdoes in both are left out. Of equal blocks one turn remains.
        """
        others = self.config.blocks - 1
        chosen: list[tuple[int, int, tuple[int, ...]]] = []
        for lowest in range(len(self.parts) - others):
            above = sorted(range(lowest + 1, len(self.parts)), key=lambda i: (-self.parts[i].parameters, i))
            parts = tuple(sorted((lowest, *above[:others])))
            size = sum(self.parts[index].parameters for index in parts)
            chosen.append((0 if self.reaches_bottom else lowest, size, parts))
        masks, most = [], -1
        for _, size, parts in sorted(chosen, key=lambda turn: (turn[0], -turn[1])):
            if size > most:
                masks.append(self.mask(parts))
                most = size
        return masks

    def text(self) -> str:
        """Describe for log and plan what takes turns and where the frost line is."""
        config, line = self.config, self.pool.boundary
        taking_turns = frozenset().union(*(part.names for part in self.parts))
        throughout = sum(t.parameters for t in self.pool.trainable if t.name not in taking_turns)
        kind = "parts" if self.drops_moments else "blocks"
        order = f", order {config.order}" if self.drops_moments else ""
        lines = [
            f"rotation {config.method}: {config.blocks} of {len(self.parts)} {kind} at a time, "
            f"for {config.every_steps} steps each{order}, seed {config.seed}; "
            f"{throughout:,} parameters train throughout",
            f"the frost line is at block {line} of {self.pool.block_count} in all turns"
            + ("" if line else ": nothing below it is frozen throughout, so nothing is cached"),
        ]
        return "\n".join(lines)

    def as_dict(self) -> dict[str, object]:
        """Return the recipe's keys and what takes turns, as JSON values."""
        return {**self.config.model_dump(), "takes_turns": [part.label for part in self.parts]}

    def labels(self, turn: RotationTurn) -> str:
        """Return what trains in a turn beside what trains throughout, for the log."""
        return ", ".join(self.parts[index].label for index in turn.parts)

    def _drawn(self, number: int) -> tuple[int, ...]:
        """Return the indices of the parts of turn ``number``, counted from 0."""
        count = len(self.parts)
        if not self.drops_moments:
            return tuple(sorted(self._shuffled(number)[: self.config.blocks]))
        round_, place = divmod(number, count)
        if self.config.order == "random":
            return (self._shuffled(round_)[place],)
        return (place if self.config.order == "ascending" else count - 1 - place,)

    def _shuffled(self, draw: int) -> list[int]:
        """Return all indices in a random order: the same for every version of Python, machine and rank."""

        def digest(index: int) -> bytes:
            return hashlib.sha256(f"{self.config.seed} {draw} {index}".encode()).digest()

        return sorted(range(len(self.parts)), key=digest)


def resolve_rotation(config: MaskConfig, anatomy: Anatomy) -> Rotation:
    """Resolve ``mask.rotation`` over the blocks of ``mask.train``.

    Raises:
        MaskError: the mask is invalid (see ``build_mask``), has adapters or rows, does not suit the method, or has too
            few blocks for them to take turns; or these blocks share tensors.
    """
    rotation = config.rotation
    assert rotation is not None
    pool = build_mask(config, anatomy)
    if pool.adapters or pool.rows:
        kind = "lora" if pool.adapters else "rows"
        raise MaskError(
            f"mask.rotation lets whole tensors take turns, and mask.train has a {kind} entry; leave out one of the two"
        )
    by_part = dict(_names_by_part(pool, anatomy))
    blocks = {part: names for part, names in by_part.items() if isinstance(part, int)}
    if rotation.method == "lisa":
        _require_whole_model(by_part, pool, anatomy)
    if rotation.method == "frostline" and pool.boundary == 0:
        raise MaskError(
            "mask.rotation.method is frostline, which draws above a frost line, but mask.train reaches block 0 or the "
            "embeddings, so nothing stays frozen below it. Let mask.train begin higher, as in [last:8, head], or write "
            "method: lisa with train: [all]"
        )
    taking_turns = {str(index): names for index, names in sorted(blocks.items())}
    below = [name for part in ("embeddings", "other") for name in by_part.get(part, ())]
    if rotation.method == "badam":
        above = {part: by_part[part] for part in ("norm", "head") if part in by_part}
        around = {" and ".join(above): [name for names in above.values() for name in names]}
        taking_turns = {"embeddings": below, **taking_turns, **around}
    _refuse_shared_tensors(chain.from_iterable(taking_turns.values()), anatomy)
    sizes = {tensor.name: tensor.parameters for tensor in pool.trainable}
    parts = tuple(
        RotatingPart(label, frozenset(names), sum(sizes[name] for name in names))
        for label, names in taking_turns.items()
        if names
    )
    if len(parts) <= rotation.blocks:
        raise MaskError(
            f"mask.rotation trains {rotation.blocks} of the blocks at a time, and mask.train selects {len(parts)} that "
            "can take turns, so that nothing would rotate; expected more blocks in mask.train, or fewer in "
            "mask.rotation.blocks"
        )
    return Rotation(rotation, pool, parts, bool(below) and rotation.method != "badam")


def _names_by_part(pool: LayerMask, anatomy: Anatomy) -> Iterator[tuple[int | str, list[str]]]:
    """Yield the trained tensors of each block, by its index, and of each other part, by its name."""
    by_part: dict[int | str, list[str]] = {}
    for name in pool.names:
        tensor = anatomy.by_name[name]
        is_head = pool.tied == "head_only" and tensor.part == "embeddings"  # it trains through the head alone
        part = "head" if is_head else tensor.part
        by_part.setdefault(part if tensor.block is None else tensor.block, []).append(name)
    yield from by_part.items()


def _refuse_shared_tensors(taking_turns: Iterable[str], anatomy: Anatomy) -> None:
    """Raise MaskError if a tensor that takes turns is another block's, too: that would change while it rests."""
    names = set(taking_turns)
    for alias in anatomy.tensors:
        if alias.block is None or alias.alias_of not in names:
            continue
        other = anatomy.by_name[alias.alias_of]
        if alias.block != other.block:
            raise MaskError(
                f"mask.rotation lets blocks take turns, and {other.name} of block {other.block} is one tensor with "
                f"{alias.name}: in the turn of one the other would change, too. Leave out mask.rotation, or let "
                "mask.train select what no two blocks share"
            )


def _require_whole_model(by_part: dict[int | str, list[str]], pool: LayerMask, anatomy: Anatomy) -> None:
    """Raise MaskError if ``mask.train`` leaves out a part that LISA trains."""
    parts = {tensor.part if tensor.block is None else tensor.block for tensor in anatomy.tensors if tensor.can_train}
    trained = set(by_part) | ({"head"} if pool.tied == "both" else set())
    wanted: set[int | str] = {"embeddings", "head", *range(anatomy.block_count)}
    if missing := sorted(map(str, (parts & wanted) - trained)):
        more = f" and {len(missing) - 1} more" if missing[1:] else ""
        raise MaskError(
            "mask.rotation.method is lisa, which draws from all blocks and trains embeddings and head throughout, but "
            f"mask.train leaves out {'block ' if missing[0].isdigit() else 'the '}{missing[0]}{more}. "
            "Write train: [all], or method: frostline, which draws from the blocks of mask.train above a frost line"
        )
