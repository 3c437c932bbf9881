"""PackNet: weights that earlier tasks pruned away belong to the next one (Mallya and Lazebnik, 2018; see PB, section 4)."""

import dataclasses
from typing import ClassVar

import keras
from keras import ops

from k4p1.patches import kind, patched_convolution, patched_layer
from k4p1.patches.kinds.mask import MASKED_LAYERS


@dataclasses.dataclass(frozen=True, kw_only=True)
class PackNet(kind.PatchKind):
    """Private values for the shared weights that are zero; `k4p1.methods.packnet` packs tasks one after another."""

    name: ClassVar[str] = "packnet"
    summary: ClassVar[str] = "values for weights that are zero, pruned by earlier tasks (PackNet)"

    reads_shared_kernel: ClassVar[bool] = True

    def fits(self, site, network):
        return type(site.layer) in MASKED_LAYERS

    def layer_patch(self, site):
        return FreeWeights()


@keras.saving.register_keras_serializable("k4p1")
class FreeWeights(patched_layer.LayerPatch):
    """`W + free . own`: free is 1 where W is zero, or at fewer places after pruning; own is zero at the start."""

    kind = "packnet"

    def bind(self, layer):
        shared = ops.convert_to_tensor(getattr(layer, patched_convolution.kernel_name(layer)))
        self.free = self.add_weight(
            name="free",
            shape=tuple(shared.shape),
            initializer=lambda shape, dtype=None: ops.cast(shared == 0, dtype or "float32"),
            trainable=False,
        )
        self.own = self.add_weight(name="own", shape=tuple(shared.shape), initializer="zeros")

    def kernel(self, kernel, training=False):
        kernel = ops.convert_to_tensor(kernel)
        own = ops.multiply(self.free, self.own)
        return kernel + ops.cast(own, kernel.dtype)
