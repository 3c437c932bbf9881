"""Applies a patch spec to a backbone: the task model and the list of its parameters."""

import itertools
import math
import warnings
from collections.abc import Container, Mapping, Sequence

import keras

from k4p1 import errors
from k4p1.backbones import endpoints
from k4p1.backbones.backbone import Backbone
from k4p1.backbones.input_scaling import InputScaling
from k4p1.backbones.site import LayerSite
from k4p1.patches import moving_state, patched_convolution
from k4p1.patches.kind import PatchKind
from k4p1.patches.parameter_list import ParameterList
from k4p1.patches.patched_layer import STATISTICS, TRAINED, view
from k4p1.patches.patched_model import LOGITS, PRIVATE, PatchedModel
from k4p1.patches.rewiring import LayerFor, Rewiring
from k4p1.patches.spec import PatchSpec
from k4p1.patches.task_head import FEATURES, DenseHead, TaskHead

_FLOAT_BITS = 32


def apply_patches(
    backbone: Backbone,
    spec: str | PatchSpec,
    *,
    classes: int | None = None,
    image_size: int | Sequence[int],
    head: TaskHead | None = None,
    shared_trained: bool = False,
    shared_head: keras.layers.Layer | None = None,
    factors: Mapping[str, keras.Variable] | None = None,
    dropout: float = 0.0,
    seed: int = 0,
    name: str = "task",
) -> PatchedModel:
    """Builds the model of one task: the backbone with the task's patch, and a head.

    Args:
      backbone: shared; none of its values changes.
      spec: what the task owns, such as `"scale_bias+head"`.
      classes: number of logits, for a head that classifies.
      image_size: side in pixels, or (height, width).
      head: another head in place of `classes`, such as that of an objective.
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
      ConfigError: the image is too small for the network, an endpoint that it does not have, or not one of `classes` and
        `head`.
    """
    if not isinstance(backbone, Backbone):
        raise errors.ConfigError(
            f"apply_patches: backbone is a {type(backbone).__name__}; expected a Backbone, as application, load_backbone or "
            "backbone_from_model give one"
        )
    if (classes is None) == (head is None):
        raise errors.ConfigError("apply_patches needs either classes or head")
    head = head or DenseHead(classes)
    spec = PatchSpec.parse(spec)
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    if backbone.minimum_size is not None and min(height, width) < backbone.minimum_size:
        raise errors.ConfigError(
            f"image size {height}x{width} is too small for {backbone.name}: at least {backbone.minimum_size} pixels per side"
        )
    plan = {id(site.layer): (site, kinds, _of_layer(site, factors or {})) for site, kinds in _plan(backbone.sites, spec)}
    made: dict[int, keras.layers.Layer] = {}

    def layer_for(layer):
        if id(layer) not in made:
            chosen = plan.get(id(layer))
            made[id(layer)] = _patched(*chosen) if chosen else view(layer, batch_normalise=shared_trained)
        return made[id(layer)]

    taken = {operation.name for operation in backbone.model.operations}
    image = keras.Input((height, width, 3), name="image")
    scaled = InputScaling(backbone.scaling, name="input_scaling")(image)
    opened = tuple(e for e in head.endpoints if e != FEATURES)
    rewiring = _rewiring(backbone, spec, layer_for, seed)
    scaled_image = keras.Input(scaled.shape[1:], dtype=scaled.dtype, name=_free("scaled_image", taken))
    try:
        if rewiring is not None:  # in one graph with the head, so that a loss can read every tensor of it
            maps = endpoints.outputs(backbone.model, scaled, opened, layer_for, rewiring.after)
            network = keras.Model(image, maps, name=backbone.model.name)
        elif opened:
            found = endpoints.outputs(backbone.model, scaled_image, opened, layer_for)
            network = keras.Model(scaled_image, found)
        else:
            network = keras.models.clone_model(
                backbone.model, input_tensors=scaled_image, clone_function=layer_for, recursive=True
            )
    except (errors.PatchError, errors.ConfigError):
        raise
    except ValueError as e:
        raise errors.ConfigError(f"{backbone.name} does not work at image size {height}x{width}: {errors.reason(e)}") from e
    for operation in network.operations:  # some versions of Keras let a layer put out nothing
        sides = [side for output in keras.tree.flatten(operation.output) for side in output.shape[1:]]
        if any(side is not None and side <= 0 for side in sides):
            raise errors.ConfigError(
                f"image size {height}x{width} is too small for {backbone.name}: nothing is left after '{operation.name}'"
            )
    mode = spec.head_mode
    last = view(shared_head, True) if mode == "shared" and shared_head is not None else head.make(seed)
    if rewiring is None:
        maps = network(scaled)
        maps = dict(maps) if opened else {FEATURES: maps}
    read = [maps[endpoint] for endpoint in head.endpoints]
    dropped = []
    if dropout:
        names = ["head_dropout", *(f"head_dropout_{number}" for number in range(1, len(read)))]
        dropped = [keras.layers.Dropout(dropout, name=n) for n in names]
        read = [layer(x) for layer, x in zip(dropped, read, strict=True)]
    outputs = last(read if len(read) > 1 else read[0])
    named = list(outputs) if isinstance(outputs, dict) else [LOGITS]
    network.name = _free(
        backbone.model.name, {image.name, "input_scaling", last.name, *named, *(one.name for one in dropped)}
    )
    if isinstance(outputs, dict):
        outputs = {n: keras.layers.Activation("linear", dtype="float32", name=n)(x) for n, x in outputs.items()}
    else:
        outputs = keras.layers.Activation("linear", dtype="float32", name=LOGITS)(outputs)
    model = keras.Model(image, outputs, name=name)
    backbone.set_trainable(shared_trained)

    listed = ParameterList(shared_trained, factors or {})
    used = {id(layer) for layer in network._flatten_layers()}  # a rewired network may leave layers out
    for site in backbone.sites:
        if id(made.get(id(site.layer))) in used:
            listed.add_layer(site, made[id(site.layer)], plan.get(id(site.layer), (site, (), {}))[1])
    for own_name, layer in rewiring.layers.items() if rewiring else ():
        listed.add_own(own_name, layer)
    listed.add_head(last, mode)
    listed.add_rest(model)
    moved = {id(p.variable) for p in listed.parameters if p.role == STATISTICS}
    for site in backbone.sites:
        if id(site.layer) in made:
            moving_state.check(site.name, made[id(site.layer)], moved)
    patched = PatchedModel(
        model,
        tuple(listed.parameters),
        spec,
        last,
        listed.momentum,
        frozenset(listed.recalibrated),
        (height, width),
        maps,
        head.endpoints,
        rewiring=rewiring,
    )
    _warn_of_large_patches(backbone, patched)
    warn_of_kinds(patched)
    return patched


