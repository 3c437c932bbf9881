"""A task model and the list of its parameters."""

import dataclasses
import math
from collections.abc import Mapping

import keras
import numpy as np

from k4p1 import artifact
from k4p1.patches.bit_packing import BitPacking
from k4p1.patches.patched_layer import RANDOM
from k4p1.patches.spec import PatchSpec

SHARED = "shared"
PRIVATE = "private"
FACTORS = "factors"
_FLOAT_BITS = 32


@dataclasses.dataclass(frozen=True)
class Parameter:
    """A variable of a task model.

    Attributes:
      key: canonical name: `layer/variable` (shared) or `layer/kind/variable` (private).
      variable: the `keras.Variable`.
      owner: `shared` or `private`.
      kind: the patch kind of a private parameter; `head`, `factors` or `backbone` for a shared one.
      role: `trained`, `fixed`, `statistics` or `random` (a seed, no parameter).
      storage: how a patch file holds it; None: as it is.
    """

    key: str
    variable: keras.Variable
    owner: str
    kind: str
    role: str
    storage: BitPacking | None = None

    @property
    def size(self) -> int:
        """The number of values."""
        return math.prod(self.variable.shape)

    @property
    def stored_bits(self) -> int:
        """Bits that a patch file takes for its values."""
        return self.size * (self.storage.bits if self.storage else _FLOAT_BITS)

    @property
    def stored_key(self) -> str:
        """Its name in a patch file."""
        return f"{self.key.rpartition('/')[0]}/{self.storage.name}" if self.storage else self.key

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Its shape in a patch file."""
        return self.storage.stored_shape if self.storage else tuple(self.variable.shape)


@dataclasses.dataclass(frozen=True, eq=False)
class PatchedModel:
    """A task model with its parameters.

    Attributes:
      model: plain `keras.Model` from images (batch, height, width, 3) of 0 to 255 to logits (batch, classes).
      parameters: every variable of the model, once.
      spec: the patch spec.
      head: the last layer, to be shared by a further task or to be trained alone on cached features.
      statistics_momentum: of each statistics parameter, by key; what recalibration needs.
      recalibrated: keys of the private statistics that recalibration replaces.
      image_size: (height, width) in pixels.
    """

    model: keras.Model
    parameters: tuple[Parameter, ...]
    spec: PatchSpec
    head: keras.layers.Dense
    statistics_momentum: Mapping[str, float]
    recalibrated: frozenset[str]
    image_size: tuple[int, int]

    def owned(self) -> list[Parameter]:
        """The private parameters, seeds left out."""
        return [p for p in self.parameters if p.owner == PRIVATE and p.role != RANDOM]

    def private(self) -> dict[str, keras.Variable]:
        """The private variables by key, seeds left out."""
        return {p.key: p.variable for p in self.owned()}

    def factors(self) -> dict[str, keras.Variable]:
        """The adapter factors that tasks share after joint compression, by key."""
        return {p.key: p.variable for p in self.parameters if p.kind == FACTORS}

    def count(self, owner: str, *roles: str) -> int:
        """The number of parameter values of an owner in the given roles."""
        return sum(p.size for p in self.parameters if p.owner == owner and p.role in roles)

    def stored(self) -> dict[str, np.ndarray]:
        """What a patch file holds: the private values by stored key; of a mask its bits, not its scores."""
        values = {p.stored_key: (p, keras.ops.convert_to_numpy(p.variable)) for p in self.owned()}
        return {key: p.storage.encode(value) if p.storage else value for key, (p, value) in values.items()}

    def restore(self, tensors: Mapping[str, np.ndarray], what: str) -> None:
        """Writes stored values into the private variables; the inverse of `stored`.

        Raises:
          ArtifactError: names or shapes that do not fit `what`; nothing is written then.
        """
        artifact.check_fit(what, {p.stored_key: p.stored_shape for p in self.owned()}, tensors)
        values = {p.key: (p, tensors[p.stored_key]) for p in self.owned()}
        decoded = {key: p.storage.decode(value) if p.storage else value for key, (p, value) in values.items()}
        for key, variable in self.private().items():
            variable.assign(decoded[key])
