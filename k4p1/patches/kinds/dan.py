"""Deep adaptation networks: filters as linear combinations of filters (Rosenfeld and Tsotsos, 2017, section 3)."""

import dataclasses
from typing import ClassVar

import keras
from keras import ops

from k4p1.patches import kind, patched_layer
from k4p1.patches.kinds import residual_adapter


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dan(kind.PatchKind):
    """`g = f W`, each new filter a combination of the layer's D filters; W (D, D) is the identity at the start.

    The bias of the layer is private too, where it has one. It is a series adapter without its identity and normalisation,
    folded into the kernel at every step, so nothing shrinks towards the shared network.
    """

    name: ClassVar[str] = "dan"
    summary: ClassVar[str] = "filters as linear combinations of the shared ones (DAN)"
    order: ClassVar[int] = 2

    def fits(self, site, network):
        return residual_adapter.why_no_adapter(site.layer) is None

    def layer_patch(self, site):
        return FilterCombination()

    def why_nothing(self, network):
        reasons = {why for site in network if (why := residual_adapter.why_no_adapter(site.layer)) is not None}
        return f"filters of all channels can be combined; it has {', '.join(sorted(reasons))}"


@keras.saving.register_keras_serializable("k4p1")
class FilterCombination(patched_layer.LayerPatch):
    """`f W` for a kernel f (..., C, D) and W (D, D); adds the change of the bias to the output."""

    kind = "dan"

    def bind(self, layer):
        columns = layer.kernel.shape[-1]
        self.combination = self.add_weight(name="combination", shape=(columns, columns), initializer="identity")
        self.data_format = layer.data_format
        self.bias_change = None
        if layer.use_bias:
            self.bias_change = self.add_weight(name="bias_change", shape=(columns,), initializer="zeros")

    def kernel(self, kernel, training=False):
        kernel = ops.convert_to_tensor(kernel)
        columns = kernel.shape[-1]
        combined = ops.matmul(ops.reshape(kernel, (-1, columns)), ops.cast(self.combination, kernel.dtype))
        return ops.reshape(combined, kernel.shape)

    def output(self, outputs, inputs, training=False):
        if self.bias_change is None:
            return outputs
        trailing = (1,) * (len(outputs.shape) - 2) if self.data_format == "channels_first" else ()
        return outputs + ops.reshape(self.bias_change, (-1, *trailing))

    def fold(self, kernel, bias, layer, others):
        change = 0.0 if self.bias_change is None else ops.convert_to_numpy(self.bias_change)
        return kernel, bias + change, others

    def multiply_adds(self, layer, positions):
        return positions * layer.kernel.shape[-1] ** 2
