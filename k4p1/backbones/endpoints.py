"""Endpoints: the feature maps of a backbone by output stride, and its pooled features.

A head that classifies reads `features`; one that segments or detects reads maps. The name `stride_S` stands for the last
feature map whose sides are 1/S of the image's; any other name is a layer's. Finding them changes neither the network nor its
fingerprint.
"""

from collections.abc import Callable, Sequence

import keras

from k4p1 import errors
from k4p1.backbones import canonical

FEATURES = "features"
"""Name of the pooled features."""
_SIDE = 512  # strides are read from the shapes of a large image, where borders count little


def strides(model: keras.Model) -> dict[str, tuple[int, str]]:
    """`stride_S` to (S, canonical name of the layer), for the last feature map at each output stride S = 2^n.

    Args:
      model: functional, from images (batch, height, width, 3); layers have canonical names.
    """
    found: dict[str, tuple[int, str]] = {}

    def look(name: str, operation: keras.Operation, output: keras.KerasTensor) -> None:
        shape = getattr(output, "shape", ())
        if len(shape) != 4 or None in shape[1:] or isinstance(operation, keras.layers.ZeroPadding2D):  # part of what follows
            return
        first = getattr(operation, "data_format", keras.config.image_data_format()) == "channels_first"
        side = shape[2] if first else shape[1]
        if side < 2:
            return
        ratio = _SIDE / side
        stride = 1 << max(0, round(ratio).bit_length() - 1)
        if 0.75 < ratio / stride < 1.5:
            found[f"stride_{stride}"] = stride, name

    image = keras.KerasTensor((1, _SIDE, _SIDE, 3), dtype=model.inputs[0].dtype)
    run_through(model, image, lambda operation: operation.compute_output_spec, look)
    found.pop("stride_1", None)
    return found


def outputs(
    model: keras.Model,
    inputs: keras.KerasTensor,
    names: Sequence[str],
    layer_for: Callable[[keras.Operation], keras.Operation],
    after: Callable[[str, keras.Operation, keras.KerasTensor], keras.KerasTensor] = lambda _, __, output: output,
) -> dict[str, keras.KerasTensor]:
    """Calls a copy of the network, inner models opened, and returns endpoints by name, `features` always among them.

    Args:
      model: see `strides`.
      inputs: scaled images.
      names: of endpoints.
      layer_for: the layer that stands for one of the network.
      after: what takes the place of the output of an operation.

    Raises:
      ConfigError: a name that is neither a stride nor a layer with a feature map; shows what there is.
    """
    try:
        known = strides(model) if names else {}
    except ValueError as e:
        reason = str(e).strip().splitlines()[0]
        raise errors.ConfigError(f"the feature maps of '{model.name}' cannot be found at {_SIDE} px: {reason}") from e
    unique = unique_names(model)

    def named(operation: keras.Operation) -> keras.Operation:
        layer = layer_for(operation)
        layer.name = unique.get(id(operation), layer.name)
        return layer

    places = {name: known[name][1] if name in known else name for name in names if name != FEATURES}
    seen: dict[str, keras.KerasTensor] = {}

    def look(name: str, operation: keras.Operation, output: keras.KerasTensor) -> keras.KerasTensor:
        seen[name] = after(name, operation, output)
        return seen[name]

    features = run_through(model, inputs, named, look)
    for name, place in places.items():
        if place not in seen:
            raise errors.ConfigError(errors.unknown("endpoint", name, [FEATURES, *known, *seen]))
    return {FEATURES: features, **{name: seen[place] for name, place in places.items()}}


def run_through(
    model: keras.Model,
    inputs: keras.KerasTensor,
    function_of: Callable[[keras.Operation], Callable],
    look: Callable[[str, keras.Operation, keras.KerasTensor], keras.KerasTensor | None],
    prefix: str = "",
) -> keras.KerasTensor:
    """Runs the graph of a model with a function in place of each operation.

    `look` sees each (name, operation, output); a tensor that it returns takes the place of the output.
    """

    def called(operation: keras.Operation) -> Callable:
        if canonical.is_graph(operation):
            place = f"{prefix}{operation.name}/"
            return lambda *x, **_: run_through(operation, x[0] if len(x) == 1 else list(x), function_of, look, place)
        function = function_of(operation)

        def call(*args, **kwargs):
            output = function(*args, **kwargs)
            other = look(prefix + operation.name, operation, output)
            return output if other is None else other

        return call

    if isinstance(model, keras.Sequential):
        x = inputs
        for layer in model.layers:
            x = called(layer)(x)
        return x
    return model._run_through_graph(inputs, operation_fn=called)


def unique_names(model: keras.Model, prefix: str = "") -> dict[int, str]:
    """Names by which operations of inner models can stand beside each other in one graph, by id; others keep theirs."""
    found: dict[int, str] = {}
    for operation in canonical.operations(model):
        if canonical.is_graph(operation):
            found |= unique_names(operation, f"{prefix}{operation.name}_")
        elif prefix:
            found[id(operation)] = prefix + operation.name
    return found
