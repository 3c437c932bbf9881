"""Pictures of tailored networks: blocks in a row, proxies above them, what is gone faint (NT, Figure 4)."""

import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from k4p1 import errors
from k4p1.patches import patch_file
from k4p1.patches.tailored import paths
from k4p1.patches.tailored.network import TailoredNetwork
from k4p1.patches.tailored.paths import Path
from k4p1.runs.model_dir import ModelDir
from k4p1.tasks.tailoring import attention_metric

PICTURES, ANIMATIONS = (".svg", ".png", ".pdf"), (".gif",)
_GREY, _GREEN, _ARC = "#8a8f98", "#3f9b62", "#3f6f9b"
_FAINT = 0.12


@dataclasses.dataclass(frozen=True)
class Drawn:
    """What a picture shows of a task.

    Attributes:
      task: its name.
      blocks: names of the backbone's blocks.
      possible: all paths, before pruning.
      attention: of the live ones.
      caption: a line under the picture.
    """

    task: str
    blocks: tuple[str, ...]
    possible: tuple[Path, ...]
    attention: Mapping[Path, float]
    caption: str


def draw(model_dirs: Sequence[str | pathlib.Path], output: str | pathlib.Path, task: str | None = None) -> pathlib.Path:
    """Draws the tailored tasks of finished runs, one above the other with the same blocks aligned.

    A `.gif` shows the course of one task's training instead: its student, then what pruning left.

    Args:
      model_dirs: folders of finished runs on the same backbone.
      output: the file: `.svg`, `.png`, `.pdf` or `.gif`.
      task: one task, or None for all.

    Raises:
      ConfigError: a file name that is no picture's, or backbones of other blocks.
      ArtifactError: no tailored task.
    """
    output = pathlib.Path(output).expanduser()
    if output.suffix.lower() not in (*PICTURES, *ANIMATIONS):
        allowed = ", ".join((*PICTURES, *ANIMATIONS))
        raise errors.ConfigError(f"{errors.option('output')} {output}: expected a file name that ends in {allowed}")
    found = [drawn for folder in model_dirs for drawn in _tasks(ModelDir(folder), task)]
    if not found:
        raise errors.ArtifactError(f"no task of {', '.join(map(str, model_dirs))} has a tailored network")
    for other in found[1:]:
        if other.blocks != found[0].blocks:
            raise errors.ConfigError(
                f"tasks '{found[0].task}' and '{other.task}' have other blocks ({len(found[0].blocks)}, "
                f"{len(other.blocks)}); draw tasks of one backbone together"
            )
    output.parent.mkdir(parents=True, exist_ok=True)
    if output.suffix.lower() in ANIMATIONS:
        if len(found) > 1:
            raise errors.ConfigError(
                f"an animation shows one task; give {errors.option('task')}, one of {', '.join(d.task for d in found)}"
            )
        _animate(found[0], _course(ModelDir(model_dirs[0]), found[0]), output)
        return output
    figure = _figure(found)
    _draw_all(figure, found)
    figure.savefig(output, dpi=160)
    return output


def _tasks(folder: ModelDir, task: str | None) -> list[Drawn]:
    backbone = folder.load_backbone()
    found = []
    for name in folder.chosen_tasks(task):
        if patch_file.read_info(folder.patch(name)).spec.get("nettailor") is None:
            continue
        patched = folder.load_task(name, backbone)
        network = patched.rewiring
        assert isinstance(network, TailoredNetwork)
        facts = network.facts()
        share = facts["live_multiply_adds"] / facts["backbone_multiply_adds"]
        caption = (
            f"{name}: {facts['live_blocks']} of {facts['blocks']} blocks, {facts['live_proxies']} proxies, "
            f"{facts['live_parameters']:,} of {facts['backbone_parameters']:,} parameters, {share:.0%} of the multiply-adds"
        )
        ends = tuple(block.end for block in network.blocks)
        possible = paths.full(len(ends), patched.spec.get("nettailor").k)
        found.append(Drawn(name, ends, possible, network.attention_now(), caption))
    return found


def _figure(found: Sequence[Drawn], note: bool = False) -> Any:
    from matplotlib.figure import Figure

    blocks, span = len(found[0].blocks), max(_span(drawn) for drawn in found)
    height = 1.5 + 0.45 * span
    return Figure(figsize=(1.1 * (blocks + 2), height * len(found)), layout="constrained")


def _span(drawn: Drawn) -> int:
    return max((path.node - path.source for path in drawn.possible if not path.is_main), default=1)


def _draw_all(figure: Any, found: Sequence[Drawn]) -> None:
    for axes, drawn in zip(figure.subplots(len(found), 1, squeeze=False)[:, 0], found, strict=True):
        _draw(axes, drawn)


