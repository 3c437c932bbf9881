"""The depthwise-convolution patch (K4P1, section 2)."""

import dataclasses
from typing import ClassVar

import keras

from k4p1.patches import kind, patched_convolution, patched_layer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Depthwise(kind.PatchKind):
    """Private spatial filters: the kernels (h, w, C, multiplier) of depthwise and separable convolutions."""

    name: ClassVar[str] = "depthwise"
    summary: ClassVar[str] = "kernels of depthwise convolutions (K4P1, section 2)"

    def fits(self, site, network):
        return isinstance(site.layer, (keras.layers.DepthwiseConv2D, keras.layers.SeparableConv2D))

    def layer_patch(self, site):
        return PrivateKernel()

    def why_nothing(self, network):
        return "it has no depthwise convolution"


@keras.saving.register_keras_serializable("k4p1")
class PrivateKernel(patched_layer.LayerPatch):
    """`y = g * x` with the task's own kernel g in place of the shared one, whose values it starts from."""

    kind = "depthwise"
    replaces = frozenset({"kernel", "depthwise_kernel"})

    def bind(self, layer):
        shared = getattr(layer, patched_convolution.kernel_name(layer))
        self.private_kernel = self.add_weight(
            name="kernel", shape=tuple(shared.shape), initializer=patched_layer.copy_of(shared), dtype=shared.dtype
        )

    def kernel(self, kernel, training=False):
        return self.private_kernel
