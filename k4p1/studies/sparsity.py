"""How much of every layer the masks of a run take away (PB, Table 6 and Figure 3)."""

import pathlib
from collections.abc import Mapping, Sequence

from k4p1 import errors
from k4p1.files import atomic
from k4p1.patches.kinds.mask import LayerSparsity, sparsity
from k4p1.runs.model_dir import ModelDir

_FORMATS = (".png", ".svg", ".pdf")


def sparsity_of_tasks(model_dir: str | pathlib.Path, task: str | None = None) -> dict[str, list[LayerSparsity]]:
    """The sparsity of every masked layer, by task.

    Args:
      model_dir: of a finished run.
      task: one task, or None for all that have masks.

    Raises:
      ConfigError: an unknown task.
      ArtifactError: no finished run, or no task with a mask.
    """
    folder = ModelDir(model_dir)
    backbone = folder.load_backbone()
    found = {name: sparsity(folder.load_task(name, backbone)) for name in folder.chosen_tasks(task)}
    found = {name: layers for name, layers in found.items() if layers}
    if not found:
        raise errors.ArtifactError(f"no task of {folder.root} has a mask; train one with patch = 'mask+head'")
    return found


def total(layers: Sequence[LayerSparsity]) -> float:
    """The share of all masked weights that are zero, in [0, 1]."""
    return sum(layer.zeros for layer in layers) / sum(layer.weights for layer in layers)


def plot(found: Mapping[str, Sequence[LayerSparsity]], path: str | pathlib.Path) -> None:
    """Draws the share of weights masked out against the layers, one line per task (PB, Figure 3).

    Raises:
      ConfigError: a file name that is no picture's.
    """
    path = pathlib.Path(path).expanduser()
    if path.suffix.lower() not in _FORMATS:
        raise errors.ConfigError(f"{errors.option('plot')} {path}: expected a file name that ends in {', '.join(_FORMATS)}")
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(layer.layer for layers in found.values() for layer in layers))
    figure = Figure(figsize=(max(6.0, 0.16 * len(names) + 2.0), 4.0), layout="constrained")
    axes = figure.add_subplot()
    for task, layers in found.items():
        shares = {layer.layer: 100 * layer.zeros / layer.weights for layer in layers}
        where = [index for index, name in enumerate(names) if name in shares]
        label = f"{task}: {100 * total(layers):.1f}% in all"
        axes.plot(where, [shares[names[index]] for index in where], marker="o", markersize=3, label=label)
    axes.set_xticks(range(len(names)), names, rotation=90, fontsize=6)
    axes.set_ylabel("weights masked out (%)")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    with atomic.written_atomically(path) as partial:
        figure.savefig(partial, format=path.suffix[1:].lower(), dpi=150)