def _free(name: str, taken: Container[str]) -> str:
    """The name, or one that is not taken yet."""
    while name in taken:
        name += "_"
    return name


def _rewiring(backbone: Backbone, spec: PatchSpec, layer_for: LayerFor, seed: int) -> Rewiring | None:
    """What the one kind of a spec that changes the graph makes of it."""
    found = {kind.name: made for kind in spec.kinds if (made := kind.rewire(backbone.model, layer_for, seed)) is not None}
    if len(found) > 1:
        raise errors.PatchError(f"only one kind can change the network's graph; '{spec}' has {' and '.join(found)}")
    return next(iter(found.values()), None)


def warn_of_kinds(patched: PatchedModel) -> None:
    """Warns of what the kinds of a task model, built or trained, have to say (`PatchKind.warnings`)."""
    for kind in patched.spec.kinds:
        for warning in kind.warnings(patched):
            warnings.warn(f"task '{patched.model.name}': {warning}", errors.PatchWarning, stacklevel=3)


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
    for one, other in itertools.permutations(kinds, 2):
        if not one.can_share(layer, other):
            raise _cannot_share(layer, [kind for kind in kinds if kind in (one, other)])
    if kinds[0].replaces_layer(layer):
        return kinds[0].whole_layer(layer)
    patches = [kind.layer_patch(site) for kind in kinds]
    replacing = [kind for kind, patch in zip(kinds, patches, strict=True) if patch.replaces]
    reading = [kind for kind in kinds if kind.reads_shared_kernel]
    if replacing and reading:
        raise _cannot_share(layer, [kind for kind in kinds if kind in (replacing[0], reading[0])])
    for patch in patches:
        patch.adopt(factors.get(patch.kind, {}))
    return patched_convolution.PatchedConvolution(layer, patches)


def _cannot_share(layer: keras.layers.Layer, kinds: Sequence[PatchKind]) -> errors.PatchError:
    names = " and ".join(f"'{kind.name}'" for kind in kinds)
    return errors.PatchError(
        f"patch kinds {names} cannot share layer '{layer.name}' ({type(layer).__name__}); separate them by layers= or stage="
    )
