"""The structure of a network as plain values: what its hash, and so the fingerprint of a backbone, is made of.

Two networks have the same structure if they compute the same function of their input and of the values of their variables:
the same operations with the same settings, fed by the same tensors at the same places, with the same constants. Names by
which parameters are stored count, too. Precision, initial values, seeds and what Keras calls trainable do not; nor does the
size of the input.
"""

import inspect
from collections.abc import Callable, Mapping, Set
from typing import Any

import keras
import numpy as np

from k4p1 import errors
from k4p1.backbones import canonical
from k4p1.files import content_hash

VERSION = 2
"""Of the description. Files name it; those that do not have version 1, which saw fewer settings."""

_SETTINGS_OF_VERSION_1 = (  # noqa: SIM905
    "filters kernel_size strides padding dilation_rate groups depth_multiplier units use_bias activation pool_size axis "
    "epsilon center scale offset max_value negative_slope threshold keepdims rate normalization target_shape size "
    "interpolation cropping"
).split()
_NO_PART_OF_THE_FUNCTION = frozenset(
    (
        "name",
        "dtype",
        "autocast",
        "trainable",
        "seed",
        "build_config",
        "module",
        "registered_name",
        "shared_object_id",
        "batch_shape",
        "batch_input_shape",
    )
)


def describe(model: keras.Model, version: int = VERSION) -> list[Any]:
    """The operations of a renamed model in topological order, inner models opened, as JSON values.

    Raises:
      ConfigError: a setting or constant that has no value that could be written down, such as a Python function; names it.
      ArtifactError: a version that this k4p1 does not know.
    """
    if version == 1:
        return _described_as_version_1(model)
    if version != VERSION:
        raise errors.ArtifactError(f"structures of version {version} are unknown; this k4p1 knows 1 and {VERSION}")
    return _described(model)


def _described(model: keras.Model) -> list[Any]:
    described = []
    for operation in canonical.operations(model):
        shapes = []
        if canonical.is_graph(operation):
            what: Any = _described(operation)
        else:
            what = _settings(operation)
            if isinstance(operation, keras.layers.Layer):
                floats = (v for v in operation.variables if keras.backend.is_float_dtype(v.dtype))
                shapes = [list(variable.shape) for variable in floats]
        described.append([operation.name, type(operation).__name__, what, shapes, _calls(operation, model)])
    return described


def _settings(operation: keras.Operation) -> dict[str, Any]:
    """Settings by name. Those at their default are left out, so that one that a later Keras adds changes no hash."""
    defaults = {name: parameter.default for name, parameter in inspect.signature(type(operation)).parameters.items()}
    plain = _plain_of(f"{type(operation).__name__} '{operation.name}'")
    settings = {}
    for name, value in operation.get_config().items():
        is_default = name not in _SETTINGS_OF_VERSION_1 and _is(value, defaults.get(name, inspect.Parameter.empty))
        if _counts(name, value) and not is_default:
            settings[name] = plain(value)
        elif name == "dtype" and isinstance(value, str) and not keras.backend.is_float_dtype(value):
            settings[name] = value  # a cast to whole numbers is no matter of precision
    return settings


def _counts(name: str, value: Any) -> bool:
    return value is not None and name not in _NO_PART_OF_THE_FUNCTION and not name.endswith("initializer")


def _is(value: Any, default: Any) -> bool:
    return type(value) is type(default) and isinstance(value, (bool, int, float, str)) and value == default


def _calls(operation: keras.Operation, model: keras.Model) -> list[Any]:
    """For each call within the model, its arguments: where each tensor comes from, and every other value."""
    if isinstance(model, keras.Sequential):  # the order of its layers says it all
        return []
    inside = {id(node) for nodes in model._nodes_by_depth.values() for node in nodes}
    plain = _plain_of(f"{type(operation).__name__} '{operation.name}'", inside)
    arguments = [node.arguments for node in operation._inbound_nodes if id(node) in inside]
    return [[plain(list(given.args)), plain(dict(given.kwargs))] for given in arguments]


