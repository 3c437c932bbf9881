"""What workers have reported and nobody was told yet: sums, one per task and worker."""

from collections.abc import Mapping, Sequence

import numpy as np

from k4p1.engine.bookkeeping import StepReport


class WorkerReports:
    """Adds up the results of steps, so that a report costs the same however many steps there were.

    Args:
      terms: names of the terms of each task's loss; none where the loss is one term.

    Attributes:
      unfinite: the first step whose loss was not finite; None while all are.
    """

    def __init__(self, terms: Mapping[str, Sequence[str]]):
        self._terms = terms
        self._rows: dict[tuple[str, int], list[np.ndarray]] = {}
        self.unfinite: StepReport | None = None

    def add(self, task: str, worker: int, rows: np.ndarray) -> None:
        """Takes the rows of `several_steps.Results`."""
        self._rows.setdefault((task, worker), []).append(rows)
        finite = np.isfinite(rows[:, 0])
        if self.unfinite is None and not finite.all():
            self.unfinite = self._report(task, worker, rows[~finite][:1])

    def take(self) -> list[StepReport]:
        """One report per task and worker, of all steps since the last call; the first that is not finite comes first."""
        rows, self._rows = self._rows, {}
        found = [self._report(task, worker, np.concatenate(parts)) for (task, worker), parts in rows.items()]
        return found if self.unfinite is None else [self.unfinite, *found]

    def _report(self, task: str, worker: int, rows: np.ndarray) -> StepReport:
        loss, _, _, _, staleness, *terms = map(float, rows.mean(axis=0))
        _, examples, skipped, *_ = map(float, rows.sum(axis=0))
        return StepReport(
            task,
            int(rows[-1, 3]),
            loss,
            examples,
            skipped,
            staleness,
            worker,
            dict(zip(self._terms[task], terms, strict=True)),
            len(rows),
            float(rows[:, 4].max()),
        )
