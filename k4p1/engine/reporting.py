"""What a run reports: progress bars, `metrics.jsonl`, `status.json`, TensorBoard."""

import json
import pathlib
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf
from rich import console as rich_console
from rich import progress as rich_progress

from k4p1 import log_lines
from k4p1.files import atomic
from k4p1.files.status_file import TRAINING, StatusFile

_PLAIN_LINE_SECONDS = 10.0
_SPEED_SECONDS = 10.0
_OF_WORKERS = ("loss", "steps_per_s", "examples_per_s", "staleness_mean", "staleness_max")


class Watcher:
    """Something that is told what a run reports; does nothing by itself."""

    @property
    def stops(self) -> bool:
        """Whether it asks that its task stops."""
        return False

    def resumed(self, done: Mapping[str, int]) -> None:
        """Training begins at these steps of the tasks."""

    def steps(self, done: Mapping[str, int], reports: Sequence[Any]) -> None:
        """Steps were taken (`StepReport`s)."""

    def evaluated(self, split: str, task: str, step: int, metrics: Mapping[str, float]) -> None:
        """A task was evaluated."""

    def settled(self, done: Mapping[str, int]) -> None:
        """All that belongs to the steps so far, evaluation included, was told."""

    def ended(self, done: Mapping[str, int]) -> None:
        """Training has ended."""


class Reporter:
    """Progress of every task and worker, on the terminal and in the model directory.

    On a terminal each task has a bar (loss, examples/s, time left); elsewhere a line every 10 s.

    Args:
      steps: step target of each task.
      model_dir: where `metrics.jsonl` and TensorBoard's files go; None for nowhere.
      quiet: show nothing on the terminal.
      status: of the run; None writes none.
      watchers: are told, too.
    """

    def __init__(
        self,
        steps: Mapping[str, int],
        model_dir: str | pathlib.Path | None = None,
        quiet: bool = False,
        status: StatusFile | None = None,
        watchers: Sequence[Watcher] = (),
    ):
        self._steps, self._watchers = dict(steps), tuple(watchers)
        self._folder = None if model_dir is None else pathlib.Path(model_dir)
        self._writers: dict[str, tf.summary.SummaryWriter] = {}
        self._console = rich_console.Console(file=sys.stderr, quiet=quiet, markup=False, emoji=False)
        self._speeds: dict[str, _Speed] = {}
        self._staleness: dict[str, _Staleness] = {}
        self._last_line = time.monotonic()
        self.status = status or StatusFile()
        self._progress = rich_progress.Progress(
            rich_progress.TextColumn("{task.description}", markup=False),
            rich_progress.BarColumn(),
            rich_progress.MofNCompleteColumn(),
            rich_progress.TextColumn(
                "loss {task.fields[loss]}  {task.fields[speed]} examples/s{task.fields[more]}", markup=False
            ),
            rich_progress.TimeRemainingColumn(),
            console=self._console,
            disable=quiet or not self._console.is_terminal,
        )
        self._bars: dict[str, rich_progress.TaskID] = {}

    def __enter__(self) -> "Reporter":
        self._progress.start()
        return self

    def __exit__(self, *_) -> None:
        self._progress.stop()
        for writer in self._writers.values():
            writer.close()

    def resumed(self, done: Mapping[str, int]) -> None:
        """Tells watchers at which steps training begins."""
        for watcher in self._watchers:
            watcher.resumed(done)

    def settled(self, done: Mapping[str, int]) -> None:
        """Tells watchers that all of the steps so far was told."""
        for watcher in self._watchers:
            watcher.settled(done)

    def ended(self, done: Mapping[str, int]) -> None:
        """Tells watchers that training has ended."""
        for watcher in self._watchers:
            watcher.ended(done)

    def steps(self, done: Mapping[str, int], reports: Sequence[Any]) -> None:
        """Reports how far each task is and what its steps since the last report gave (`StepReport`s)."""
        for watcher in self._watchers:
            watcher.steps(done, reports)
        found = {task: self._measure(task, [r for r in reports if r.task == task]) for task in self._steps}
        for task, target in self._steps.items():
            if task not in self._bars:
                self._bars[task] = self._progress.add_task(task, total=target, loss="-", speed="-", more="")
            values = found[task]
            if not values:
                continue
            terms = [f"{k.removeprefix('loss_')} {v:.3f}" for k, v in values.items() if k.startswith("loss_")]
            loss = f"{values['loss']:.3f}" + (f" ({', '.join(terms)})" if terms else "")
            more = f"  staleness {values['staleness_mean']:.1f}" if "staleness_mean" in values else ""
            speed = f"{values['examples_per_s']:,.0f}" if "examples_per_s" in values else "-"
            self._progress.update(self._bars[task], completed=done[task], loss=loss, speed=speed, more=more)
            self._log("train", task, done[task], values)
        workers = {
            worker: self._measure(f"worker {worker}", [r for r in reports if r.worker == worker])
            for worker in sorted({r.worker for r in reports if r.worker is not None})
        }
        if workers:
            columns = {key: [_short(values.get(key)) for values in workers.values()] for key in _OF_WORKERS}
            self._write({"kind": "workers", "step": sum(done.values()), "worker": list(workers), **columns})
        self.status.update(
            TRAINING,
            tasks={task: {"done": done[task], "target": target, **found[task]} for task, target in self._steps.items()},
            workers=workers,
        )
        if not self._console.is_terminal and time.monotonic() - self._last_line > _PLAIN_LINE_SECONDS:
            self._last_line = time.monotonic()
            if not self._console.quiet:
                text = "  ".join(
                    f"{task} {done[task]}/{target}" + (f" loss {found[task]['loss']:.3f}" if found[task] else "")
                    for task, target in self._steps.items()
                )
                tasks = {task: {"done": done[task], "target": target, **found[task]} for task, target in self._steps.items()}
                log_lines.record(text, event="progress", tasks=tasks)

    def _measure(self, name: str, reports: Sequence[Any]) -> dict[str, float]:
        """Mean loss, speed and staleness of steps."""
        if not reports:
            return {}
        counts = [r.count for r in reports]
        values = {"loss": _mean([r.loss for r in reports], counts)}
        if all(len(r.terms) > 1 for r in reports):
            for term in sorted(set().union(*(r.terms for r in reports))):
                having = [r for r in reports if term in r.terms]
                values[f"loss_{term}"] = _mean([r.terms[term] for r in having], [r.count for r in having])
        speed = self._speeds.setdefault(name, _Speed())
        values |= speed.after(sum(counts), sum(r.examples for r in reports))
        if reports[0].worker is not None:
            values |= self._staleness.setdefault(name, _Staleness()).after(reports)
        return values

    def progress(self, done: Mapping[str, int]) -> None:
        """Reports how far each task is, and nothing else."""
        for task, bar in self._bars.items():
            self._progress.update(bar, completed=done[task])
        tasks = {task: {"done": done[task], "target": target} for task, target in self._steps.items()}
        self.status.update(TRAINING, tasks=tasks)

    def evaluated(self, split: str, task: str, step: int, metrics: Mapping[str, float]) -> None:
        """Reports metrics of a task on a split."""
        for watcher in self._watchers:
            watcher.evaluated(split, task, step, metrics)
        values = {f"{split}_{name}": value for name, value in metrics.items() if name != "examples"}
        self._log("eval", task, step, values)
        self.status.update(tasks={task: values})

    def saved(self, done: Mapping[str, int]) -> None:
        """Keeps in `status.json` at which steps the newest checkpoint is."""
        self.status.update(tasks={task: {"saved": step} for task, step in done.items()})

    def message(self, text: str) -> None:
        """Prints a line above the bars, and keeps it in `status.json`."""
        self._console.print(text, highlight=False, soft_wrap=True)
        self.status.event(text)

    def _log(self, event: str, name: str, step: int, values: Mapping[str, float]) -> None:
        if self._folder is None:
            return
        self._write({"kind": event, "task": name, "step": step, **values})
        place = f"{event}/{name}"
        if place not in self._writers:
            self._writers[place] = tf.summary.create_file_writer(str(self._folder / place))
        with self._writers[place].as_default(step=step):
            for key, value in values.items():
                tf.summary.scalar(key, value)

    def _write(self, record: Mapping[str, Any]) -> None:
        if self._folder is None:
            return
        path = self._folder / "metrics.jsonl"
        try:
            with open(path, "a", encoding="utf-8") as f:
                f.write(json.dumps({**record, "time": round(time.time(), 3)}) + "\n")
        except OSError as e:
            raise atomic.storage_error(path, e) from e


