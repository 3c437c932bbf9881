"""Applies a patch spec to a backbone: the task model and the list of its parameters."""

import math
import warnings
from collections.abc import Mapping, Sequence

import keras

from k4p1 import errors
from k4p1.backbones.backbone import Backbone, learned_variables
from k4p1.backbones.scaling import InputScaling
from k4p1.backbones.site import LayerSite
from k4p1.patches import patched_convolution
from k4p1.patches.head import Head
from k4p1.patches.kind import PatchKind
from k4p1.patches.mask import sparsity
from k4p1.patches.patched_layer import FIXED, RANDOM, STATISTICS, TRAINED, PatchedLayer, PrivateVariable, view
from k4p1.patches.patched_model import FACTORS, PRIVATE, SHARED, Parameter, PatchedModel
from k4p1.patches.spec import PatchSpec

_FLOAT_BITS = 32


def apply_patches(
    backbone: Backbone,
    spec: str | PatchSpec,
    *,
    classes: int,
    image_size: int | Sequence[int],
    shared_trained: bool = False,
    shared_head: keras.layers.Dense | None = None,
    factors: Mapping[str, keras.Variable] | None = None,
    dropout: float = 0.0,
    seed: int = 0,
    name: str = "task",
) -> PatchedModel:
    """Builds the model of one task: the backbone with the task's patch, and a head.

    Args:
      backbone: shared; none of its values changes.
      spec: what the task owns, such as `"scale_bias+head"`.
      classes: number of logits.
      image_size: side in pixels, or (height, width).
      shared_trained: True where the shared weights are learned (multi-task training): a batch normalisation that the
        spec does not touch then follows `training=` and moves the shared statistics. False where they are frozen
        (transfer learning): it then uses the backbone's statistics always.
      shared_head: the head of an earlier task with the same labels, for a spec that shares it; None makes a new head.
      factors: adapter factors that tasks share after joint compression, by key `layer/kind/variable`.
      dropout: rate before the head.
      seed: of the head's initial values.
      name: of the Keras model.

    Raises:
      PatchError: a kind touches nothing in this network, or two kinds exclude each other on a layer.
      ConfigError: the image is too small for the network.
    """
    spec = PatchSpec.parse(spec)
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    if backbone.minimum_size is not None and min(height, width) < backbone.minimum_size:
        raise errors.ConfigError(
            f"image size {height}x{width} is too small for {backbone.name}: at least {backbone.minimum_size} pixels a side"
        )
    plan = {id(site.layer): (site, kinds, _of_layer(site, factors or {})) for site, kinds in _plan(backbone.sites, spec)}
    made: dict[int, keras.layers.Layer] = {}

    def layer_for(layer):
        if id(layer) not in made:
            chosen = plan.get(id(layer))
            made[id(layer)] = _patched(*chosen) if chosen else view(layer, batch_normalise=shared_trained)
        return made[id(layer)]

    image = keras.Input((height, width, 3), name="image")
    scaled = InputScaling(backbone.scaling, name="input_scaling")(image)
    try:
        network = keras.models.clone_model(
            backbone.model,
            input_tensors=keras.Input(scaled.shape[1:], dtype=scaled.dtype, name="scaled_image"),
            clone_function=layer_for,
            recursive=True,
        )
    except errors.PatchError:
        raise
    except ValueError as e:
        raise errors.ConfigError(
            f"{backbone.name} does not work at image size {height}x{width}: {str(e).strip().splitlines()[0]}"
        ) from e
    for operation in network.operations:  # some versions of Keras let a layer put out nothing
        sides = [side for output in keras.tree.flatten(operation.output) for side in output.shape[1:]]
        if any(side is not None and side <= 0 for side in sides):
            raise errors.ConfigError(
                f"image size {height}x{width} is too small for {backbone.name}: nothing is left after '{operation.name}'"
            )
    is_shared_head = head_is_shared(spec)
    head = view(shared_head, True) if is_shared_head and shared_head is not None else make_head(classes, seed)
    features = network(scaled)
    if dropout:
        features = keras.layers.Dropout(dropout, name="head_dropout")(features)
    logits = keras.layers.Activation("linear", dtype="float32", name="logits")(head(features))
    model = keras.Model(image, logits, name=name)
    backbone.set_trainable(shared_trained)

    listing = _Listing(shared_trained, factors or {})
    for site in backbone.sites:
        listing.add_layer(site, made[id(site.layer)], plan.get(id(site.layer), (site, (), {}))[1])
    listing.add_head(head, spec, is_shared_head)
    listing.add_rest(model)
    patched = PatchedModel(
        model, tuple(listing.parameters), spec, head, listing.momentum, frozenset(listing.recalibrated), (height, width)
    )
    _warn_of_large_patches(backbone, patched)
    warn_of_zeroed_layers(patched)
    return patched


