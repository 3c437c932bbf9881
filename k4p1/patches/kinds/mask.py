"""Binary and ternary masks over shared weights (PB, section 3)."""

import dataclasses
import math
from collections.abc import Mapping
from typing import ClassVar

import keras
import numpy as np
from keras import ops

from k4p1 import errors
from k4p1.patches import kind, patched_convolution, patched_layer
from k4p1.patches.bit_packing import BitPacking
from k4p1.patches.patched_layer import TRAINED, PrivateVariable
from k4p1.patches.patched_model import PatchedModel

MASKED_LAYERS = (keras.layers.Conv1D, keras.layers.Conv2D, keras.layers.DepthwiseConv2D, keras.layers.Dense)

_LARGEST = 1e30  # scores are float32, and start beside their threshold


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mask(kind.PatchKind):
    """`y = (m . W) * x`, m_i = 1 where the score s_i is at least the threshold, else 0: one bit per weight.

    For kernels of convolutions, depthwise convolutions and dense layers. The scores are trained by the straight-through
    gradient, in float32 always, with Adam at 1e-4 (PB, section 4) unless a run's rules say otherwise; a patch file
    holds bits. Batch normalisation stays the backbone's; `mask+scale_bias+head` makes it private (PB, section 5.3).

    Attributes:
      mask_type: `binary` (0, 1) or `ternary` (-1 where `s <= -threshold`, too).
      threshold: of the scores.
      init_score: value of all scores at the start (PB, section 3: 1e-2 with threshold 5e-3).
      scores: `constant`, or `weights`: s = |W| - min |W| of the layer with threshold 0, that is |W| with a threshold of its
        own for each layer at its smallest weight; `init_score` and `threshold` are not used then.
      gradient: `plain`, or `scaled` by 1 / mean |W| of the layer, which SGD needs (PB, section 3).
    """

    name: ClassVar[str] = "mask"
    summary: ClassVar[str] = "binary or ternary masks over weights, one or two bits each (PB, section 3)"
    order: ClassVar[int] = 1
    reads_shared_kernel: ClassVar[bool] = True
    renamed_options: ClassVar[Mapping[str, str]] = {"values": "mask_type", "initial": "init_score"}

    mask_type: str = "binary"
    threshold: float = 5e-3
    init_score: float = 1e-2
    scores: str = "constant"
    gradient: str = "plain"

    def __post_init__(self):
        super().__post_init__()
        self._check_choice("mask_type", ("binary", "ternary"))
        self._check_choice("scores", ("constant", "weights"))
        self._check_choice("gradient", ("plain", "scaled"))
        for option in ("threshold", "init_score"):
            if abs(getattr(self, option)) > _LARGEST:
                raise errors.PatchError(f"mask({option}={getattr(self, option)}): expected at most {_LARGEST:g} in size")
        if self.mask_type == "ternary" and (self.scores == "weights" or self.threshold <= 0):
            raise errors.PatchError(
                "mask(mask_type=ternary) needs scores=constant and a positive threshold; -1 lies below minus the threshold"
            )

    def fits(self, site, network):
        return type(site.layer) in MASKED_LAYERS

    def warnings(self, patched):
        zeroed = [layer.layer for layer in sparsity(patched) if layer.zeros == layer.weights]
        if not zeroed:
            return []
        return [
            f"its mask removes every weight of {len(zeroed)} layers (first: '{zeroed[0]}'); nothing passes them. Lower "
            "threshold= below init_score=, or the learning rate of the scores"
        ]

    def layer_patch(self, site):
        return WeightMask(self.mask_type, self.threshold, self.init_score, self.scores, self.gradient)


@keras.saving.register_keras_serializable("k4p1")
class WeightMask(patched_layer.LayerPatch):
    """`m . W` with a straight-through gradient: forward `m = hard(s)`, backward `dm / ds = c`.

    As `m = c s + stop_gradient(hard(s) - c s)`, c = 1, or 1 / mean |W| where the gradient is scaled. Scores never take part
    in autocasting: in half precision they would jump over the threshold.
    """

    kind = "mask"

    def __init__(self, values="binary", threshold=5e-3, initial=1e-2, scores="constant", gradient="plain", **kwargs):
        super().__init__(**kwargs)
        self.values, self.threshold, self.initial = values, threshold, initial
        self.scores_from, self.gradient = scores, gradient

    @property
    def cut(self) -> float:
        """The threshold in use."""
        return 0.0 if self.scores_from == "weights" else self.threshold

    def bind(self, layer):
        shared = getattr(layer, patched_convolution.kernel_name(layer))
        magnitude = ops.abs(ops.cast(ops.convert_to_tensor(shared), "float32"))
        if self.scores_from == "weights":
            start = lambda shape, dtype=None: magnitude - ops.min(magnitude)  # noqa: E731
        else:
            start = keras.initializers.Constant(self.initial)
        self.scores = self.add_weight(
            name="scores", shape=tuple(shared.shape), initializer=start, dtype="float32", autocast=False
        )

    def mask(self):
        """The hard mask, float32 of the kernel's shape."""
        scores = ops.convert_to_tensor(self.scores)
        kept = ops.cast(scores >= self.cut, "float32")
        return kept - ops.cast(scores <= -self.cut, "float32") if self.values == "ternary" else kept

    def kernel(self, kernel, training=False):
        kernel = ops.convert_to_tensor(kernel)
        mask = self.mask()
        if training:
            slope = ops.convert_to_tensor(self.scores)
            if self.gradient == "scaled":
                size = ops.mean(ops.abs(ops.cast(kernel, "float32")))
                slope = slope / ops.where(size > 0, size, 1.0)  # a kernel of zeros learns nothing, whatever its mask
            mask = slope + ops.stop_gradient(mask - slope)
        return kernel * ops.cast(mask, kernel.dtype)

    def private_variables(self):
        storage = BitPacking(tuple(self.scores.shape), self.cut, self.values == "ternary")
        return [PrivateVariable(self.kind, "scores", self.scores, TRAINED, storage)]

    def get_config(self):
        options = {"values": self.values, "threshold": self.threshold, "initial": self.initial}
        return {**super().get_config(), **options, "scores": self.scores_from, "gradient": self.gradient}


@dataclasses.dataclass(frozen=True)
class LayerSparsity:
    """How much of a layer a mask takes away.

    Attributes:
      layer: canonical name.
      weights: number of weights.
      zeros: of them masked out.
      negated: of them turned by a ternary mask.
    """

    layer: str
    weights: int
    zeros: int
    negated: int


def sparsity(patched: PatchedModel) -> list[LayerSparsity]:
    """The sparsity of every masked layer from the first to the last (PB, Table 6 and Figure 3)."""
    found = []
    for parameter in patched.parameters:
        if parameter.storage is not None:
            scores = keras.ops.convert_to_numpy(parameter.variable)
            negated = int(np.sum(scores <= -parameter.storage.threshold)) if parameter.storage.ternary else 0
            kept = int(np.sum(scores >= np.float32(parameter.storage.threshold)))
            size = math.prod(scores.shape)
            found.append(LayerSparsity(parameter.key.rsplit("/", 2)[0], size, size - kept - negated, negated))
    return found
