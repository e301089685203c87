"""Choose a frost line: what training above each is expected to gain by a probe, beside what it costs by a plan."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import yaml

from toolkit.config.flags import Invocation
from toolkit.config.mask_schema import MaskConfig
from toolkit.data.dataset import load_dataset
from toolkit.data.examples import Example
from toolkit.data.template_choice import rendering_of
from toolkit.inference.open_model import load_base
from toolkit.models.load import LoadedModel
from toolkit.planning.command import plan_masks
from toolkit.planning.comparison import comparison_rows, duration
from toolkit.planning.line_probe import LEAST_ROWS, LineGain, probe_lines, require_sample
from toolkit.planning.suggest import ADAPTER_RATE
from toolkit.planning.table import flops_text, gib
from toolkit.runtime.errors import ConfigError

SHARE = 0.9
"""Share of the highest expected gain that a recommended line must reach."""
RANK = 16


@dataclass(frozen=True)
class LineChoice:
    """Every frost line with expected gain and cost, and the recommended one."""

    base_loss: float
    """Loss of the model as it is on the probed positions, nats a token."""
    rows: int
    """Rows of the sample."""
    positions: int
    """Supervised positions of the sample that were looked at."""
    gains: tuple[LineGain, ...]
    """Of each frost line, from 0 to the number of blocks - 1."""
    costs: tuple[dict[str, Any], ...]
    """Of the same lines, by ``comparison_rows``: adapters beside every linear layer above the line."""
    most_blocks: int
    """Most blocks above a line that may be recommended."""

    @property
    def allowed(self) -> list[int]:
        """Return the lines within the budget of blocks that fit the GPU, if one was named."""
        count = len(self.gains)
        return [b for b in range(count) if count - b <= self.most_blocks and self.costs[b]["fits"] is not False]

    @property
    def best(self) -> int | None:
        """Return the allowed line of the highest expected gain; None if none is allowed, or expected to gain at all.

        A gain counts that is larger than its standard error.
        """
        seen = [b for b in self.allowed if self.gains[b].gain > self.gains[b].error]
        return max(seen, key=lambda b: self.gains[b].gain) if seen else None

    @property
    def recommended(self) -> int | None:
        """Return the highest allowed line that reaches ``SHARE`` of the best gain: the fewest blocks to train."""
        if self.best is None:
            return None
        return max(b for b in self.allowed if self.gains[b].gain >= SHARE * self.gains[self.best].gain)

    def reason(self) -> str:
        """Return why the line is recommended, or why none is, as a line of text."""
        line, best = self.recommended, self.best
        if not self.allowed:
            return "no line is recommended: none within the budget fits; see the turns of a plan without --suggest"
        if line is None or best is None:
            return (
                f"no line is recommended: at none does the readout lower the held-out loss ({self.base_loss:.3f}) by "
                "more than its standard error; name more rows with --rows, or compare runs"
            )
        gain, most = self.gains[line].gain, self.gains[best].gain
        text = f"frost line {line} is the highest that is expected to reach {SHARE:.0%} of the most: {gain:.3f} of"
        text += f" {most:.3f} nats a token (line {best})"
        flops = [self.costs[b]["flops"] for b in (line, best)]
        share = "" if None in flops or line == best else f", at {flops[0] / flops[1]:.2f} of its operations and"
        memory = self.costs[line]["memory"] / self.costs[best]["memory"]
        return text + (f"{share} {memory:.2f} of its memory" if share else "")

    def table(self) -> str:
        """Return all lines as aligned text, followed by the reason and the sections of a recipe."""
        forms = {"trained": lambda n: f"{n:,}", "memory": gib, "disk": gib, "flops": flops_text, "seconds": duration}
        columns = {key: form for key, form in forms.items() if all(cost[key] is not None for cost in self.costs)}
        head = f"{'frost line':>10}{'expected gain':>22}" + "".join(f"{name:>17}" for name in columns)
        lines = [head]
        for gain, cost in zip(self.gains, self.costs, strict=True):
            cells = "".join(f"{form(cost[key]):>17}" for key, form in columns.items())
            marks = "  recommended" if gain.boundary == self.recommended else ""
            marks += "  does not fit" if cost["fits"] is False else ""
            lines.append(f"{gain.boundary:>10}{gain.gain:>13.4f} ± {gain.error:.4f}{cells}{marks}")
        lines += [
            "expected gain: nats a token on rows that the readout was not fitted to, ± its standard error over rows;",
            f"the model's own loss there is {self.base_loss:.4f} ({self.rows} rows, {self.positions:,} positions)",
            "costs: of the whole run with adapters above the line; memory: the peak of one rank",
            "a forecast; compared with training, it had lines in the wrong order (docs/plan.md): compare runs, too",
            "",
            self.reason(),
        ]
        return "\n".join([*lines, *([] if self.recommended is None else ["", self.mask_block()])])

    def mask_block(self) -> str:
        """Return sections of a recipe that trains adapters above the recommended line, at the rate of docs/why.md."""
        assert self.recommended is not None
        mask = line_mask(self.recommended, len(self.gains))
        sections = {"mask": {"train": mask}, "train": {"learning_rate": ADAPTER_RATE}}
        return yaml.safe_dump(sections, sort_keys=False)

    def as_dict(self) -> dict[str, Any]:
        """Return all as JSON values; gains in nats a token."""
        lines = [{**asdict(gain), **cost} for gain, cost in zip(self.gains, self.costs, strict=True)]
        return {
            "base_loss": self.base_loss, "rows": self.rows, "positions": self.positions, "lines": lines,
            "recommended": self.recommended, "best": self.best, "reason": self.reason(),
        }  # fmt: skip


def line_mask(boundary: int, blocks: int) -> list[Any]:
    """Return ``mask.train`` of adapters beside every linear layer of the blocks from ``boundary`` on."""
    return [{"lora": {"select": f"last:{blocks - boundary}", "rank": RANK}}]


def choose_line(
    invocation: Invocation, ranks: int, gpu_bytes: int | None, budget: float, rows: int, tflops: float | None
) -> LineChoice:
    """Plan adapters above every line of a recipe's model, and probe each with training rows of its data.

    Args:
        invocation: parsed command line; its mask is not looked at.
        ranks: ranks that the plans are for.
        gpu_bytes: memory of one GPU; lines that do not fit are not recommended. None allows all.
        budget: most of the blocks that may train, as a share above 0 and up to 1; one block may always.
        rows: rows of the sample, spread evenly over the training rows.
        tflops: rate for the expected time, see ``comparison_rows``.

    Raises:
        UsageError: recipe, model, data or budget is invalid, or the sample too small.
    """
    if not 0 < budget <= 1:
        raise ConfigError([f"--budget is {budget}; expected a share of the blocks above 0 and up to 1"], "command line")
    if rows < LEAST_ROWS:
        raise ConfigError([f"--rows is {rows}; expected at least {LEAST_ROWS} for --suggest probe"], "command line")
    loaded = load_base(invocation.config.model)
    examples = sample_rows(invocation, loaded, rows)
    require_sample(examples, loaded.model)  # before all lines are planned, which takes longer
    blocks = loaded.anatomy.block_count
    masks = [MaskConfig(train=line_mask(boundary, blocks)) for boundary in range(blocks)]
    if invocation.config.prefix.cache == "on":  # line 0 has nothing to cache
        plans = plan_masks(_with_optional_cache(invocation), ranks, gpu_bytes, masks[:1])
        plans += plan_masks(invocation, ranks, gpu_bytes, masks[1:])
    else:
        plans = plan_masks(invocation, ranks, gpu_bytes, masks)
    costs = comparison_rows([str(mask.train[0]) for mask in masks], plans, tflops)
    probe = probe_lines(loaded, examples)
    most = max(1, math.floor(budget * blocks + 1e-9))  # a share such as 0.7 of 10 is a little below 7
    return LineChoice(probe.base_loss, probe.rows, probe.positions, probe.gains, tuple(costs), most)


def _with_optional_cache(invocation: Invocation) -> Invocation:
    """Return the command line with ``prefix.cache: auto`` in the place of ``on``."""
    prefix = invocation.config.prefix.model_copy(update={"cache": "auto"})
    return replace(invocation, config=invocation.config.model_copy(update={"prefix": prefix}))


def sample_rows(invocation: Invocation, loaded: LoadedModel, rows: int) -> Sequence[Example]:
    """Return up to ``rows`` distinct training rows, spread evenly over all.

    Raises:
        DataError: the data cannot be read.
    """
    config, tokenizer = invocation.config, loaded.tokenizer
    rendering = rendering_of(config.data, tokenizer)
    train = load_dataset(config.data, tokenizer, config.train.seed, ends=loaded.ends, rendering=rendering).train
    distinct = np.sort(np.unique(train.contents, return_index=True)[1]).tolist()
    count = min(rows, len(distinct))
    return [train[distinct[number * len(distinct) // count]] for number in range(count)]