def _mean(values: Sequence[float], counts: Sequence[int]) -> float:
    return float(np.mean(values) if max(counts) == 1 else np.average(values, weights=counts))


def _short(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.4g}")


class _Speed:
    """Steps and examples per second over the last ten seconds or so."""

    def __init__(self):
        self._moments: list[tuple[float, float, float]] = [(time.monotonic(), 0.0, 0.0)]

    def after(self, steps: int, examples: float) -> dict[str, float]:
        """Counts steps and examples; the speeds, or nothing right at the start."""
        now = time.monotonic()
        _, all_steps, all_examples = self._moments[-1]
        self._moments.append((now, all_steps + steps, all_examples + examples))
        while len(self._moments) > 2 and now - self._moments[1][0] > _SPEED_SECONDS:
            self._moments.pop(0)
        then, steps_then, examples_then = self._moments[0]
        seconds = now - then
        if seconds < 1e-3:
            return {}
        return {
            "steps_per_s": (self._moments[-1][1] - steps_then) / seconds,
            "examples_per_s": (self._moments[-1][2] - examples_then) / seconds,
        }


class _Staleness:
    """Updates by others between a step's read and its own update: mean and largest number since the start."""

    def __init__(self):
        self._count, self._sum, self._largest = 0, 0.0, 0.0

    def after(self, reports: Sequence[Any]) -> dict[str, float]:
        """Counts more steps."""
        for r in reports:
            largest = r.staleness if r.staleness_max is None else r.staleness_max
            self._count += r.count
            self._sum += r.count * r.staleness
            self._largest = max(self._largest, largest)
        return {"staleness_mean": self._sum / self._count, "staleness_max": self._largest}
