"""A backbone: the network that tasks share, from images to features."""

import dataclasses
import functools
import html
from collections.abc import Mapping
from typing import Any

import keras
import numpy as np

from k4p1 import errors
from k4p1.backbones import canonical, followers, input_scaling, placement, structure
from k4p1.backbones.site import LayerSite
from k4p1.backbones.variable_keys import variable_keys
from k4p1.files import content_hash, tensor_file

FILE_FORMAT = "k4p1-backbone"
FILE_VERSION = 1
UNTOUCHED = "untouched"
"""What a file says of a backbone whose own batch normalisation nobody has trained."""


@dataclasses.dataclass(eq=False, repr=False)
class Backbone:
    """A functional Keras model with canonical layer names, and how to build it again.

    Attributes:
      model: `keras.Model` from scaled images (batch, height, width, 3) to features (batch, features). Height and width
        are open: it is built once, and each task clones it with its own input size.
      name: what users call it, such as `mobilenet_v2`.
      config: arguments from which `k4p1.backbones.build` makes the same structure; plain JSON values.
      scaling: how pixels of 0 to 255 are scaled before the network, a name of `input_scaling.SCALINGS`.
      minimum_size: the smallest image side in pixels, or None if unknown.
      shared_trained: what `set_trainable` said last.
      normalisation: where the values of its own batch normalisation come from, if its tasks trained only private ones:
        `pooled over ...`, `that of ...` or `UNTOUCHED`; empty: they were trained with the rest.
      rebuilds: whether it is known that `config` makes the same structure again; see `build.check_round_trip`.

    Raises:
      ConfigError: not a functional model of one image input, or an unknown scaling.
    """

    model: keras.Model
    name: str
    config: Mapping[str, Any]
    scaling: str
    minimum_size: int | None = None
    shared_trained: bool = dataclasses.field(default=False, init=False)
    normalisation: str = dataclasses.field(default="", init=False)
    rebuilds: bool = False

    def __post_init__(self):
        if self.scaling not in input_scaling.SCALINGS:
            raise errors.ConfigError(errors.unknown("input scaling", self.scaling, input_scaling.SCALINGS))
        if not is_image_network(self.model):
            raise errors.ConfigError(
                f"backbone '{self.name}' must be a functional keras.Model from one tensor of images to one tensor of "
                f"features; got {_described(self.model)}. "
                "Build it with keras.Model(images, features), neither in a list nor in a dict"
            )
        if len(self.model.output.shape) != 2:
            raise errors.ConfigError(
                f"backbone '{self.name}' must output features (batch, n), got {self.model.output.shape}"
            )
        canonical.rename(self.model)

    def __repr__(self) -> str:
        options = {name: value for name, value in self.config.items() if name not in ("network", "keras_model")}
        shown = "".join(f", {name}={value!r}" for name, value in options.items())
        return f"Backbone('{self.name}'{shown}, {self.model.count_params():,} parameters, {self.features} features)"

    def _repr_html_(self) -> str:
        return f"<code>{html.escape(repr(self))}</code>"

    @functools.cached_property
    def sites(self) -> list[LayerSite]:
        """The layers that own variables, in topological order, with canonical name and place in the network."""
        leaves = canonical.leaf_layers(self.model)
        layers = [(name, layer) for name, layer in leaves if layer.weights]  # a dropout owns but a seed
        stages = placement.stages([name for name, _ in layers])
        positions, normalised = placement.block_positions(self.model), followers.normalised(self.model)
        return [
            LayerSite(name, layer, positions.get(id(layer)), stage, id(layer) in normalised)
            for (name, layer), stage in zip(layers, stages, strict=True)
        ]

    @property
    def features(self) -> int:
        """The number of features that the network outputs."""
        return self.model.output.shape[-1]

    def variables(self) -> dict[str, keras.Variable]:
        """Every variable by canonical key, `layer/variable`, random states left out."""
        found = {}
        for site in self.sites:
            keys = variable_keys(site.layer)
            floats = [v for v in site.layer.variables if keras.backend.is_float_dtype(v.dtype)]
            found |= {f"{site.name}/{keys[id(variable)]}": variable for variable in floats}
        return found

    def tensors(self) -> dict[str, np.ndarray]:
        """The values of `variables()`, on the host."""
        return {key: keras.ops.convert_to_numpy(v) for key, v in self.variables().items()}

    def assign(self, tensors: Mapping[str, np.ndarray]) -> None:
        """Writes values by canonical key.

        Raises:
          ArtifactError: a name, shape or type that does not fit; nothing is written then, and nothing is cast silently.
        """
        variables = self.variables()
        shapes = {key: v.shape for key, v in variables.items()}
        dtypes = {key: keras.backend.standardize_dtype(v.dtype) for key, v in variables.items()}
        tensor_file.check_fit(f"backbone '{self.name}'", shapes, tensors, dtypes)
        for key, variable in variables.items():
            variable.assign(tensors[key])
        for site in self.sites:
            if isinstance(site.layer, keras.layers.Normalization):
                site.layer.finalize_state()

    def set_trainable(self, trained: bool) -> None:
        """Says what plain `fit` and `summary` of a task model do with shared variables; the engine ignores it."""
        self.shared_trained = trained
        for site in self.sites:
            learned = learned_variables(site.layer)
            for variable in site.layer.variables:
                variable.trainable = trained and id(variable) in learned

    def structure_hash(self, version: int = structure.VERSION) -> str:
        """SHA-256 of what the network computes, the values of its variables aside; see `structure`.

        Args:
          version: of the description, as a file names it.
        """
        described = {"layers": structure.describe(self.model, version), "scaling": self.scaling}
        return content_hash.digest({}, described if version == 1 else {**described, "version": version})

    def fingerprint(self, version: int = structure.VERSION) -> str:
        """What a patch file is bound to: the hash of structure and of all shared values."""
        return content_hash.digest(self.tensors(), {"structure": self.structure_hash(version)})


def learned_variables(layer: keras.layers.Layer) -> set[int]:
    """The ids of the variables that gradients are meant to train, whether or not the layer is frozen at present."""
    return {id(variable) for part in layer._flatten_layers() for variable in part._trainable_variables}


def is_image_network(model: object) -> bool:
    """Whether a model is functional, from one tensor of images to one tensor."""
    return (
        hasattr(model, "_run_through_graph")
        and isinstance(model.input, keras.KerasTensor)
        and len(model.input.shape) == 4
        and isinstance(model.output, keras.KerasTensor)
    )


def _described(model: object) -> str:
    if not hasattr(model, "_run_through_graph"):
        return f"a {type(model).__name__}"
    shapes = [keras.tree.map_structure(lambda t: t.shape, side) for side in (model.input, model.output)]
    return f"one from {shapes[0]} to {shapes[1]}"
