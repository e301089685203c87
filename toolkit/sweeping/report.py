"""Write the table and the picture of a sweep into its directory."""

from __future__ import annotations

from toolkit.runtime.paths import explain_refused_write, replace_text
from toolkit.sweeping.picture import draw
from toolkit.sweeping.table import COSTS, front, markdown, points_of
from toolkit.sweeping.trials import Sweep

TABLE_FILE, PICTURE_FILE = "sweep.md", "sweep.svg"
"""In a sweep's directory."""


def write_report(sweep: Sweep) -> None:
    """Write ``sweep.md``, ``sweep.svg`` and ``sweep.json``, which says of each trial the costs whose front it is on.

    Raises:
        DiskError: the directory cannot be written.
    """
    fronts = {cost: [point.trial.number for point in front(points_of(sweep), cost)] for cost in COSTS}
    for trial in sweep.trials:
        if trial.result:
            trial.result["front"] = [cost for cost in COSTS if trial.number in fronts[cost]]
    for other in sweep.others:  # not in this table
        other.pop("front", None)
    sweep.save()
    with explain_refused_write(sweep.directory):
        replace_text(sweep.directory / TABLE_FILE, markdown(sweep))
        replace_text(sweep.directory / PICTURE_FILE, draw(sweep))
