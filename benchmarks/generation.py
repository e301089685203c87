"""Answer the 64 Korean sample questions one by one and together, and compare the answers.

    python benchmarks/generation.py [--batch-sizes 8 16] [--max-new-tokens 64] [--rounds 1] [--save]

Each number of questions at once takes the same questions in the same process, with SmolLM2-135M in float32, greedily;
they take turns. Where an answer differs from the one given alone, the two best logits there are compared: rounding may
exchange tokens that lie within 0.001 of each other, and nothing else. Exits 1 if an answer differs otherwise, or if no
number of questions at once is three times as fast as one by one.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from benchmarks.report import head_lines, save, spread, table  # noqa: E402
from toolkit.config.schema import DataConfig, ModelConfig  # noqa: E402
from toolkit.data.examples import Encoder  # noqa: E402
from toolkit.data.model_limits import padding_id  # noqa: E402
from toolkit.data.questions import Questions  # noqa: E402
from toolkit.data.sources import Source, iter_rows  # noqa: E402
from toolkit.inference.generation import next_tokens  # noqa: E402
from toolkit.models.load import LoadedModel, load  # noqa: E402

LEAST_SPEEDUP, NEAR = 3.0, 1e-3
Prompts = Sequence[tuple[int, ...]]


def main() -> int:
    """Print the table as Markdown, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[8, 16])
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--questions", type=int, default=64, help="take the first so many")
    parser.add_argument("--model", default="bundled:smollm2-135m", help="default: the bundled model")
    parser.add_argument("--save", action="store_true", help="write the table to benchmarks/results")
    arguments = parser.parse_args()
    loaded = load(ModelConfig(name_or_path=arguments.model, dtype="float32"))
    loaded.model.eval()
    prompts = read_prompts(loaded, arguments.questions)
    sizes = [1, *arguments.batch_sizes]
    seconds: dict[int, list[float]] = {size: [] for size in sizes}
    answers: dict[int, list[list[int]]] = {}
    for _ in range(arguments.rounds):
        for size in sizes:
            begun = time.perf_counter()
            answers[size] = answer(loaded, prompts, size, arguments.max_new_tokens)
            seconds[size].append(time.perf_counter() - begun)
    parted = {size: find_parted(loaded, prompts, answers[1], answers[size]) for size in arguments.batch_sizes}
    text = head_lines() + "\n" + describe(prompts, arguments.max_new_tokens, seconds, answers, parted)
    print(text)
    if arguments.save:
        print(save("generation", text))
    too_far = [gap for gaps in parted.values() for _, gap in gaps.values() if gap > NEAR]
    best = max(median(speedups(seconds, size)) for size in arguments.batch_sizes)
    return int(bool(too_far) or best < LEAST_SPEEDUP)


def speedups(seconds: Mapping[int, list[float]], size: int) -> list[float]:
    """Return for each round how many times as fast as one by one it was."""
    return [alone / own for alone, own in zip(seconds[1], seconds[size], strict=True)]


def describe(
    prompts: Prompts, most: int, seconds: Mapping[int, list[float]], answers: Mapping[int, list[list[int]]],
    parted: Mapping[int, dict[int, tuple[int, float]]],
) -> str:  # fmt: skip
    """Return the table, and a line for each answer that differs from the one given alone."""
    lengths = [len(prompt) for prompt in prompts]
    rows = [
        [
            "one by one" if size == 1 else f"{size} at once", spread(own), spread(speedups(seconds, size), ".2f"),
            f"{sum(map(len, answers[size])) / median(own):.1f}", str(len(parted.get(size, {}))),
        ]
        for size, own in seconds.items()
    ]  # fmt: skip
    lines = [
        f"{len(prompts)} questions, prompts of {min(lengths)} to {max(lengths)} tokens, answers of at most {most}, "
        "float32, greedy.",
        "",
        table(["questions", "seconds", "times as fast", "tokens a second", "answers that differ"], rows),
        "",
    ]
    for size, gaps in parted.items():
        for row, (at, gap) in gaps.items():
            lines.append(
                f"- {size} at once, question {row + 1}, token {at + 1}: the two best logits are {gap:.1e} apart"
            )
    return "\n".join(lines)


def read_prompts(loaded: LoadedModel, count: int) -> Prompts:
    """Return the prompts of the Korean sample questions."""
    source = Source(str(ROOT / "examples" / "data" / "clinical_qa_ko.jsonl"))
    encoder = Encoder(loaded.tokenizer, 2048, loaded.ends)
    questions = Questions(lambda: iter_rows(source), DataConfig(), limit=count)
    return [encoder.prompt_ids(question.sample) for question in questions]


def answer(loaded: LoadedModel, prompts: Prompts, size: int, max_new_tokens: int) -> list[list[int]]:
    """Return the tokens of each answer, of ``size`` prompts of about the same length at once."""
    stops, pad_id = Encoder(loaded.tokenizer, 2048, loaded.ends).stop_ids(), padding_id(loaded.tokenizer, loaded.model)
    order = sorted(range(len(prompts)), key=lambda row: -len(prompts[row]))
    found: dict[int, list[int]] = {}
    for start in range(0, len(order), size):
        rows = order[start : start + size]
        lines = next_tokens(loaded.model, [prompts[row] for row in rows], stops, max_new_tokens, pad_id)
        found |= dict(zip(rows, lines, strict=True))
    return [found[row] for row in range(len(prompts))]


@torch.no_grad()
def find_parted(
    loaded: LoadedModel, prompts: Prompts, alone: Sequence[list[int]], together: Sequence[list[int]]
) -> dict[int, tuple[int, float]]:
    """Return for each question whose answers differ the token at which they do, and how far its best logits differ."""
    parted = {}
    for row, (one, other) in enumerate(zip(alone, together, strict=True)):
        if one != other:
            at = next(n for n, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1])
            logits = loaded.model(input_ids=torch.tensor([[*prompts[row], *one[:at]]])).logits[0, -1].float()
            best, second = logits.topk(2).values.tolist()
            parted[row] = (at, best - second)
    return parted


if __name__ == "__main__":
    sys.exit(main())