def _draw(axes: Any, drawn: Drawn) -> None:
    """One network: stem, blocks and head in a row; a proxy hangs over the middle of its span, at its span's height."""
    from matplotlib.patches import FancyBboxPatch, Rectangle

    count = len(drawn.blocks)
    axes.set_xlim(-1.0, count + 1.2)
    axes.set_ylim(-1.0, 0.9 + 0.75 * _span(drawn))
    axes.set_axis_off()
    reached = {0, *(path.node for path in drawn.attention)}

    def box(x: float, label: str, colour: str, opacity: float) -> None:
        axes.add_patch(Rectangle((x - 0.28, -0.28), 0.56, 0.56, facecolor=colour, alpha=max(opacity, _FAINT), linewidth=0))
        axes.text(x, 0.0, label, ha="center", va="center", fontsize=8, color="black" if opacity < 0.5 else "white")

    def arc(start: tuple[float, float], end: tuple[float, float], opacity: float, bend: float) -> None:
        style = {"arrowstyle": "-|>", "connectionstyle": f"arc3,rad={bend}", "color": _ARC, "alpha": max(opacity, _FAINT)}
        axes.annotate("", xy=end, xytext=start, arrowprops={**style, "linewidth": 1.0, "shrinkA": 2, "shrinkB": 2})

    box(-0.5, "stem", _GREY, 1.0)
    box(count + 0.7, "head", _GREEN, 1.0)
    for node in range(count + 1):  # nodes stand between the blocks
        x = _node(node)
        axes.plot([x], [0.0], "o", color="black", markersize=3.5, alpha=1.0 if node in reached else _FAINT, zorder=3)
    for number in range(1, count + 1):
        opacity = drawn.attention.get(Path(number, number - 1, True), 0.0)
        box(number - 0.5 + 0.1, str(number), _GREY, opacity)
    for path in drawn.possible:
        if path.is_main:
            continue
        opacity = drawn.attention.get(path, 0.0)
        if not opacity:
            continue
        start, end = _node(path.source), _node(path.node)
        height = 0.75 * (path.node - path.source)
        middle = (start + end) / 2
        axes.add_patch(
            FancyBboxPatch(
                (middle - 0.2, height - 0.09),
                0.4,
                0.18,
                boxstyle="round,pad=0.02,rounding_size=0.08",
                facecolor=_GREEN,
                alpha=max(opacity, _FAINT),
                linewidth=0,
            )
        )
        arc((start, 0.05), (middle - 0.2, height), opacity, -0.25)
        arc((middle + 0.2, height), (end, 0.05), opacity, -0.25)
    axes.text(-0.78, -0.75, drawn.caption, fontsize=8, va="center")


def _node(number: int) -> float:
    """Where a node stands; block i is between nodes i - 1 and i."""
    return number + 0.1


def _course(folder: ModelDir, drawn: Drawn) -> list[tuple[str, dict[Path, float]]]:
    """The attention of every path at each evaluation, of the student and then of what pruning left; a title each."""
    stages = folder.root / "stages"
    result = json.loads(folder.result.read_text(encoding="utf-8"))["tasks"][drawn.task]
    runs = [("student", stages / "student"), ("pruned, trained again", stages / f"removed_{result.get('removed_blocks')}")]
    if not stages.is_dir():
        runs = [("training", folder.root)]
    names = {f"validation_{attention_metric(path)}": path for path in drawn.possible}
    found: list[tuple[str, dict[Path, float]]] = []
    for title, place in runs:
        log = place / "metrics.jsonl"
        for line in log.read_text(encoding="utf-8").splitlines() if log.is_file() else ():
            record = json.loads(line)
            attention = {path: record[name] for name, path in names.items() if name in record}
            if attention and record.get("task") == drawn.task:
                found.append((f"{title}, step {record['step']:,}", attention))
    found.append(("at the end", dict(drawn.attention)))
    if len(found) < 2:
        raise errors.ArtifactError(
            f"{folder.root} holds no course of attention; it is logged at each evaluation where the loss has the term "
            "'complexity'"
        )
    return found


def _animate(drawn: Drawn, course: Sequence[tuple[str, Mapping[Path, float]]], output: pathlib.Path) -> None:
    from matplotlib import animation

    figure = _figure([drawn])
    axes = figure.subplots()

    def show(number: int) -> None:
        axes.clear()
        title, attention = course[number]
        _draw(axes, dataclasses.replace(drawn, attention=attention, caption=f"{drawn.task}: {title}"))

    frames = [*range(len(course)), *[len(course) - 1] * 3]
    moving = animation.FuncAnimation(figure, show, frames=frames, interval=400)
    moving.save(str(output), writer=animation.PillowWriter(fps=2.5), dpi=100)
