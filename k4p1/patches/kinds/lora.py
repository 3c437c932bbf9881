"""LoRA: a low-rank change of a kernel (Hu et al., 2022, section 4.1; for convolutions as PEFT libraries have it)."""

import dataclasses
from typing import ClassVar

import keras
from keras import ops

from k4p1 import errors
from k4p1.patches import kind, patched_layer

_LAYERS = (keras.layers.Conv1D, keras.layers.Conv2D, keras.layers.Dense)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lora(kind.PatchKind):
    """`y = (f + alpha / rank * A @ B) * x`: a k x k convolution to `rank` channels, then a 1x1 one, beside the layer.

    A (k, k, C, rank) starts random (He uniform), B (rank, D) at zero. For Conv1D, Conv2D and Dense layers; in a grouped
    convolution the change is of its kernel (k, k, C / groups, D).

    Attributes:
      rank: of the change.
      alpha: its scale is `alpha / rank`.
    """

    name: ClassVar[str] = "lora"
    summary: ClassVar[str] = "low-rank changes of convolutions and dense layers (LoRA, section 4.1)"
    order: ClassVar[int] = 3

    rank: int = 4
    alpha: float = 4.0

    def __post_init__(self):
        super().__post_init__()
        if self.rank < 1:
            raise errors.PatchError(f"lora(rank={self.rank}): expected 1 or more")
        if self.alpha <= 0:
            raise errors.PatchError(f"lora(alpha={self.alpha}): expected a positive number")

    def fits(self, site, network):
        return type(site.layer) in _LAYERS

    def layer_patch(self, site):
        return LowRank(self.rank, self.alpha)

    def why_nothing(self, network):
        return f"{super().why_nothing(network)}; a depthwise kernel has one filter per channel, too few for a low rank"


@keras.saving.register_keras_serializable("k4p1")
class LowRank(patched_layer.LayerPatch):
    """`f + alpha / rank * A @ B` for a kernel f (..., C, D).

    Args:
      rank: columns of A, rows of B.
      alpha: scale times rank.
    """

    kind = "lora"

    def __init__(self, rank: int = 4, alpha: float = 4.0, **kwargs):
        super().__init__(**kwargs)
        self.rank, self.alpha = rank, alpha

    def bind(self, layer):
        *rest, columns = layer.kernel.shape
        rows = rest[-1]
        if self.rank > columns:
            raise errors.PatchError(
                f"lora(rank={self.rank}) is more than layer '{layer.name}' has channels: {rows} in, {columns} out; at "
                f"most {columns}, or other layers="
            )
        self.down = self.add_weight(name="down", shape=(*rest, self.rank), initializer="he_uniform")
        self.up = self.add_weight(name="up", shape=(self.rank, columns), initializer="zeros")

    def kernel(self, kernel, training=False):
        kernel = ops.convert_to_tensor(kernel)
        change = ops.matmul(ops.reshape(self.down, (-1, self.rank)), self.up) * (self.alpha / self.rank)
        return kernel + ops.cast(ops.reshape(change, kernel.shape), kernel.dtype)

    def multiply_adds(self, layer, positions):
        *taps, rows, columns = layer.kernel.shape
        for side in taps:
            rows *= side
        return positions * self.rank * (rows + columns)

    def get_config(self):
        return {**super().get_config(), "rank": self.rank, "alpha": self.alpha}
