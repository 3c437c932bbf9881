"""What a run tells: progress bars, `metrics.jsonl`, TensorBoard."""

import json
import pathlib
import sys
import time
from collections.abc import Mapping

import tensorflow as tf
from rich import console as rich_console
from rich import progress as rich_progress

from k4p1 import artifact

_PLAIN_LINE_SECONDS = 10.0


class Reporter:
    """Progress of every task, on the terminal and in the model directory.

    On a terminal each task has a bar (loss, examples/s, time left); elsewhere a line every 10 s.

    Args:
      steps: step target of each task.
      model_dir: where `metrics.jsonl` and TensorBoard's files go; None for nowhere.
      quiet: show nothing on the terminal.
    """

    def __init__(self, steps: Mapping[str, int], model_dir: str | pathlib.Path | None = None, quiet: bool = False):
        self._steps = dict(steps)
        self._folder = None if model_dir is None else pathlib.Path(model_dir)
        self._writers: dict[str, tf.summary.SummaryWriter] = {}
        self._console = rich_console.Console(file=sys.stderr, quiet=quiet)
        self._started: dict[str, tuple[float, int]] = {}
        self._examples = dict.fromkeys(steps, 0.0)
        self._last_line = time.monotonic()
        self._progress = rich_progress.Progress(
            rich_progress.TextColumn("{task.description}"),
            rich_progress.BarColumn(),
            rich_progress.MofNCompleteColumn(),
            rich_progress.TextColumn("loss {task.fields[loss]}  {task.fields[speed]} examples/s"),
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

    def steps(self, done: Mapping[str, int], losses: Mapping[str, float], examples: Mapping[str, float]) -> None:
        """Reports how far each task is, its mean loss and its examples since the last report."""
        now = time.monotonic()
        for task, target in self._steps.items():
            if task not in self._bars:
                self._bars[task] = self._progress.add_task(task, total=target, loss="-", speed="-")
            if task not in losses:
                continue
            start, _ = self._started.setdefault(task, (now, done[task]))
            self._examples[task] += examples[task]
            speed = self._examples[task] / (now - start) if now > start else 0.0
            self._progress.update(self._bars[task], completed=done[task], loss=f"{losses[task]:.3f}", speed=f"{speed:,.0f}")
            self._log("train", task, done[task], {"loss": losses[task]})
        if not self._console.is_terminal and now - self._last_line > _PLAIN_LINE_SECONDS:
            self._last_line = now
            self._console.print(
                "  ".join(
                    f"{task} {done[task]}/{target}" + (f" loss {losses[task]:.3f}" if task in losses else "")
                    for task, target in self._steps.items()
                ),
                highlight=False,
                soft_wrap=True,
            )

    def evaluated(self, split: str, task: str, step: int, metrics: Mapping[str, float]) -> None:
        """Reports metrics of a task on a split."""
        values = {f"{split}_{name}": value for name, value in metrics.items() if name != "examples"}
        self._log("eval", task, step, values)

    def message(self, text: str) -> None:
        """Prints a line above the bars."""
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def _log(self, kind: str, task: str, step: int, values: Mapping[str, float]) -> None:
        if self._folder is None:
            return
        record = {"kind": kind, "task": task, "step": step, "time": round(time.time(), 3), **values}
        path = self._folder / "metrics.jsonl"
        try:
            with open(path, "a", encoding="utf-8") as f:
                f.write(json.dumps(record) + "\n")
        except OSError as e:
            raise artifact.storage_error(path, e) from e
        name = f"{kind}/{task}"
        if name not in self._writers:
            self._writers[name] = tf.summary.create_file_writer(str(self._folder / name))
        with self._writers[name].as_default(step=step):
            for key, value in values.items():
                tf.summary.scalar(key, value)
