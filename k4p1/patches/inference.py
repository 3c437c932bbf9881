"""The network of one task at its price for inference: patches and normalisation folded, no class of k4p1 left.

Batch normalisation behind a convolution or dense layer is arithmetic that need not be done at inference: with
`s = gamma / sqrt(variance + epsilon)` per channel,

    s * (f * x + b - mean) + beta = (s f) * x + s (b - mean) + beta,

so the kernel becomes `s f` and the bias `s (b - mean) + beta`. Where nothing of this form stands before it (behind a sum, a
concatenation or an activation), the normalisation stays, one multiply-add per value.
"""

import dataclasses
from collections.abc import Callable, Mapping

import keras
import numpy as np

from k4p1.backbones import endpoints
from k4p1.backbones.view import view
from k4p1.patches.own_layer import OwnLayer
from k4p1.patches.patched_layer import PatchedLayer, private_copy

_FOLDABLE = (
    keras.layers.Conv1D,
    keras.layers.Conv2D,
    keras.layers.Conv2DTranspose,
    keras.layers.DepthwiseConv2D,
    keras.layers.SeparableConv2D,
    keras.layers.Dense,
)
Values = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class InferenceModel:
    """A task's network for inference.

    Attributes:
      model: one flat `keras.Model` of Keras' own layers; it shares no variable with the task model.
      normalisations_folded: batch normalisations that became part of the layer before them.
      normalisations_kept: those that no layer stands before into which they could be folded.
    """

    model: keras.Model
    normalisations_folded: int
    normalisations_kept: int


@dataclasses.dataclass(frozen=True)
class FlatModel:
    """A task model in one graph: inner models opened, layers of k4p1 that need no variables in Keras' own operations.

    Attributes:
      model: the same layers as the task model's, patched ones included.
      absorbed: the normalisation that each layer can take in, by id of the layer.
    """

    model: keras.Model
    absorbed: Mapping[int, keras.layers.Layer]

    @classmethod
    def of(cls, model: keras.Model) -> "FlatModel":
        """The flat form of a task model, or of any functional model."""
        flat = _flat(model)
        return cls(flat, _absorbed(flat))

    def run(self, inputs, function_of: Callable[[keras.Operation], Callable]):
        """Runs the graph with a function in place of each operation; absorbed normalisations are left out."""
        left_out = {id(normalisation) for normalisation in self.absorbed.values()}

        def call(operation, *args, **kwargs):
            return args[0] if id(operation) in left_out else function_of(operation)(*args, **kwargs)

        return self.model._run_through_graph(inputs, operation_fn=lambda operation: operation, call_fn=call)

    def values_of(self, layer: keras.layers.Layer) -> Values:
        """The variables of a layer by name, its patches and the normalisation behind it folded; float64.

        A layer that takes in a normalisation has a `bias` in any case.
        """
        values = _values(layer)
        normalisation = self.absorbed.get(id(layer))
        return values if normalisation is None else _folded(_plain(layer), values, normalisation)


def inference_model(model: keras.Model) -> InferenceModel:
    """Folds the patches of a task model, then its batch normalisations.

    The answers stay the same up to rounding. Precision stays that of the model: variables are float32, layers compute as
    their policies say.

    Args:
      model: a task model, or any functional model.
    """
    flat = FlatModel.of(model)
    made: dict[int, keras.layers.Layer] = {}

    def plain(operation: keras.Operation) -> keras.Operation:
        if id(operation) not in made:
            if id(operation) in flat.absorbed:
                made[id(operation)] = _written(operation, flat.values_of(operation))
            else:
                has_folded = isinstance(operation, (PatchedLayer, OwnLayer))
                made[id(operation)] = operation.folded() if has_folded else private_copy(operation)
        return made[id(operation)]

    image = keras.Input(flat.model.input.shape[1:], dtype=flat.model.input.dtype, name="image")
    outputs = flat.run(image, plain)
    normalisations = [one for one in flat.model.layers if isinstance(_plain(one), keras.layers.BatchNormalization)]
    folded = len(flat.absorbed)
    return InferenceModel(keras.Model(image, outputs, name=model.name), folded, len(normalisations) - folded)


