"""The network of one task at its price for inference: patches and normalisation folded, no class of k4p1 left.

Batch normalisation behind a convolution or dense layer is arithmetic that need not be done at inference: with
`s = gamma / sqrt(variance + epsilon)` per channel,

    s * (f * x + b - mean) + beta = (s f) * x + s (b - mean) + beta,

so the kernel becomes `s f` and the bias `s (b - mean) + beta`. Where nothing of this form stands before it (behind a sum, a
concatenation or an activation), the normalisation stays, one multiply-add per value.
"""

import dataclasses
from collections.abc import Callable

import keras
import numpy as np

from k4p1.backbones import endpoints
from k4p1.patches.fold import fold

_FOLDABLE = (
    keras.layers.Conv1D,
    keras.layers.Conv2D,
    keras.layers.Conv2DTranspose,
    keras.layers.DepthwiseConv2D,
    keras.layers.SeparableConv2D,
    keras.layers.Dense,
)


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


def inference_model(model: keras.Model) -> InferenceModel:
    """Folds the patches of a task model, then its batch normalisations.

    The answers stay the same up to rounding. Precision stays that of the model: variables are float32, layers compute as
    their policies say.

    Args:
      model: a task model, or any functional model.
    """
    flat = _flat(fold(model))
    pairs = _pairs(flat)
    behind = {id(normalisation) for _, normalisation in pairs.values()}
    made = {key: _folded(layer, normalisation) for key, (layer, normalisation) in pairs.items()}
    image = keras.Input(flat.input.shape[1:], dtype=flat.input.dtype, name="image")

    def call(layer: keras.Operation, *args, **kwargs):
        return args[0] if id(layer) in behind else made.get(id(layer), layer)(*args, **kwargs)

    outputs = flat._run_through_graph(image, operation_fn=lambda operation: operation, call_fn=call)
    kept = [layer for layer in flat.layers if isinstance(layer, keras.layers.BatchNormalization)]
    return InferenceModel(keras.Model(image, outputs, name=model.name), len(pairs), len(kept) - len(pairs))


def _flat(model: keras.Model) -> keras.Model:
    """The same layers in one graph: inner models opened, layers of k4p1 written with Keras' own operations."""
    image = keras.Input(model.input.shape[1:], dtype=model.input.dtype, name="image")
    unique = endpoints.unique_names(model)

    def function_of(operation: keras.Operation) -> Callable:
        if (plain := getattr(operation, "plain", None)) is not None:
            return plain
        operation.name = unique.get(id(operation), operation.name)
        return operation

    outputs = endpoints.run_through(model, image, function_of, lambda *_: None)
    return keras.Model(image, outputs, name=model.name)


def _pairs(model: keras.Model) -> dict[int, tuple[keras.layers.Layer, keras.layers.BatchNormalization]]:
    """The layers of a flat model that can take in the normalisation behind them, with it, by id of the layer."""
    nodes = [node for nodes in model._nodes_by_depth.values() for node in nodes]
    calls: dict[int, int] = {}
    uses: dict[int, int] = {id(output): 1 for output in model.outputs}
    for node in nodes:
        calls[id(node.operation)] = calls.get(id(node.operation), 0) + 1
        for tensor in node.input_tensors:
            uses[id(tensor)] = uses.get(id(tensor), 0) + 1
    found = {}
    for node in nodes:
        if not isinstance(node.operation, keras.layers.BatchNormalization) or calls[id(node.operation)] > 1:
            continue
        tensor = node.input_tensors[0]
        layer = tensor._keras_history.operation
        if calls.get(id(layer)) == 1 and uses[id(tensor)] == 1 and _can_take_in(layer, node.operation, len(tensor.shape)):
            found[id(layer)] = layer, node.operation
    return found


def _can_take_in(layer: keras.Operation, normalisation: keras.layers.BatchNormalization, rank: int) -> bool:
    if type(layer) not in _FOLDABLE or layer.activation is not keras.activations.linear:
        return False
    axis = normalisation.axis if isinstance(normalisation.axis, int) else normalisation.axis[0]
    channels_first = getattr(layer, "data_format", "channels_last") == "channels_first"
    return axis % rank == (1 if channels_first else rank - 1)


def _folded(layer: keras.layers.Layer, normalisation: keras.layers.BatchNormalization) -> keras.layers.Layer:
    mean, variance = (_array(v) for v in (normalisation.moving_mean, normalisation.moving_variance))
    gamma = _array(normalisation.gamma) if normalisation.scale else 1.0
    beta = _array(normalisation.beta) if normalisation.center else 0.0
    scale = gamma / np.sqrt(variance + normalisation.epsilon)
    bias = _array(layer.bias) if layer.use_bias else np.zeros(len(mean))
    values = {v.name: _array(v) for v in layer.variables} | {"bias": scale * (bias - mean) + beta}
    name = "pointwise_kernel" if isinstance(layer, keras.layers.SeparableConv2D) else "kernel"
    if isinstance(layer, keras.layers.DepthwiseConv2D):
        values[name] = values[name] * scale.reshape(values[name].shape[-2:])
    elif isinstance(layer, keras.layers.Conv2DTranspose):  # (height, width, channels out, channels in)
        values[name] = values[name] * scale[:, None]
    else:
        values[name] = values[name] * scale
    plain = type(layer).from_config({**layer.get_config(), "use_bias": True})
    plain.build_from_config(layer.get_build_config())
    for variable in plain.variables:
        variable.assign(values[variable.name].astype(np.float32))
    return plain


def _array(variable: keras.Variable) -> np.ndarray:
    return np.asarray(keras.ops.convert_to_numpy(variable), np.float64)
