"""What a task costs: parameters, bits, multiply-adds at inference, and the size of a family of models as papers count it."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence

import keras

from k4p1.backbones import endpoints
from k4p1.backbones.backbone import Backbone
from k4p1.backbones.followers import NORMALISATIONS
from k4p1.backbones.series_adapters import SharedSeriesAdapter
from k4p1.patches.fold import fold
from k4p1.patches.own_layer import OwnLayer
from k4p1.patches.patched_convolution import PatchedConvolution
from k4p1.patches.patched_layer import PatchedLayer
from k4p1.patches.patched_model import PatchedModel

_FLOAT_BITS = 32
_CONVOLUTIONS = (keras.layers.Conv1D, keras.layers.Conv2D, keras.layers.DepthwiseConv2D)


@dataclasses.dataclass(frozen=True)
class TaskCosts:
    """What one task costs beside the shared network.

    Attributes:
      private_bits: stored for the patch, its head left out: 32 a value, 1 or 2 for a mask's.
      multiply_adds: of one image through the shared network and the head.
      added_unfolded: multiply-adds that the patch adds, as its equations are written.
      added_folded: that it adds after folding. None where they could not be counted.
    """

    private_bits: int
    multiply_adds: int | None
    added_unfolded: int | None
    added_folded: int | None


def task_costs(patched: PatchedModel, folded: keras.Model | None = None) -> TaskCosts:
    """The costs of a task model and of its folded copy, which is built where it is not given."""
    base = multiply_adds(patched.model, patches=False)
    return TaskCosts(
        private_bits=private_bits(patched),
        multiply_adds=base,
        added_unfolded=multiply_adds(patched.model) - base,
        added_folded=multiply_adds(folded or fold(patched.model)) - base,
    )


def private_bits(patched: PatchedModel) -> int:
    """Bits that a task stores beside its head: `32 n` for n float values, `n` for a binary mask over n weights."""
    return sum(p.stored_bits for p in patched.owned() if p.kind != "head")


def model_size_ratio(backbone: Backbone, tasks: Sequence[PatchedModel]) -> float:
    """`(S + F + sum_t P_t) / S` in bits: S the shared network, F shared factors, P_t the patch of task t; heads left out.

    RA (Table 1, "#par.") and PB (section 6: 41 n / 32 n = 1.28 for ImageNet's network and nine masks) count so: the task
    that the network was trained for has no patch.

    Args:
      backbone: the shared network.
      tasks: on it.
    """
    network = _FLOAT_BITS * sum(math.prod(v.shape) for v in backbone.variables().values())
    factors = {key: _FLOAT_BITS * math.prod(v.shape) for task in tasks for key, v in task.factors().items()}
    return (network + sum(factors.values()) + sum(private_bits(task) for task in tasks)) / network


def multiply_adds(model: keras.Model, patches: bool = True) -> int:
    """Multiply-adds of one image: convolutions, dense layers, and one a channel and position for a normalisation.

    Args:
      model: with a fixed image size.
      patches: False leaves out what patches add.
    """
    return sum(of_layer(layer, positions, patches) for layer, positions in _calls(model))


def _calls(model: keras.Model) -> Iterable[tuple[keras.layers.Layer, int]]:
    """Each call of a layer of the model, inner models opened, with the number of positions that it outputs."""
    called: list[tuple[keras.layers.Layer, int]] = []

    def look(_: str, operation: keras.Operation, output: keras.KerasTensor) -> None:
        if isinstance(operation, keras.layers.Layer):
            shape = keras.tree.flatten(output)[0].shape[1:]
            plain = operation.layer if isinstance(operation, PatchedLayer) else operation
            first = getattr(plain, "data_format", "channels_last") == "channels_first"
            scaled = isinstance(plain, NORMALISATIONS)  # every value is one position
            called.append((operation, math.prod(shape if scaled else shape[1:] if first else shape[:-1])))

    image = keras.KerasTensor((1, *model.inputs[0].shape[1:]), dtype=model.inputs[0].dtype)
    endpoints.run_through(model, image, _output_of, look)
    return called


def _output_of(operation: keras.Operation) -> Callable:
    """What an operation puts out, every size of it known: some layers leave sizes open that their call would give."""

    def output(*args, **kwargs):
        found = operation.compute_output_spec(*args, **kwargs)
        if any(None in one.shape for one in keras.tree.flatten(found)):
            found = keras.Operation.compute_output_spec(operation, *args, **kwargs)
        return found

    return output


def of_layer(layer: keras.layers.Layer, positions: int, patches: bool = True) -> int:
    """Multiply-adds of one call of a layer; see `multiply_adds`.

    Args:
      layer: of a network or task model.
      positions: height times width that it puts out.
      patches: False leaves out what patches add.
    """
    if isinstance(layer, OwnLayer):
        return layer.multiply_adds(positions) if patches else 0
    shared = layer.layer if isinstance(layer, PatchedLayer) else layer
    added = 0
    if patches and isinstance(layer, PatchedConvolution):
        added = sum(patch.multiply_adds(shared, positions) for patch in layer.patches)
    if isinstance(shared, keras.layers.SeparableConv2D):
        each = math.prod(shared.depthwise_kernel.shape) + math.prod(shared.pointwise_kernel.shape)
    elif isinstance(shared, (*_CONVOLUTIONS, keras.layers.Dense)):
        each = math.prod(shared.kernel.shape)
    elif isinstance(shared, NORMALISATIONS):
        each = 1
    elif isinstance(shared, SharedSeriesAdapter):
        return shared.multiply_adds(positions)
    else:
        each = 0
    return positions * each + added
