"""A backbone: the network that tasks share, from images to features."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import keras
import numpy as np

from k4p1 import errors
from k4p1.backbones import canonical, input_scaling, placement
from k4p1.backbones.site import LayerSite
from k4p1.files import content_hash, tensor_file

_STRUCTURAL = (  # noqa: SIM905
    "filters kernel_size strides padding dilation_rate groups depth_multiplier units use_bias activation pool_size axis "
    "epsilon center scale offset max_value negative_slope threshold keepdims rate normalization target_shape size "
    "interpolation cropping"
).split()

FILE_FORMAT = "k4p1-backbone"
FILE_VERSION = 1


@dataclasses.dataclass(eq=False)
class Backbone:
    """A functional Keras model with canonical layer names, and how to build it again.

    Attributes:
      model: `keras.Model` from scaled images (batch, height, width, 3) to features (batch, features). Height and width
        are open: it is built once, and each task clones it with its own input size.
      name: what users call it, such as `mobilenet_v2`.
      config: arguments from which `k4p1.backbones.build` makes the same structure; plain JSON values.
      scaling: how pixels of 0 to 255 are scaled before the network, a name of `input_scaling.SCALINGS`.
      minimum_size: the smallest image side in pixels, or None if unknown.

    Raises:
      ConfigError: not a functional model of one image input, or an unknown scaling.
    """

    model: keras.Model
    name: str
    config: Mapping[str, Any]
    scaling: str
    minimum_size: int | None = None

    def __post_init__(self):
        if self.scaling not in input_scaling.SCALINGS:
            raise errors.ConfigError(errors.unknown("input scaling", self.scaling, input_scaling.SCALINGS))
        if not hasattr(self.model, "_run_through_graph") or len(self.model.inputs) != 1:
            raise errors.ConfigError(
                f"backbone '{self.name}' must be a functional keras.Model with one image input; got "
                f"{type(self.model).__name__}. Build it with keras.Model(inputs, features)"
            )
        if len(self.model.output.shape) != 2:
            raise errors.ConfigError(
                f"backbone '{self.name}' must output features (batch, n), got {self.model.output.shape}"
            )
        canonical.rename(self.model)

    @functools.cached_property
    def sites(self) -> list[LayerSite]:
        """The layers that own variables, in topological order, with canonical name and place in the network."""
        leaves = canonical.leaf_layers(self.model)
        layers = [(name, layer) for name, layer in leaves if layer.weights]  # a dropout owns but a seed
        stages = placement.stages([name for name, _ in layers])
        positions = placement.block_positions(self.model)
        return [
            LayerSite(name, layer, positions.get(id(layer)), stage)
            for (name, layer), stage in zip(layers, stages, strict=True)
        ]

    @property
    def features(self) -> int:
        """The number of features that the network outputs."""
        return self.model.output.shape[-1]

    def variables(self) -> dict[str, keras.Variable]:
        """Every variable by canonical key, `layer/variable`, random states left out."""
        return {
            f"{site.name}/{variable_key(variable, site.layer)}": variable
            for site in self.sites
            for variable in site.layer.variables
            if keras.backend.is_float_dtype(variable.dtype)
        }

    def tensors(self) -> dict[str, np.ndarray]:
        """The values of `variables()`, on the host."""
        return {key: keras.ops.convert_to_numpy(v) for key, v in self.variables().items()}

    def assign(self, tensors: Mapping[str, np.ndarray]) -> None:
        """Writes values by canonical key.

        Raises:
          ArtifactError: a name or shape that does not fit; nothing is written then.
        """
        tensor_file.check_fit(f"backbone '{self.name}'", {key: v.shape for key, v in self.variables().items()}, tensors)
        for key, variable in self.variables().items():
            variable.assign(tensors[key])
        for site in self.sites:
            if isinstance(site.layer, keras.layers.Normalization):
                site.layer.finalize_state()

    def set_trainable(self, trained: bool) -> None:
        """Says what plain `fit` and `summary` of a task model do with shared variables; the engine ignores it."""
        for site in self.sites:
            learned = learned_variables(site.layer)
            for variable in site.layer.variables:
                variable.trainable = trained and id(variable) in learned

    def structure_hash(self) -> str:
        """SHA-256 of layers, connections and variable shapes; input size and input name are no part of it."""
        return content_hash.digest({}, {"layers": _describe(self.model), "scaling": self.scaling})

    def fingerprint(self) -> str:
        """What a patch file is bound to: the hash of structure and of all shared values."""
        return content_hash.digest(self.tensors(), {"structure": self.structure_hash()})


def learned_variables(layer: keras.layers.Layer) -> set[int]:
    """The ids of the variables that gradients are meant to train, whether or not the layer is frozen at present."""
    return {id(variable) for part in layer._flatten_layers() for variable in part._trainable_variables}


def variable_key(variable: keras.Variable, layer: keras.layers.Layer) -> str:
    """The variable's name in its layer; with its path inside the layer where names repeat (attention, recurrent)."""
    names = [v.name for v in layer.variables]
    return variable.name if names.count(variable.name) == 1 else "/".join(variable.path.split("/")[1:])


def _describe(model: keras.Model) -> list[Any]:
    described = []
    for layer in canonical.operations(model):
        if canonical.is_graph(layer):
            what: Any = _describe(layer)
        elif not isinstance(layer, keras.layers.Layer):
            described.append([layer.name, type(layer).__name__, _operation(layer), [], _sources(layer, model)])
            continue
        else:
            config = layer.get_config()
            what = {key: _plain(config[key]) for key in _STRUCTURAL if config.get(key) is not None}
        shapes = [list(variable.shape) for variable in layer.variables if keras.backend.is_float_dtype(variable.dtype)]
        described.append([layer.name, type(layer).__name__, what, shapes, _sources(layer, model)])
    return described


def _sources(layer: keras.layers.Layer, model: keras.Model) -> list[list[str]]:
    """For each call of the layer within the model, the names of the layers that feed it."""
    if isinstance(model, keras.Sequential):  # the order of its layers says it all
        return []
    inside = {id(operation) for operation in model.operations}
    calls = []
    for node in layer._inbound_nodes:
        parents = [parent.operation for parent in node.parent_nodes]
        if all(id(parent) in inside for parent in parents):
            calls.append(["input" if isinstance(p, keras.layers.InputLayer) else p.name for p in parents])
    return calls


def _operation(operation: keras.Operation) -> list[Any]:
    """The settings and constants of an operation that is no layer, such as `x * 0.1`."""
    config = {key: _plain(value) for key, value in operation.get_config().items() if key not in ("name", "dtype")}
    constants = [
        _plain(value)
        for node in operation._inbound_nodes[:1]
        for value in keras.tree.flatten((node.arguments.args, node.arguments.kwargs))
        if not isinstance(value, keras.KerasTensor)
    ]
    return [config, constants]


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):  # as it is once it has been written and read
        return value.item()
    if hasattr(value, "shape"):
        return content_hash.digest({"constant": keras.ops.convert_to_numpy(value)})
    if isinstance(value, Mapping):  # a serialized object, such as an activation layer
        return {"class": value.get("class_name"), "config": _plain_config(value.get("config"))}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value


def _plain_config(config: Any) -> Any:
    if not isinstance(config, Mapping):
        return config
    return {k: _plain(v) for k, v in sorted(config.items()) if k in _STRUCTURAL}