def scale_and_shift(values: Values, epsilon: float) -> tuple[np.ndarray, np.ndarray]:
    """(a, c) of a batch normalisation `y = a x + c` with its moving statistics."""
    scale = values.get("gamma", 1.0) / np.sqrt(values["moving_variance"] + epsilon)
    return scale, values.get("beta", 0.0) - values["moving_mean"] * scale


def per_output_channel(layer: keras.layers.Layer, scale, kernel):
    """A factor per output channel, array or tensor, in a shape that multiplies the kernel that makes these channels."""
    if isinstance(layer, keras.layers.DepthwiseConv2D):
        return (
            keras.ops.reshape(scale, kernel.shape[-2:]) if keras.ops.is_tensor(scale) else scale.reshape(kernel.shape[-2:])
        )
    if isinstance(layer, keras.layers.Conv2DTranspose):  # (height, width, channels out, channels in)
        return scale[:, None]
    return scale


def _flat(model: keras.Model) -> keras.Model:
    image = keras.Input(model.input.shape[1:], dtype=model.input.dtype, name="image")
    unique = endpoints.unique_names(model)
    views: dict[int, keras.Operation] = {}

    def function_of(operation: keras.Operation) -> Callable:
        if (plain := getattr(operation, "plain", None)) is not None:
            return plain
        if id(operation) not in views:
            views[id(operation)] = view(operation, batch_normalise=False)
            views[id(operation)].name = unique.get(id(operation), operation.name)
        return views[id(operation)]

    outputs = endpoints.run_through(model, image, function_of, lambda *_: None)
    return keras.Model(image, outputs, name=model.name)


def _absorbed(model: keras.Model) -> dict[int, keras.layers.Layer]:
    nodes = [node for nodes in model._nodes_by_depth.values() for node in nodes]
    calls: dict[int, int] = {}
    uses: dict[int, int] = {id(output): 1 for output in model.outputs}
    for node in nodes:
        calls[id(node.operation)] = calls.get(id(node.operation), 0) + 1
        for tensor in node.input_tensors:
            uses[id(tensor)] = uses.get(id(tensor), 0) + 1
    found = {}
    for node in nodes:
        normalisation = _plain(node.operation)
        if not isinstance(normalisation, keras.layers.BatchNormalization) or calls[id(node.operation)] > 1:
            continue
        tensor = node.input_tensors[0]
        layer = tensor._keras_history.operation
        once = calls.get(id(layer)) == 1 and uses[id(tensor)] == 1
        if once and _takes_in(_plain(layer), normalisation, len(tensor.shape)):
            found[id(layer)] = node.operation
    return found


def _takes_in(layer: keras.Operation, normalisation: keras.layers.BatchNormalization, rank: int) -> bool:
    if type(layer) not in _FOLDABLE or layer.activation is not keras.activations.linear:
        return False
    axis = normalisation.axis if isinstance(normalisation.axis, int) else normalisation.axis[0]
    channels_first = getattr(layer, "data_format", "channels_last") == "channels_first"
    return axis % rank == (1 if channels_first else rank - 1)


def _plain(operation: keras.Operation) -> keras.Operation:
    """The shared layer behind a patched one."""
    return operation.layer if isinstance(operation, PatchedLayer) else operation


def _values(layer: keras.layers.Layer) -> Values:
    """The variables of a layer by name, patches folded."""
    values = layer.folded_values() if isinstance(layer, PatchedLayer) else {v.name: v for v in layer.variables}
    return {name: np.asarray(keras.ops.convert_to_numpy(value), np.float64) for name, value in values.items()}


def _folded(layer: keras.layers.Layer, values: Values, normalisation: keras.layers.Layer) -> Values:
    scale, shift = scale_and_shift(_values(normalisation), _plain(normalisation).epsilon)
    name = "pointwise_kernel" if isinstance(layer, keras.layers.SeparableConv2D) else "kernel"
    kernel = values[name]
    return {
        **values,
        name: kernel * per_output_channel(layer, scale, kernel),
        "bias": values.get("bias", 0.0) * scale + shift,
    }


def _written(layer: keras.layers.Layer, values: Values) -> keras.layers.Layer:
    """A plain layer with a bias and the values given."""
    plain, name = _plain(layer), layer.name
    written = type(plain).from_config({**plain.get_config(), "use_bias": True, "name": name})
    written.build_from_config(plain.get_build_config())
    for variable in written.variables:
        variable.assign(values[variable.name].astype(np.float32))
    return written