def warn_of_zeroed_layers(patched: PatchedModel) -> None:
    """Warns of layers whose every weight is masked out: nothing passes them."""
    zeroed = [layer.layer for layer in sparsity(patched) if layer.zeros == layer.weights]
    if zeroed:
        warnings.warn(
            f"task '{patched.model.name}': its mask takes every weight of {len(zeroed)} layers (first: '{zeroed[0]}'); "
            "nothing passes them. Lower threshold= below initial=, or the learning rate of the scores",
            errors.PatchWarning,
            stacklevel=3,
        )


def _warn_of_large_patches(backbone: Backbone, patched: PatchedModel) -> None:
    owned: dict[tuple[str, str], int] = {}
    for p in patched.parameters:
        if p.owner == PRIVATE and p.role == TRAINED:
            place = p.key.rsplit("/", 2)[0], p.kind
            owned[place] = owned.get(place, 0) + p.stored_bits
    larger = []
    for site in backbone.sites:
        bits = sum(_FLOAT_BITS * math.prod(v.shape) for v in site.layer.variables)
        if patched_convolution.kernel_name(site.layer):
            larger += [(*place, size, bits) for place, size in owned.items() if place[0] == site.name and size > bits]
    if larger:
        name, kind, patch, layer = larger[0]
        warnings.warn(
            f"task '{patched.model.name}': patch '{kind}' is larger than the layer that it adapts in {len(larger)} layers "
            f"(first: '{name}', {patch // 8:,} bytes against {layer // 8:,}); 'full(layers=...)' would cost less there",
            errors.PatchWarning,
            stacklevel=3,
        )


def make_head(classes: int, seed: int) -> keras.layers.Dense:
    """A head with random kernel (Glorot uniform) and zero bias; equal seeds give equal heads."""
    return keras.layers.Dense(classes, name="head", kernel_initializer=keras.initializers.GlorotUniform(seed=seed))


def head_is_shared(spec: PatchSpec) -> bool:
    """Whether the spec leaves the head to the tasks with the same labels."""
    head = spec.get("head")
    return head.mode == "shared" if isinstance(head, Head) else spec.get("full") is None


def _plan(sites: Sequence[LayerSite], spec: PatchSpec) -> list[tuple[LayerSite, list[PatchKind]]]:
    plan: dict[str, tuple[LayerSite, list[PatchKind]]] = {}
    for kind in spec.kinds:
        for site in kind.select(sites):
            plan.setdefault(site.name, (site, []))[1].append(kind)
    return list(plan.values())


def _of_layer(site: LayerSite, factors: Mapping[str, keras.Variable]) -> dict[str, dict[str, keras.Variable]]:
    """The factors of a layer by kind and name."""
    found: dict[str, dict[str, keras.Variable]] = {}
    for key, variable in factors.items():
        layer, kind, name = key.rsplit("/", 2)
        if layer == site.name:
            found.setdefault(kind, {})[name] = variable
    return found


