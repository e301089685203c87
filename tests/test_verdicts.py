"""What is claimed of many metrics at once."""

from __future__ import annotations

import numpy as np

from toolkit.evaluation.verdicts import Entry, Resampling, judge
from toolkit.metrics.metric import mean_metric


def test_metrics_of_labels_leave_the_others_their_verdicts() -> None:
    """A clear difference is said beside 80 recalls of which none differs, and not of one recall among them."""
    draw = np.random.default_rng(0)
    worse, better = draw.normal(0, 1, 200), draw.normal(0, 1, 200)
    names = ["accuracy", "macro_f1", *(f"recall/{number}" for number in range(80))]
    clear = {"macro_f1", "recall/7"}
    base = {name: mean_metric(name, worse) for name in names}
    run = {name: mean_metric(name, worse + 1 if name in clear else worse + 0.01 * better) for name in names}
    _, scores = judge([Entry("base", base), Entry("run", run)], "base", "accuracy", Resampling([None] * 200, 0))
    assert scores.scores["macro_f1"].verdict == "better"
    assert scores.scores["recall/7"].verdict == "no difference shown"
    assert {scores.scores[name].verdict for name in names if name not in clear} == {"no difference shown"}
