"""A task model and the list of its parameters."""

import collections
import dataclasses
import functools
import html
import math
from collections.abc import Mapping

import keras
import numpy as np

from k4p1 import errors
from k4p1.backbones.endpoints import FEATURES
from k4p1.files import tensor_file
from k4p1.patches.bit_packing import BitPacking
from k4p1.patches.patched_layer import RANDOM
from k4p1.patches.rewiring import Rewiring
from k4p1.patches.spec import PatchSpec

SHARED = "shared"
PRIVATE = "private"
FACTORS = "factors"
LOGITS = "logits"
_FLOAT_BITS = 32
_OF_MODEL = "_k4p1_task"


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
      auxiliary: whether it only helps in training (a teacher, the head of an old task), and is no part of the task.
    """

    key: str
    variable: keras.Variable
    owner: str
    kind: str
    role: str
    storage: BitPacking | None = None
    auxiliary: bool = False

    def owner_in(self, task: str) -> str:
        """Who owns it in the model of `task`: `shared`, or the task."""
        return SHARED if self.owner == SHARED else task

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

    @property
    def stored_dtype(self) -> str:
        """Its type in a patch file; nothing is cast silently."""
        return "uint8" if self.storage else keras.backend.standardize_dtype(self.variable.dtype)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class PatchedModel:
    """A task model with its parameters.

    Attributes:
      model: plain `keras.Model` from images (batch, height, width, 3) of 0 to 255 to what the head puts out: logits (batch,
        classes), for a task that classifies.
      parameters: every variable of the model, once.
      spec: the patch spec.
      head: the last layer, to be shared by a further task or to be trained alone on cached features.
      statistics_momentum: of each statistics parameter, by key; what recalibration needs.
      recalibrated: keys of the private statistics that recalibration replaces.
      image_size: (height, width) in pixels.
      endpoints: the backbone's outputs in this model by name, before the head.
      head_endpoints: those that the head reads.
      extra_outputs: further outputs of the model's graph, by name, that only training needs.
      observers: other models that look at the same images in training and learn nothing, by the name of their output;
        several outputs of one have names behind it, `name/output`.
      rewiring: how a kind changed the graph of the network, or None.
    """

    model: keras.Model
    parameters: tuple[Parameter, ...]
    spec: PatchSpec
    head: keras.layers.Layer
    statistics_momentum: Mapping[str, float]
    recalibrated: frozenset[str]
    image_size: tuple[int, int]
    endpoints: Mapping[str, keras.KerasTensor] = dataclasses.field(default_factory=dict)
    head_endpoints: tuple[str, ...] = (FEATURES,)
    extra_outputs: Mapping[str, keras.KerasTensor] = dataclasses.field(default_factory=dict)
    observers: Mapping[str, keras.Model] = dataclasses.field(default_factory=dict)
    rewiring: Rewiring | None = None

    def __post_init__(self):
        counts = collections.Counter(p.stored_key for p in self.owned())
        for key, count in counts.items():
            if count > 1:
                raise errors.PatchError(f"two private parameters have the key '{key}': a file could not tell them apart")
        self.model.__dict__.setdefault(_OF_MODEL, self)  # around Keras, which would look for variables in it

    @classmethod
    def of_model(cls, model: keras.Model) -> "PatchedModel":
        """That of a task model which was made here.

        Raises:
          ConfigError: a model that was not, or was read from a file of Keras.
        """
        found = getattr(model, _OF_MODEL, None)
        if not isinstance(found, cls):
            raise errors.ConfigError(
                f"this {type(model).__name__} is no task model of this program; give what apply_patches or load_patch gave"
            )
        return found

    def __repr__(self) -> str:
        shared, trained = (self.count(owner, "trained", "fixed", "statistics") for owner in (SHARED, PRIVATE))
        size = "x".join(map(str, self.image_size))
        return f"PatchedModel('{self.model.name}', '{self.spec}', {size} px, {trained:,} private values, {shared:,} shared)"

    def _repr_html_(self) -> str:
        return f"<code>{html.escape(repr(self))}</code>"

    @functools.cached_property
    def training_model(self) -> keras.Model:
        """From images to a dictionary of all outputs by name: those of the head (`logits` for a tensor), and extra ones."""
        outputs = self.model.output
        outputs = dict(outputs) if isinstance(outputs, dict) else {LOGITS: outputs}
        return keras.Model(self.model.input, {**outputs, **self.extra_outputs}, name=self.model.name)

    def owned(self) -> list[Parameter]:
        """The private parameters, seeds and auxiliary ones left out."""
        return [p for p in self.parameters if p.owner == PRIVATE and p.role != RANDOM and not p.auxiliary]

    def private(self) -> dict[str, keras.Variable]:
        """The private variables by key, seeds left out."""
        return {p.key: p.variable for p in self.owned()}

    def factors(self) -> dict[str, keras.Variable]:
        """The adapter factors that tasks share after joint compression, by key."""
        return {p.key: p.variable for p in self.parameters if p.kind == FACTORS}

    def count(self, owner: str, *roles: str) -> int:
        """The number of parameter values of an owner in the given roles, auxiliary ones left out."""
        return sum(p.size for p in self.parameters if p.owner == owner and p.role in roles and not p.auxiliary)

    def stored(self) -> dict[str, np.ndarray]:
        """What a patch file holds: the private values by stored key; of a mask its bits, not its scores."""
        values = {p.stored_key: (p, keras.ops.convert_to_numpy(p.variable)) for p in self.owned()}
        return {key: p.storage.encode(value) if p.storage else value for key, (p, value) in values.items()}

    def restore(self, tensors: Mapping[str, np.ndarray], what: str) -> None:
        """Writes stored values into the private variables; the inverse of `stored`.

        Raises:
          ArtifactError: names, shapes or types that do not fit `what`; nothing is written then.
        """
        dtypes = {p.stored_key: p.stored_dtype for p in self.owned()}
        tensor_file.check_fit(what, {p.stored_key: p.stored_shape for p in self.owned()}, tensors, dtypes)
        values = {p.key: (p, tensors[p.stored_key]) for p in self.owned()}
        decoded = {key: p.storage.decode(value) if p.storage else value for key, (p, value) in values.items()}
        for key, variable in self.private().items():
            variable.assign(decoded[key])
