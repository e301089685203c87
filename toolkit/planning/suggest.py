"""Suggest which blocks to train: by the signal-to-noise ratio of their weights, or by their gradient norms."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import yaml

from toolkit.config.schema import RunConfig
from toolkit.data.batches import collate
from toolkit.data.dataset import load_dataset
from toolkit.data.examples import Example
from toolkit.data.model_limits import check_fit, padding_id
from toolkit.data.template_choice import rendering_of
from toolkit.inference.open_model import load_base
from toolkit.models.load import LoadedModel
from toolkit.runtime.distributed import World
from toolkit.runtime.errors import ConfigError, ModelError
from toolkit.split.suffix import Suffix
from toolkit.split.supervised_loss import supervised_loss

Method = Literal["spectrum", "gradient"]
ADAPTER_RATE = 5e-4
"""Best of three learning rates for adapters in most masks of docs/why.md."""


@dataclass(frozen=True)
class Suggestion:
    """Scores of all blocks, and the best ones."""

    method: Method
    scores: tuple[float, ...]
    """Score of each block; higher is better."""
    chosen: tuple[int, ...]
    """The best blocks within the budget, in the model's order."""

    @property
    def ranking(self) -> list[int]:
        """Return the blocks from the highest score to the lowest; on a tie, the block nearer the head first."""
        return sorted(range(len(self.scores)), key=lambda block: (-self.scores[block], -block))

    def mask_block(self) -> str:
        """Return sections of a recipe that trains adapters in the chosen blocks, at the rate of docs/why.md."""
        entry = {"lora": {"select": f"blocks:{_ranges(self.chosen)}", "rank": 16}}
        return yaml.safe_dump({"mask": {"train": [entry]}, "train": {"learning_rate": ADAPTER_RATE}}, sort_keys=False)

    def table(self) -> str:
        """Return the ranking as aligned text, followed by the frost line and the sections of a recipe."""
        lines = [f"{'rank':>4}  {'block':>5}  {self.method:>12}"]
        for rank, block in enumerate(self.ranking, start=1):
            mark = "  chosen" if block in self.chosen else ""
            lines.append(f"{rank:>4}  {block:>5}  {self.scores[block]:>12.5g}{mark}")
        below = "what lies below it costs no backward pass" if self.chosen[0] else "nothing lies below it"
        line = f"# frost line: block {self.chosen[0]} of {len(self.scores)}; {below}"
        whole = (
            f"# these blocks whole learn as much, in more memory: mask.train [blocks:{_ranges(self.chosen)}] at 1e-4"
        )
        return "\n".join([*lines, "", line, whole, self.mask_block()])


def suggest(loaded: LoadedModel, method: Method, budget: float, examples: Sequence[Example]) -> Suggestion:
    """Rank the blocks of a model and choose the best ones.

    Args:
        loaded: the model; its weights are not changed.
        method: ``spectrum`` scores the weights alone, ``gradient`` the gradient of the loss on ``examples``.
        budget: fraction of the blocks to choose, above 0 and up to 1; at least one block is chosen.
        examples: a few rows for ``gradient``; ignored by ``spectrum``.

    Raises:
        ConfigError: the budget is out of range, or ``examples`` is empty for ``gradient``.
    """
    if not 0 < budget <= 1:
        raise ConfigError([f"--budget is {budget}; expected a share of the blocks above 0 and up to 1"], "command line")
    if method == "gradient" and not examples:
        raise ConfigError(["--suggest gradient has no rows to look at; name some with --data.path"], "command line")
    scores = spectrum_scores(loaded) if method == "spectrum" else gradient_scores(loaded, examples)
    size = max(1, round(budget * len(scores)))
    best = Suggestion(method, tuple(scores), ()).ranking[:size]
    return Suggestion(method, tuple(scores), tuple(sorted(best)))


def suggest_for(config: RunConfig, method: Method, budget: float, rows: int) -> Suggestion:
    """Load the model of a recipe, and for ``gradient`` its first ``rows`` training rows, and suggest a mask.

    Raises:
        UsageError: model, data or budget is invalid.
    """
    loaded = load_base(config.model)
    examples: Sequence[Example] = ()
    if method == "gradient":
        tokenizer, seed = loaded.tokenizer, config.train.seed
        rendering = rendering_of(config.data, tokenizer)
        examples = load_dataset(config.data, tokenizer, seed, ends=loaded.ends, rendering=rendering).train[:rows]
    return suggest(loaded, method, budget, examples)


