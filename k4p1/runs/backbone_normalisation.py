"""What becomes of the backbone's own normalisation when every task has trained one of its own.

Nobody uses it then, and nobody has trained it: its means are 0, its scales 1, and `head` or frozen statistics on such a
backbone make no sense. So after multi-task training it gets the values of an average task.
"""

from collections.abc import Mapping, Sequence

import keras
import numpy as np

from k4p1 import errors
from k4p1.backbones.backbone import UNTOUCHED, Backbone
from k4p1.backbones.followers import NORMALISATIONS
from k4p1.patches.patched_model import PRIVATE, SHARED, PatchedModel

POOLED, NONE = "pooled", "none"
_STATISTICS = ("moving_mean", "moving_variance")
_VALUES = ("gamma", "beta", *_STATISTICS)
_PRIVATE_NAMES = {"scale": "gamma"}  # what RMS normalisation calls `scale`


def check(given: str, tasks: Sequence[str]) -> None:
    """Raises ConfigError unless a setting is `pooled`, `none` or the name of a task."""
    if given not in (POOLED, NONE, *tasks):
        raise errors.ConfigError(errors.unknown("backbone_normalisation", given, (POOLED, NONE, *tasks)))


def fill_in(backbone: Backbone, tasks: Mapping[str, PatchedModel], source: str) -> str:
    """Gives the normalisations that no task uses values of the tasks', and returns which, in a few words.

    With mean m_t and variance v_t of task t of T: `mean = E_t[m_t]`, `variance = E_t[v_t + m_t^2] - mean^2`, gamma and beta
    the means of the tasks'. No task model changes.

    Args:
      backbone: trained.
      tasks: their models by name.
      source: `pooled`, `none`, or the name of the task whose values it gets.

    Returns:
      What the backbone's file says of its normalisation; empty where the tasks have trained it themselves.
    """
    used = {id(p.variable) for patched in tasks.values() for p in patched.parameters if p.owner == SHARED}
    private = {name: _private(patched) for name, patched in tasks.items() if source in (POOLED, name)}
    unused = 0
    for site in backbone.sites:
        if not isinstance(site.layer, NORMALISATIONS):
            continue
        own = {_PRIVATE_NAMES.get(variable.name, variable.name): variable for variable in site.layer.variables}
        free = [name for name, variable in own.items() if id(variable) not in used]
        unused += bool(free)
        found = [values for task in private.values() if (values := task.get(site.name)) is not None]
        averages = _average([values for values in found if set(_VALUES) & set(values)])
        for name in free:
            if name in averages:
                own[name].assign(averages[name])
    if not unused:
        return ""
    if source == NONE:
        return UNTOUCHED
    return f"pooled over {', '.join(tasks)}" if source == POOLED else f"that of {source}"


def untouched_layers(backbone: Backbone, patched: PatchedModel) -> int:
    """How many batch normalisations a task model uses as they are shared, if all of them are as in a new network, else 0."""
    used = {id(p.variable) for p in patched.parameters if p.owner == SHARED}
    layers = [site.layer for site in backbone.sites if isinstance(site.layer, keras.layers.BatchNormalization)]
    layers = [layer for layer in layers if id(layer.moving_mean) in used]
    new = {"moving_mean": 0.0, "moving_variance": 1.0, "gamma": 1.0, "beta": 0.0}
    is_new = all(np.all(keras.ops.convert_to_numpy(v) == new[v.name]) for layer in layers for v in layer.variables)
    return len(layers) if is_new else 0


def _private(patched: PatchedModel) -> dict[str, dict[str, np.ndarray]]:
    """The private values of batch normalisations by layer and name."""
    found: dict[str, dict[str, np.ndarray]] = {}
    for p in patched.parameters:
        place, _, name = p.key.rpartition("/")
        if p.owner == PRIVATE and name in _VALUES and place.endswith(f"/{p.kind}"):
            values = np.asarray(keras.ops.convert_to_numpy(p.variable), np.float64)
            found.setdefault(place.removesuffix(f"/{p.kind}"), {})[name] = values
        elif p.owner == PRIVATE and name in _VALUES and p.kind == "full":
            found.setdefault(place, {})[name] = np.asarray(keras.ops.convert_to_numpy(p.variable), np.float64)
    return found


def _average(tasks: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    averages = {}
    for name in _VALUES:
        values = [task[name] for task in tasks if name in task]
        if values:
            averages[name] = np.mean(values, axis=0)
    with_statistics = [task for task in tasks if all(name in task for name in _STATISTICS)]
    if with_statistics:
        mean = np.mean([task["moving_mean"] for task in with_statistics], axis=0)
        square = np.mean([task["moving_variance"] + task["moving_mean"] ** 2 for task in with_statistics], axis=0)
        averages |= {"moving_mean": mean, "moving_variance": np.maximum(square - mean**2, 0.0)}
    return averages
