"""The parallel residual adapter (RA, section 3.1.2)."""

import dataclasses
from typing import ClassVar

import keras
from keras import ops

from k4p1 import errors
from k4p1.patches import patched_convolution
from k4p1.patches.kinds import residual_adapter


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParallelAdapter(residual_adapter.AdapterKind):
    """A 1x1 convolution beside a k x k one, `y = f * x + alpha * x`, alpha (C, D); zero at the start.

    It owns no batch normalisation: RA's model is `parallel_adapter+scale_bias+head`.
    """

    name: ClassVar[str] = "parallel_adapter"
    summary: ClassVar[str] = "1x1 convolutions beside convolutions (RA, section 3.1.2)"
    order: ClassVar[int] = 4

    def fits(self, site, network):
        return super().fits(site, network) and _is_odd(site.layer)

    def why_nothing(self, network):
        even = [s.name for s in network if residual_adapter.why_no_adapter(s.layer) is None and not _is_odd(s.layer)]
        if even:
            return f"kernels of even size, as of '{even[0]}', have no centre that a 1x1 kernel could be added to"
        return super().why_nothing(network)

    def layer_patch(self, site):
        return CentreTap(self.rank, self.std_of(site.layer), self._dropout_at(site))


def _is_odd(layer: keras.layers.Layer) -> bool:
    return all(side % 2 for side in layer.kernel_size)


@keras.saving.register_keras_serializable("k4p1")
class CentreTap(residual_adapter.Adapter):
    """`y = (f + diag_L(alpha)) * x`: the centre tap of the kernel f (L, L, C, D) gains alpha (C, D).

    This is the 1x1 convolution beside f for every stride, dilation and padding, at the cost of f alone. With dropout, which
    the two do not share, the branch is computed apart while training.
    """

    kind = "parallel_adapter"

    def bind(self, layer):
        if any(side % 2 == 0 for side in layer.kernel_size):
            raise errors.PatchError(f"parallel_adapter: '{layer.name}' has kernel {layer.kernel_size}; expected odd sides")
        self.__dict__["layer"] = layer  # not tracked: it stays shared
        self.bind_matrix(layer, *layer.kernel.shape[-2:])

    def _embedded(self, shape):
        """diag_L(alpha), of the kernel's shape."""
        centre = [(side // 2, side // 2) for side in shape[:-2]]
        return ops.pad(ops.reshape(self.matrix(), (*(1 for _ in centre), *shape[-2:])), [*centre, (0, 0), (0, 0)])

    def kernel(self, kernel, training=False):
        if training and self.dropped is not None:
            return kernel
        kernel = ops.convert_to_tensor(kernel)
        return kernel + ops.cast(self._embedded(kernel.shape), kernel.dtype)

    def output(self, outputs, inputs, training=False):
        if not training or self.dropped is None:
            return outputs
        embedded = self._embedded(self.layer.kernel.shape)
        return outputs + patched_convolution.linear_output(self.layer, self.dropped(inputs, training=True), embedded)

    def fold(self, kernel, bias, layer, others):
        return kernel, bias, others

    def multiply_adds(self, layer, positions):
        rows, columns = layer.kernel.shape[-2:]
        return positions * (self.rank * (rows + columns) if self.rank else rows * columns)
