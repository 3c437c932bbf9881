"""A convolution or dense layer with all its patches: kernel, linear output, then the layer's own activation."""

from collections.abc import Sequence

import keras
import numpy as np
from keras import ops

from k4p1 import errors
from k4p1.patches import kind, patched_layer

KERNEL_NAMES = {
    keras.layers.Conv1D: "kernel",
    keras.layers.Conv2D: "kernel",
    keras.layers.DepthwiseConv2D: "kernel",
    keras.layers.SeparableConv2D: "depthwise_kernel",
    keras.layers.Dense: "kernel",
}
"""The layer types that can be patched, and the variable that a kernel patch changes."""


def kernel_name(layer: keras.layers.Layer) -> str | None:
    """The name of the variable that is the layer's kernel, or None for a layer that has none."""
    return KERNEL_NAMES.get(type(layer))


def linear_output(layer: keras.layers.Layer, inputs, kernel):
    """`op(inputs, kernel)` with the layer's strides, padding, dilation and groups, without bias and activation.

    Args:
      layer: one of `KERNEL_NAMES`.
      inputs: (batch, ..., channels), or channels first as the layer says.
      kernel: a tensor of the shape of the layer's kernel.
    """
    if isinstance(layer, keras.layers.Dense):
        return ops.matmul(inputs, kernel)
    how = {
        "strides": layer.strides,
        "padding": layer.padding,
        "dilation_rate": layer.dilation_rate,
        "data_format": layer.data_format,
    }
    if isinstance(layer, keras.layers.DepthwiseConv2D):
        return ops.depthwise_conv(inputs, kernel, **how)
    if isinstance(layer, keras.layers.SeparableConv2D):
        return ops.separable_conv(inputs, kernel, layer.pointwise_kernel, **how)
    if layer.padding == "causal":  # of Conv1D alone: an output sees no later input
        inputs, how["padding"] = ops.pad(inputs, layer._compute_causal_padding()), "valid"
    return ops.conv(inputs, kernel, **{**how, "strides": list(layer.strides)})


def output_channels(layer: keras.layers.Layer) -> int:
    """The number of channels that the layer puts out."""
    if isinstance(layer, keras.layers.SeparableConv2D):
        return layer.pointwise_kernel.shape[-1]
    if isinstance(layer, keras.layers.DepthwiseConv2D):
        return layer.kernel.shape[-2] * layer.kernel.shape[-1]
    return layer.kernel.shape[-1]


@keras.saving.register_keras_serializable("k4p1")
class PatchedConvolution(patched_layer.PatchedLayer):
    """`y = activation(out_n(...out_1(op(x, kern_n(...kern_1(kernel))) + bias)))`.

    Every patch kind on the layer adds one pair (kern_i, out_i); the identity where it does not change kernel or output.
    The activation comes last, so that a scale and bias acts before it and can be folded.

    Args:
      layer: a built layer of a type in `KERNEL_NAMES`; it stays shared.
      patches: one `LayerPatch` per kind; they act in the `order` of their kinds: a private kernel, a mask,
        combinations of filters, low rank, parallel adapter, series adapter, scale and bias.

    Raises:
      PatchError: the layer is of another type.
    """

    def __init__(self, layer: keras.layers.Layer, patches: Sequence[patched_layer.LayerPatch], **kwargs):
        if kernel_name(layer) is None:
            allowed = ", ".join(sorted(t.__name__ for t in KERNEL_NAMES))
            raise errors.PatchError(f"{type(layer).__name__} '{layer.name}' cannot be patched; allowed: {allowed}")
        super().__init__(layer, **kwargs)
        self.patches = sorted(patches, key=lambda patch: kind.order_of(patch.kind))

    def bind(self):
        replaced = set().union(*(patch.replaces for patch in self.patches))
        for patch in self.patches:
            if not patch.built:
                patch.bind(self.layer)
                patch.built = True
        for name in ("kernel", "depthwise_kernel", "pointwise_kernel", "bias"):
            if getattr(self.layer, name, None) is not None and name not in replaced:
                setattr(self, f"shared_{name}", getattr(self.layer, name))

    def call(self, inputs, training=None):
        training = bool(training)
        kernel = getattr(self, f"shared_{kernel_name(self.layer)}", None)
        for patch in self.patches:
            kernel = patch.kernel(kernel, training)
        outputs = linear_output(self.layer, inputs, kernel)
        if self.layer.use_bias:
            channels_first = getattr(self.layer, "data_format", None) == "channels_first"
            trailing = (1,) * (len(outputs.shape) - 2) if channels_first else ()
            outputs = outputs + ops.reshape(self.shared_bias, (-1, *trailing))
        for patch in self.patches:
            outputs = patch.output(outputs, inputs, training)
        return self.layer.activation(outputs) if self.layer.activation is not None else outputs

    def private_variables(self):
        return [private for patch in self.patches for private in patch.private_variables()]

    def folded_values(self):
        layer, name = self.layer, kernel_name(self.layer)
        kernel = getattr(self, f"shared_{name}", None)
        for patch in self.patches:
            kernel = patch.kernel(kernel)
        kernel = ops.convert_to_numpy(kernel)
        bias = ops.convert_to_numpy(layer.bias) if layer.use_bias else np.zeros(output_channels(layer), np.float32)
        others = {}
        for patch in self.patches:
            kernel, bias, others = patch.fold(kernel, bias, layer, others)
        shared = {variable.name: variable for variable in layer.variables}
        use_bias = bool(layer.use_bias or np.any(bias))
        return {**shared, name: kernel, **others, **({"bias": bias} if use_bias else {})}

    def folded(self):
        values = self.folded_values()
        plain = type(self.layer).from_config({**self.layer.get_config(), "use_bias": "bias" in values})
        plain.build_from_config(self.layer.get_build_config())
        for variable in plain.variables:
            variable.assign(values[variable.name])
        return plain

    def get_config(self):
        return {**super().get_config(), "patches": [keras.saving.serialize_keras_object(p) for p in self.patches]}
