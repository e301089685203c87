"""The ``mask.rotation`` section of a recipe: blocks that take turns."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from toolkit.config.section import Section


class RotationConfig(Section):
    """Blocks of mask.train that take turns, for the whole run."""

    method: Literal["lisa", "badam", "frostline"]
    """lisa (arXiv 2403.17919): some blocks drawn at random, embeddings and head throughout. badam (arXiv 2404.02827):
    one part after the other, its moments anew. frostline, our own: lisa's draw above a frost line."""

    every_steps: Annotated[int, Field(ge=1)]
    """Optimizer steps of a turn."""

    blocks: Annotated[int, Field(ge=1)] = 1
    """Blocks that train in a turn; badam trains one part."""

    order: Literal["random", "ascending", "descending"] = "random"
    """Order in which badam goes through the parts: random draws a new one for each round; lisa and frostline draw."""

    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of what is drawn."""

    @model_validator(mode="after")
    def _has_no_unused_key(self) -> RotationConfig:
        """Reject keys that the method has no use for."""
        if self.method == "badam" and self.blocks != 1:
            raise ValueError(f"blocks is {self.blocks}, but badam trains one block at a time; leave it out")
        if self.method != "badam" and self.order != "random":
            raise ValueError(f"order is {self.order}, but {self.method} draws its blocks at random; leave it out")
        return self

    def __str__(self) -> str:
        """Return method, blocks and steps, for lists of runs."""
        return f"{self.method} {self.blocks} every {self.every_steps}"