def _patched(
    site: LayerSite, kinds: Sequence[PatchKind], factors: Mapping[str, Mapping[str, keras.Variable]]
) -> keras.layers.Layer:
    layer = site.layer
    whole = [replaced for kind in kinds if (replaced := kind.whole_layer(layer)) is not None]
    if whole:
        if len(kinds) > 1:
            raise _cannot_share(layer, [kind.name for kind in kinds])
        return whole[0]
    patches = [kind.layer_patch(site) for kind in kinds]
    for patch in patches:
        patch.adopt(factors.get(patch.kind, {}))
    if any(patch.replaces for patch in patches) and any(patch.kind == "mask" for patch in patches):
        raise _cannot_share(layer, [patch.kind for patch in patches if patch.replaces or patch.kind == "mask"])
    return patched_convolution.PatchedConvolution(layer, patches)


def _cannot_share(layer: keras.layers.Layer, kinds: Sequence[str]) -> errors.PatchError:
    named = " and ".join(f"'{kind}'" for kind in kinds)
    return errors.PatchError(
        f"patch kinds {named} cannot share layer '{layer.name}' ({type(layer).__name__}); part them by layers= or stage="
    )


class _Listing:
    """Collects the parameters of a task model while it walks the layers."""

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
        for private in self._private(used, kinds):
            key = f"{site.name}/{private.kind}/{private.name}"
            if id(private.variable) in self._factors:
                self._add(key, private.variable, SHARED, FACTORS, FIXED)
                continue
            self._add(key, private.variable, PRIVATE, private.kind, private.role, private.storage)
            if private.role == STATISTICS:
                kind = next(k for k in kinds if k.name == private.kind)
                self.momentum[key] = kind.momentum
                if kind.recalibrate:
                    self.recalibrated.add(key)
        still_used = {id(v) for v in used.variables}
        is_patched = isinstance(used, PatchedLayer)
        learned = learned_variables(site.layer)
        for variable in site.layer.variables:
            if id(variable) not in still_used:
                continue
            key = f"{site.name}/{variable.name}"
            role = _shared_role(variable, self.shared_trained, id(variable) in learned)
            if is_patched and isinstance(site.layer, keras.layers.BatchNormalization):
                role = FIXED  # frozen statistics, or frozen scale and bias: the backbone's, always
            self._add(key, variable, SHARED, "backbone", role)
            if role == STATISTICS:
                self.momentum[key] = site.layer.momentum

    @staticmethod
    def _private(used: keras.layers.Layer, kinds: Sequence[PatchKind]) -> list[PrivateVariable]:
        if isinstance(used, PatchedLayer):
            return used.private_variables()
        if not kinds:
            return []
        kind = kinds[0].name
        return [PrivateVariable(kind, v.name, v, TRAINED if v.trainable else _untrained_role(v)) for v in used.variables]

    def add_head(self, head: keras.layers.Layer, spec: PatchSpec, shared: bool) -> None:
        kind = spec.get("head")
        is_random = isinstance(kind, Head) and kind.mode == "random"
        head.trainable = not is_random and (self.shared_trained or not shared)
        for variable in head.variables:
            if shared:
                self._add(f"head/{variable.name}", variable, SHARED, "head", TRAINED if self.shared_trained else FIXED)
            else:
                self._add(f"head/head/{variable.name}", variable, PRIVATE, "head", FIXED if is_random else TRAINED)

    def add_rest(self, model: keras.Model) -> None:
        for variable in model.variables:  # dropout seeds
            self._add(variable.path, variable, PRIVATE, "random", RANDOM)


def _shared_role(variable: keras.Variable, shared_trained: bool, learned: bool) -> str:
    if not keras.backend.is_float_dtype(variable.dtype):
        return RANDOM
    if not shared_trained:
        return FIXED
    if learned:
        return TRAINED
    return STATISTICS if variable.name.startswith("moving_") else FIXED


def _untrained_role(variable: keras.Variable) -> str:
    if not keras.backend.is_float_dtype(variable.dtype):
        return RANDOM
    return STATISTICS if variable.name.startswith("moving_") else FIXED
