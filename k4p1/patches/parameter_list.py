"""Lists the parameters of a task model: owner, kind and role of each variable."""

from collections.abc import Mapping, Sequence

import keras

from k4p1.backbones.backbone import learned_variables
from k4p1.backbones.followers import NORMALISATIONS
from k4p1.backbones.site import LayerSite
from k4p1.backbones.variable_keys import variable_keys
from k4p1.backbones.view import normalisations
from k4p1.patches.kind import PatchKind
from k4p1.patches.own_layer import OwnLayer
from k4p1.patches.patched_layer import FIXED, RANDOM, STATISTICS, TRAINED, PatchedLayer, PrivateVariable
from k4p1.patches.patched_model import FACTORS, PRIVATE, SHARED, Parameter


class ParameterList:
    """Collects the parameters of a task model, layer by layer.

    Args:
      shared_trained: whether shared weights are learned.
      factors: adapter factors that tasks share.

    Attributes:
      parameters: each variable once.
      momentum: of statistics, by key.
      recalibrated: keys of statistics that population statistics replace after training.
    """

    def __init__(self, shared_trained: bool, factors: Mapping[str, keras.Variable]):
        self.shared_trained = shared_trained
        self._factors = {id(variable) for variable in factors.values()}
        self.parameters: list[Parameter] = []
        self.momentum: dict[str, float] = {}
        self.recalibrated: set[str] = set()
        self._seen: set[int] = set()

    def _add(self, key: str, variable: keras.Variable, owner: str, kind: str, role: str, storage=None) -> None:
        if id(variable) not in self._seen:
            self._seen.add(id(variable))
            self.parameters.append(Parameter(key, variable, owner, kind, role, storage))

    def add_layer(self, site: LayerSite, used: keras.layers.Layer, kinds: Sequence[PatchKind]) -> None:
        """Adds the variables of a layer as the task model uses it."""
        for private in _private(used, kinds):
            key = f"{site.name}/{private.kind}/{private.name}"
            if id(private.variable) in self._factors:
                self._add(key, private.variable, SHARED, FACTORS, FIXED)
                continue
            self._add(key, private.variable, PRIVATE, private.kind, private.role, private.storage)
            if private.role == STATISTICS:
                kind = next(k for k in kinds if k.name == private.kind)
                inside = None if isinstance(used, PatchedLayer) else moving_statistics(used)[id(private.variable)]
                self.momentum[key] = kind.momentum if inside is None else inside.momentum
                if kind.recalibrate:
                    self.recalibrated.add(key)
        still_used = {id(v) for v in used.variables}
        is_patched = isinstance(used, PatchedLayer)
        learned, moving, keys = learned_variables(site.layer), moving_statistics(site.layer), variable_keys(site.layer)
        for variable in site.layer.variables:
            if id(variable) not in still_used:
                continue
            key = f"{site.name}/{keys[id(variable)]}"
            role = _role(variable, id(variable) in learned, moving)
            role = FIXED if role in (TRAINED, STATISTICS) and not self.shared_trained else role
            if is_patched and isinstance(site.layer, NORMALISATIONS):
                role = FIXED  # frozen statistics, or frozen scale and bias: the backbone's, always
            self._add(key, variable, SHARED, "backbone", role)
            if role == STATISTICS:
                self.momentum[key] = moving[id(variable)].momentum

    def add_own(self, name: str, layer: OwnLayer) -> None:
        """Adds the variables of a layer that stands for none of the backbone."""
        for private in layer.private_variables():
            key = f"{name}/{private.kind}/{private.name}"
            self._add(key, private.variable, PRIVATE, private.kind, private.role, private.storage)
            if private.role == STATISTICS:
                self.momentum[key] = layer.momentum
                if layer.recalibrated:
                    self.recalibrated.add(key)

    def add_head(self, head: keras.layers.Layer, mode: str) -> None:
        """Adds the variables of the head: `trained`, `random` or `shared`."""
        head.trainable = mode == "trained" or (mode == "shared" and self.shared_trained)
        statistics, learned = moving_statistics(head), learned_variables(head)
        for variable in head.variables:
            if not keras.backend.is_float_dtype(variable.dtype):
                continue  # the seed of a dropout
            name = name_in(head, variable)
            is_trained = self.shared_trained if mode == "shared" else mode == "trained"
            role = _role(variable, id(variable) in learned, statistics) if is_trained else FIXED
            key = f"head/{name}" if mode == "shared" else f"head/head/{name}"
            self._add(key, variable, SHARED if mode == "shared" else PRIVATE, "head", role)
            if role == STATISTICS:
                self.momentum[key] = statistics[id(variable)].momentum
                if mode != "shared":
                    self.recalibrated.add(key)

    def add_rest(self, model: keras.Model) -> None:
        """Adds what is left: the seeds of dropout."""
        for variable in model.variables:
            self._add(variable.path, variable, PRIVATE, "random", RANDOM)


def _private(used: keras.layers.Layer, kinds: Sequence[PatchKind]) -> list[PrivateVariable]:
    if isinstance(used, PatchedLayer):
        return used.private_variables()
    if not kinds:
        return []
    keys, learned, moving = variable_keys(used), learned_variables(used), moving_statistics(used)
    return [
        PrivateVariable(kinds[0].name, keys[id(variable)], variable, _role(variable, id(variable) in learned, moving))
        for variable in used.variables
    ]


def moving_statistics(layer: keras.Operation) -> dict[int, keras.layers.BatchNormalization]:
    """The batch normalisation, of those that a layer consists of, whose moving statistic a variable is, by its id."""
    return {id(v): one for one in normalisations(layer) for v in (one.moving_mean, one.moving_variance)}


def name_in(head: keras.layers.Layer, variable: keras.Variable) -> str:
    """The variable's name; where names repeat in the head, behind the rank of the sublayer that owns it, as `2/kernel`."""
    names = [v.name for v in head.variables]
    if names.count(variable.name) == 1:
        return variable.name
    for rank, layer in enumerate(head._flatten_layers()):
        if any(variable is own for own in (*layer._trainable_variables, *layer._non_trainable_variables)):
            return f"{rank}/{variable.name}"
    return variable.path


def _role(variable: keras.Variable, learned: bool, moving: Mapping[int, keras.layers.BatchNormalization]) -> str:
    """What a variable is where its layer is trained."""
    if not keras.backend.is_float_dtype(variable.dtype):
        return RANDOM
    if id(variable) in moving:
        return STATISTICS
    return TRAINED if learned else FIXED
