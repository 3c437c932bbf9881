"""Everything private: classic fine-tuning, the upper end of the patch kinds."""

import dataclasses
from typing import ClassVar

import keras

from k4p1.patches import kind, patched_batch_normalization, patched_layer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Full(kind.PatchKind):
    """A private copy of every variable, head included; `full(stage=late)` copies the last third of the network.

    Attributes:
      momentum: of the private moving statistics.
      recalibrate: replace private moving statistics by population statistics after training.
    """

    name: ClassVar[str] = "full"
    summary: ClassVar[str] = "every parameter: classic fine-tuning"

    momentum: float = 0.99
    recalibrate: bool = True

    def __post_init__(self):
        super().__post_init__()
        self._check_momentum(self.momentum)

    def fits(self, site, network):
        return True

    head_mode = "trained"

    def conflict(self, kinds):
        others = [kind.name for kind in kinds if kind.name not in ("full", "head")]
        if not others or (self.layers, self.stage) != ("*", "all"):
            return None
        spec = "+".join(map(str, kinds))
        return f"'full' already makes every parameter private; take '{others[0]}' out of '{spec}'"

    def replaces_layer(self, layer):
        return True

    def whole_layer(self, layer):
        if isinstance(layer, keras.layers.BatchNormalization):
            return patched_batch_normalization.PatchedBatchNormalization(layer, momentum=self.momentum, kind=self.name)
        return patched_layer.private_copy(layer)
