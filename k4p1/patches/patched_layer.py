"""Layers of a task model: views of shared layers, private copies of them, and shared layers with private variables.

No layer of the backbone is ever called by a task model. It calls a view (same variables, own graph nodes) or a patched
layer, so that a task that is deleted frees its memory and a backbone does not grow with the tasks built on it.
"""

import dataclasses
from collections.abc import Callable, Mapping

import keras

from k4p1 import errors
from k4p1.backbones.view import view
from k4p1.patches.bit_packing import BitPacking

TRAINED = "trained"
FIXED = "fixed"
STATISTICS = "statistics"
RANDOM = "random"


@dataclasses.dataclass(frozen=True)
class PrivateVariable:
    """A variable that one task owns.

    Attributes:
      kind: the patch kind that created it.
      name: its name within layer and kind, such as `gamma`.
      variable: the `keras.Variable`.
      role: `trained` (by gradients), `fixed`, `statistics` (moved by forward passes), or `random` (a seed).
      storage: how a patch file holds it; None: as it is.
    """

    kind: str
    name: str
    variable: keras.Variable
    role: str
    storage: BitPacking | None = None


def private_copy(layer: keras.layers.Layer) -> keras.layers.Layer:
    """A new layer of the same configuration and values that shares nothing with `layer`."""
    if not isinstance(layer, keras.layers.Layer):  # an operation such as the `+` of `x + y`: it owns nothing
        return view(layer, True)
    copy = type(layer).from_config(layer.get_config())
    copy.build_from_config(layer.get_build_config())
    if len(copy.variables) != len(layer.variables):  # its sublayers are built when it is called
        _call_as(copy, layer)
    if [v.shape for v in copy.variables] != [v.shape for v in layer.variables]:
        raise errors.PatchError(
            f"{type(layer).__name__} '{layer.name}' cannot be copied: built again from its configuration it has other "
            "variables; get_config must return every argument, and build must build the sublayers"
        )
    for mine, theirs in zip(copy.variables, layer.variables, strict=True):
        mine.assign(theirs)
    if isinstance(copy, keras.layers.Normalization):
        copy.finalize_state()
    copy.trainable = True
    return copy


def _call_as(copy: keras.layers.Layer, layer: keras.layers.Layer) -> None:
    """Calls a layer on inputs such as another one was called on."""
    arguments = layer._inbound_nodes[0].arguments

    def placeholder(value):
        is_tensor = isinstance(value, keras.KerasTensor)
        return keras.Input(batch_shape=value.shape, dtype=value.dtype) if is_tensor else value

    args, kwargs = keras.tree.map_structure(placeholder, (tuple(arguments.args), dict(arguments.kwargs)))
    copy(*args, **kwargs)
    copy.__dict__.update(_inbound_nodes=[], _outbound_nodes=[])


def copy_of(variable: keras.Variable) -> Callable:
    """An initializer that gives the present value of `variable`."""
    return lambda shape, dtype=None: keras.ops.cast(keras.ops.convert_to_tensor(variable), dtype or variable.dtype)


class LayerPatch(keras.layers.Layer):
    """What one patch kind does to one convolution or dense layer; it owns the private variables.

    A layer computes `activation(op(x, kernel) + bias)`. A patch may change the kernel, or the linear output before the
    activation. `replaces` names the shared variables that the patched layer no longer uses.
    """

    kind: str = ""
    replaces: frozenset[str] = frozenset()

    def bind(self, layer: keras.layers.Layer) -> None:
        """Creates the private variables for the shared, built `layer`, with values that leave its output unchanged."""
        raise TypeError(f"{type(self).__name__} must create its variables")

    def adopt(self, factors: Mapping[str, keras.Variable]) -> None:
        """Takes variables that tasks share in place of its own, by name, before `bind` (joint compression)."""
        if factors:
            raise errors.PatchError(f"patch '{self.kind}' has no factors to share; got {', '.join(sorted(factors))}")

    def kernel(self, kernel, training: bool = False):
        """The kernel to use in place of `kernel` (None if it is replaced)."""
        return kernel

    def output(self, outputs, inputs, training: bool = False):
        """The linear output to use in place of `outputs`, (..., channels); `inputs` are those of the layer."""
        return outputs

    def multiply_adds(self, layer: keras.layers.Layer, positions: int) -> int:
        """What it adds to the multiply-adds of one image before folding; `positions` are height times width put out."""
        return 0

    def fold(self, kernel, bias, layer, others):
        """What `output` does, written into numpy arrays: returns (kernel, bias, others).

        `kernel` has been through `kernel()` of all patches and `bias` is never None; `others` holds further variables of
        `layer` that change, by name.
        """
        if type(self).output is not LayerPatch.output:
            raise TypeError(f"{type(self).__name__} cannot be folded")
        return kernel, bias, others

    def private_variables(self) -> list[PrivateVariable]:
        """The variables of this patch, all trained unless a kind says otherwise; seeds are not listed."""
        floats = [v for v in self.variables if keras.backend.is_float_dtype(v.dtype)]
        return [PrivateVariable(self.kind, v.name, v, TRAINED if v.trainable else FIXED) for v in floats]


class PatchedLayer(keras.layers.Layer):
    """A shared layer with private variables; base of the patched layers.

    The shared layer itself is not tracked as a sublayer: only the variables that the patched layer still uses are, so a
    replaced kernel or statistic is neither counted nor saved as part of the task.
    """

    def __init__(self, layer: keras.layers.Layer, **kwargs):
        kwargs.setdefault("name", layer.name)
        kwargs.setdefault("dtype", layer.dtype_policy)
        super().__init__(**kwargs)
        self.__dict__["layer"] = layer

    def build(self, input_shape):
        if not self.layer.built:  # read from a file: the shared layer comes with it
            self.layer.build(input_shape)
        self.bind()

    def bind(self) -> None:
        """Creates the private variables and picks the shared ones that stay in use."""
        raise TypeError(f"{type(self).__name__} must create its variables")

    def private_variables(self) -> list[PrivateVariable]:
        """The task's variables in this layer, in a fixed order."""
        raise TypeError(f"{type(self).__name__} must list its variables")

    def folded(self) -> keras.layers.Layer:
        """A built plain Keras layer that computes the same function at inference."""
        raise TypeError(f"{type(self).__name__} cannot be folded")

    def folded_values(self) -> Mapping[str, object]:
        """The values of the variables of `folded`, by name."""
        return {variable.name: variable for variable in self.folded().variables}

    def compute_output_shape(self, input_shape):
        return self.layer.compute_output_shape(input_shape)

    def get_config(self):
        shared = keras.saving.serialize_keras_object(self.layer)
        shared["config"]["trainable"] = any(variable.trainable for variable in self.layer.variables)
        return {**super().get_config(), "layer": shared}

    @classmethod
    def from_config(cls, config):
        config = dict(config)
        for name in ("layer", "patches"):
            if name in config:
                config[name] = keras.saving.deserialize_keras_object(config[name])
        return cls(**config)