def _source(tensor: keras.KerasTensor, inside: Set[int]) -> list[Any]:
    """The operation that puts a tensor out, which of its calls in the model, and which of the outputs of that call."""
    operation, node, output = tensor._keras_history
    if isinstance(operation, keras.layers.InputLayer):
        return ["input"]
    earlier = sum(id(one) in inside for one in operation._inbound_nodes[:node])
    return ["from", operation.name, earlier, output]


def _plain_of(where: str, inside: Set[int] = frozenset()) -> Callable[[Any], Any]:
    """A function from settings and arguments to JSON values; an error names `where`."""

    def plain(value: Any) -> Any:
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        if isinstance(value, keras.KerasTensor):
            return _source(value, inside)
        if isinstance(value, np.generic):  # as it is once it has been written and read
            return value.item()
        if isinstance(value, (keras.Variable, np.ndarray)) or keras.ops.is_tensor(value):
            array = keras.ops.convert_to_numpy(value)
            return array.item() if array.ndim == 0 else content_hash.digest({"constant": array})
        if isinstance(value, slice):
            return ["slice", plain(value.start), plain(value.stop), plain(value.step)]
        if value is Ellipsis:
            return ["ellipsis"]
        if isinstance(value, Mapping):
            items = sorted((str(key), one) for key, one in value.items() if _counts(str(key), one))
            return {key: plain(one) for key, one in items}
        if isinstance(value, (list, tuple)):
            return [plain(one) for one in value]
        raise errors.ConfigError(
            f"{where} has a setting of type {type(value).__name__}, which no file can hold: {value!r:.80}"
        )

    return plain


def _described_as_version_1(model: keras.Model) -> list[Any]:
    described = []
    for layer in canonical.operations(model):
        if canonical.is_graph(layer):
            what: Any = _described_as_version_1(layer)
        elif not isinstance(layer, keras.layers.Layer):
            described.append([layer.name, type(layer).__name__, _operation_1(layer), [], _sources_1(layer, model)])
            continue
        else:
            config = layer.get_config()
            what = {key: _plain_1(config[key]) for key in _SETTINGS_OF_VERSION_1 if config.get(key) is not None}
        shapes = [list(variable.shape) for variable in layer.variables if keras.backend.is_float_dtype(variable.dtype)]
        described.append([layer.name, type(layer).__name__, what, shapes, _sources_1(layer, model)])
    return described


def _sources_1(layer: keras.layers.Layer, model: keras.Model) -> list[list[str]]:
    if isinstance(model, keras.Sequential):
        return []
    inside = {id(operation) for operation in model.operations}
    calls = []
    for node in layer._inbound_nodes:
        parents = [parent.operation for parent in node.parent_nodes]
        if all(id(parent) in inside for parent in parents):
            calls.append(["input" if isinstance(p, keras.layers.InputLayer) else p.name for p in parents])
    return calls


def _operation_1(operation: keras.Operation) -> list[Any]:
    config = {key: _plain_1(value) for key, value in operation.get_config().items() if key not in ("name", "dtype")}
    constants = [
        _plain_1(value)
        for node in operation._inbound_nodes[:1]
        for value in keras.tree.flatten((node.arguments.args, node.arguments.kwargs))
        if not isinstance(value, keras.KerasTensor)
    ]
    return [config, constants]


def _plain_1(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    if hasattr(value, "shape"):
        return content_hash.digest({"constant": keras.ops.convert_to_numpy(value)})
    if isinstance(value, Mapping):
        config = value.get("config")
        if isinstance(config, Mapping):
            config = {k: _plain_1(v) for k, v in sorted(config.items()) if k in _SETTINGS_OF_VERSION_1}
        return {"class": value.get("class_name"), "config": config}
    if isinstance(value, (list, tuple)):
        return [_plain_1(v) for v in value]
    return value