@torch.no_grad()
def spectrum_scores(loaded: LoadedModel) -> list[float]:
    """Compute the signal-to-noise ratio of each block's weights, after Spectrum (Hartford et al., arXiv 2406.06623).

    The singular values of a matrix above the Marchenko-Pastur edge of its noise count as signal, the rest as noise;
    their ratio is divided by the largest one. Matrices of the same name are scaled to a largest ratio of 1 over the
    blocks, so that no kind outweighs another, and a block's score is the mean over its matrices. One matrix at a time
    is on the GPU, where there is one.

    Raises:
        ModelError: weights are not finite.
    """
    device = World().device
    ratios: defaultdict[str, dict[int, float]] = defaultdict(dict)
    parameters = dict(loaded.model.named_parameters())
    for tensor in loaded.anatomy.tensors:
        if tensor.block is not None and len(tensor.shape) >= 2 and tensor.name in parameters:
            name_in_block = tensor.name.removeprefix(f"{loaded.anatomy.blocks}.{tensor.block}.")
            weight = parameters[tensor.name]
            if not torch.isfinite(weight).all():
                raise ModelError(f"{tensor.name} has values that are not finite; expected the weights of a whole model")
            ratios[name_in_block][tensor.block] = signal_to_noise(weight.to(device))
    scores: list[list[float]] = [[] for _ in range(loaded.anatomy.block_count)]
    for by_block in ratios.values():
        largest = max(by_block.values()) or 1.0
        for block, ratio in by_block.items():
            scores[block].append(ratio / largest)
    return [sum(by_matrix) / len(by_matrix) if by_matrix else 0.0 for by_matrix in scores]


def signal_to_noise(weight: torch.Tensor) -> float:
    """Divide the sum of singular values above the noise edge by the sum below it and by the largest singular value.

    The edge is ``sigma * (1 + sqrt(rows / columns))`` with ``sigma`` the interquartile range of the singular values
    over 1.349, which is the standard deviation of a normal distribution.

    Args:
        weight: [rows, columns]; further leading dimensions (experts) are laid side by side.
    """
    matrix = weight.detach().float().reshape(-1, weight.shape[-1])
    values = torch.linalg.svdvals(matrix)
    low, high = torch.quantile(values, torch.tensor([0.25, 0.75], device=values.device)).tolist()
    edge = (high - low) / 1.349 * (1 + math.sqrt(min(matrix.shape) / max(matrix.shape)))
    signal, noise = float(values[values > edge].sum()), float(values[values <= edge].sum())
    largest = float(values[0]) or 1.0  # of zeros alone there is no signal
    return signal / noise / largest if noise else signal / largest


def gradient_scores(loaded: LoadedModel, examples: Sequence[Example]) -> list[float]:
    """Compute the 2-norm of the loss's gradient with respect to each block's tensors, averaged over single rows."""
    device = World().device
    model = loaded.model.to(device).eval()
    blocks = {t.name: t.block for t in loaded.anatomy.tensors if t.block is not None}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in blocks)
    suffix = Suffix(model, loaded.anatomy, boundary=None)
    check_fit(examples, model)
    pad_id = padding_id(loaded.tokenizer, model)
    scores = [0.0] * loaded.anatomy.block_count
    suffix.choose_shortcuts(None, collate([min(examples, key=len)], pad_id).to(device))
    for example in examples:
        batch = collate([example], pad_id).to(device)
        torch.autograd.backward(supervised_loss(suffix, None, batch, batch.supervised_tokens))
        squares = [0.0] * len(scores)
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                squares[blocks[name]] += float(parameter.grad.float().square().sum())
                parameter.grad = None
        scores = [score + math.sqrt(square) / len(examples) for score, square in zip(scores, squares, strict=True)]
    return scores


def _ranges(blocks: Sequence[int]) -> str:
    """Format sorted block numbers as in a selector: ``3,10-13``."""
    runs: list[list[int]] = []
    for block in blocks:
        if runs and block == runs[-1][-1] + 1:
            runs[-1].append(block)
        else:
            runs.append([block])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
