"""Keys of the variables of a layer: the same for every build of it in any process."""

import functools
import re
from collections import Counter

import keras

from k4p1.backbones import canonical


def variable_keys(layer: keras.layers.Layer) -> dict[int, str]:
    """The key of each variable by its id.

    It is the variable's name, or the attribute that holds it where it was given none and Keras counts (`variable_18`).
    Names that repeat, as in attention and recurrent layers, stand behind the path of the sublayer that owns the variable,
    `query/kernel`; automatic names of sublayers are numbered within the layer, as Keras does in a new process. Variables
    that are then still alike are told apart by their rank.
    """
    named = _names(layer)
    names = Counter(named.values())
    repeated = [variable for variable in layer.variables if names[named[id(variable)]] > 1]
    keys = {variable: name for variable, name in named.items() if names[name] == 1}
    if not repeated:
        return keys
    sublayers = _canonical_names(layer)
    paths = {id(variable): _path(variable, named[id(variable)], sublayers) for variable in repeated}
    counts, seen = Counter(paths.values()), Counter()
    for variable in repeated:
        path = paths[id(variable)]
        keys[id(variable)] = path if counts[path] == 1 else f"{seen[path]}/{path}"
        seen[path] += 1
    return keys


def _names(layer: keras.layers.Layer) -> dict[int, str]:
    """Names of variables by id; those that Keras counts through the process become `variable`, or their attribute's name."""
    names = {id(variable): variable.name for variable in layer.variables}
    counted = {key for key, name in names.items() if _COUNTED.fullmatch(name)}
    if counted:
        names |= dict.fromkeys(counted, "variable")
        for part in layer._flatten_layers():
            held = {id(value): attribute.strip("_") for attribute, value in vars(part).items()}
            names |= {key: held[key] for key in counted & set(held)}
    return names


_COUNTED = re.compile(r"variable(_\d+)?")


def _path(variable: keras.Variable, name: str, sublayers: dict[str, str]) -> str:
    parts = [*variable.path.split("/")[:-1], name]
    within = parts if parts[0] in sublayers else parts[1:]  # the first is the layer, under the name that it was built with
    return "/".join(sublayers.get(part, part) for part in within)


def _canonical_names(layer: keras.layers.Layer) -> dict[str, str]:
    """Names of sublayers to those that they have in every process."""
    found: dict[str, str] = {}
    ranks: Counter[str] = Counter()
    for part in layer._flatten_layers(include_self=False):
        if part.name in found:
            continue
        stems = [part] if not hasattr(part, "layer") else [part, part.layer]
        automatic = next((match for one in stems if (match := _automatic(canonical.stem(one)).fullmatch(part.name))), None)
        if automatic is None:
            found[part.name] = part.name
            continue
        stem = automatic[1]
        found[part.name] = stem if not ranks[stem] else f"{stem}_{ranks[stem]}"
        ranks[stem] += 1
    return found


@functools.cache
def _automatic(stem: str) -> re.Pattern:
    """Names such as `lstm_3`, and `forward_lstm_3`, which Keras makes of it."""
    return re.compile(rf"((?:(?:forward|backward)_)?{stem})(?:_\d+)?")
