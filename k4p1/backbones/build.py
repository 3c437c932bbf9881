"""Builds backbones: networks of keras.applications, a user's own model, or one read from a file."""

import contextlib
import copy
import inspect
import json
import pathlib
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import keras
import numpy as np

from k4p1 import errors, offline
from k4p1.backbones import canonical, halving_padding, input_scaling, networks, structure
from k4p1.backbones.backbone import FILE_FORMAT, FILE_VERSION, Backbone, is_image_network
from k4p1.backbones.view import view
from k4p1.files import tensor_file

_MINIMUM_SIZES = {"InceptionV3": 75, "InceptionResNetV2": 75, "Xception": 71}
_BUILT_FOR = {"NASNetMobile": 224, "NASNetLarge": 331}
"""Networks that have other layers for an image of open size, which do not fit together, and what their weights are for."""
_FAMILIES = (  # prefix of a keras.applications name -> how its own preprocess_input scales
    ("EfficientNet", "none"),
    ("ConvNeXt", "none"),
    ("MobileNetV3", "none"),
    ("DenseNet", "imagenet"),
    ("VGG", "caffe"),
    ("ResNet50V2", "symmetric"),
    ("ResNet101V2", "symmetric"),
    ("ResNet152V2", "symmetric"),
    ("ResNet", "caffe"),
    ("", "symmetric"),
)

_OURS = {
    "include_top": "a backbone ends before the classifier, and each task brings its own head",
    "pooling": "a backbone ends with global average pooling",
    "input_shape": "the image size is that of each task",
    "input_tensor": "the image size is that of each task",
    "classes": "each task brings a head for its own classes",
    "classifier_activation": "each task brings its own head, which puts out logits",
}
"""Arguments of keras.applications that a backbone decides, and how."""


def applications() -> dict[str, Any]:
    """The networks of keras.applications by name."""
    return {name: f for name, f in vars(keras.applications).items() if inspect.isfunction(f) and name[0].isupper()}


def application(
    network: str,
    weights: str | None = None,
    width: float | None = None,
    imagenet_rescaling: bool | None = None,
    **arguments: Any,
) -> Backbone:
    """A network of keras.applications without its classifier, global average pooling at its end.

    Args:
      network: its name, such as `MobileNetV2`, `InceptionV3`, `DenseNet121`.
      weights: None (random), `imagenet` (downloaded by Keras), or the path of a weight file for the network without
        classifier, or of a backbone file that k4p1 wrote.
      width: multiplies the filters of every convolution: `alpha` of the MobileNets; InceptionV3 is rebuilt.
      imagenet_rescaling: of EfficientNetB0 to B7 alone: whether inputs are divided once more by the square roots of the
        standard deviations, as the networks behind the ImageNet weights expect. None: Keras' choice, for `imagenet` only;
        give True with the path of such a weight file.
      **arguments: further arguments of the Keras function, such as `minimalistic`.

    Raises:
      ConfigError: unknown network or argument.
      ArtifactError: a weight file that does not exist, cannot be read or does not fit.
    """
    known = applications()
    if network not in known:
        raise errors.ConfigError(errors.unknown("backbone", network, known))
    can_rescale = network.startswith("EfficientNetB")
    if imagenet_rescaling is not None and not can_rescale:
        raise errors.ConfigError(f"{network}(imagenet_rescaling={imagenet_rescaling}): only EfficientNetB0 to B7 have it")
    if imagenet_rescaling is False and weights == "imagenet":
        raise errors.ConfigError(f"{network}(imagenet_rescaling=False): the ImageNet weights need it; leave it out")
    rescales = can_rescale and (imagenet_rescaling or weights == "imagenet")
    arguments = {name: one.item() if isinstance(one, np.generic) else one for name, one in arguments.items()}
    config = {"network": network, **({"width": width} if width is not None else {}), **arguments}
    config |= {"imagenet_rescaling": True} if rescales else {}
    accepted = inspect.signature(known[network]).parameters
    is_rebuilt = width not in (None, 1.0) and network == "InceptionV3"
    has_own_width = width is not None and network != "InceptionV3"
    keras_arguments = {**arguments, **({"alpha": width} if has_own_width else {})}
    for name in keras_arguments:
        if name in _OURS:
            raise errors.ConfigError(f"{network}({name}={keras_arguments[name]!r}): {_OURS[name]}; leave it out")
        if name not in accepted:
            named = "width" if name == "alpha" else name
            raise errors.ConfigError(errors.unknown(f"argument of {network}", named, [*accepted, "weights"]))
    if arguments.get("include_preprocessing") is False:
        raise errors.ConfigError(
            f"{network}(include_preprocessing=False): task models scale pixels of 0 to 255 as the network expects them; "
            "leave it out"
        )
    if width is not None and width <= 0:
        raise errors.ConfigError(f"{network}(width={width}): the width must be positive")
    if is_rebuilt and weights == "imagenet":
        raise errors.ConfigError(f"{network}(width={width}): ImageNet weights exist for width 1 only")
    path = None if weights in (None, "imagenet") else pathlib.Path(weights).expanduser()
    if path is not None and not path.is_file():
        raise errors.ArtifactError(f"no weight file {weights}; give None, 'imagenet' or the path of a file")
    is_ours = path is not None and path.suffix == ".safetensors"
    size = _BUILT_FOR.get(network)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Keras warns once per layer about weights that do not fit, then raises
            with _no_download_when_offline():
                model = known[network](
                    input_shape=(size, size, 3),
                    include_top=False,
                    pooling="avg",
                    weights=None if is_ours or is_rebuilt else str(path) if path else weights,
                    **keras_arguments,
                )
            if size is not None:
                model = halving_padding.for_any_size(model, "reduction")
            if rescales and weights != "imagenet":
                model = _with_imagenet_rescaling(model)
            if is_rebuilt:
                model = _of_other_width(model, width)
                if path is not None and not is_ours:
                    model.load_weights(path)
    except Exception as e:  # Keras raises many kinds: bad arguments, damaged files, no network
        if weights == "imagenet" and not isinstance(e, ValueError):
            raise errors.ArtifactError(
                f"Keras cannot load the ImageNet weights of {network}{_of_width(width)} ({errors.reason(e)}); give "
                "weights = PATH of a file, or None"
            ) from e
        if path is None:
            raise errors.ConfigError(f"Keras cannot build {network}: {errors.reason(e)}") from e
        raise errors.ArtifactError(
            f"the weights of {path} do not fit {network}{_of_width(width)}: {errors.reason(e)}"
        ) from e
    scaling = next(value for prefix, value in _FAMILIES if network.startswith(prefix))
    backbone = Backbone(
        model, network, config, scaling, _MINIMUM_SIZES.get(network, 32), rebuilds=weights is None and _is_plain(config)
    )
    if is_ours:
        tensors, metadata = tensor_file.read(path, FILE_FORMAT, FILE_VERSION)
        backbone.assign(tensors)
        backbone.normalisation = metadata.get("normalisation", "")
    return backbone


@contextlib.contextmanager
def _no_download_when_offline() -> Iterator[None]:
    """Offline, Keras finds weights in its cache, or fails at once; it has no setting for this."""
    if not offline.is_offline():
        yield
        return
    from keras.src.utils import file_utils

    def refuse(origin, *_):
        file = str(origin).rpartition("/")[2]
        raise OSError(f"offline, and {file} is not in the folder models/ of Keras' cache, by default ~/.keras")

    before, file_utils.urlretrieve = file_utils.urlretrieve, refuse
    try:
        yield
    finally:
        file_utils.urlretrieve = before


def _is_plain(config: Mapping[str, Any]) -> bool:
    return all(isinstance(one, (bool, int, float, str, type(None))) for one in config.values())


def mobilenet_v2(weights: str | None = None, width: float = 1.0) -> Backbone:
    """MobileNetV2 of any width: 17,056 batch normalisation channels and 64,224 depthwise kernel values at width 1.

    Args:
      weights: None (random), `imagenet`, or the path of a weight file; see `application`.
      width: multiplies the filters of every convolution.
    """
    return application("MobileNetV2", weights=weights, width=width)


def inception_v3(weights: str | None = None, width: float = 1.0) -> Backbone:
    """InceptionV3: 17,216 batch normalisation channels, without scales in Keras; a scale-and-bias patch adds them.

    Keras has it at width 1 only; another width multiplies the filters of every convolution, and has no ImageNet weights.

    Args:
      weights: None (random), `imagenet`, or the path of a weight file; see `application`.
      width: multiplies the filters of every convolution.
    """
    return application("InceptionV3", weights=weights, width=width)


def from_model(model: keras.Model, name: str = "custom", scaling: str = "none") -> Backbone:
    """A user's own functional model, from images to features or feature maps (which are averaged).

    The model's layers become shared. Its layers get canonical names. Build it with input (None, None, 3) where it allows
    any image size.

    Raises:
      ConfigError: not a functional model with one image input.
    """
    if is_image_network(model):
        _warn_of_classifier(model)
        model = _own_copy(model)
    backbone = Backbone(model, name, {}, scaling)
    described = _written_and_read(model)
    backbone.config = {"keras_model": described}
    check_round_trip(backbone)
    return backbone


def _warn_of_classifier(model: keras.Model) -> None:
    last = model.output._keras_history.operation
    activation = getattr(last, "activation", None)
    is_softmax = isinstance(last, keras.layers.Softmax) or activation in (
        keras.activations.softmax,
        keras.activations.sigmoid,
    )
    if is_softmax and len(model.output.shape) == 2:
        errors.warn(
            f"backbone '{model.name}' ends in the classifier '{last.name}', and its probabilities would be the features of "
            "a task; cut it off: keras.Model(model.input, model.layers[-2].output)"
        )


def _own_copy(model: keras.Model) -> keras.Model:
    """The same network of views, so that renaming and nodes of the backbone do not reach the user's layers; pooled."""
    made: dict[int, keras.Operation] = {}
    levels: dict[int, set[str]] = {}

    def viewed(layer: keras.Operation) -> keras.Operation:
        if id(layer) not in made:
            made[id(layer)] = view(layer, batch_normalise=True)
        return made[id(layer)]

    for place, layer in _layers_by_level(model):
        levels.setdefault(id(layer), set()).add(place)
        if len(levels[id(layer)]) > 1:
            raise errors.ConfigError(
                f"backbone '{model.name}' uses layer '{layer.name}' ({type(layer).__name__}) at two levels of nesting, or "
                "in two inner models, and Keras would read it again as two layers; use it in one of them"
            )
    copy = keras.models.clone_model(model, clone_function=viewed, recursive=True)
    if len(copy.output.shape) == 4:
        taken = {operation.name for operation in copy.operations}
        pooling = "features" if "features" not in taken else "features_pooled"
        pooled = keras.layers.GlobalAveragePooling2D(name=pooling)(copy.output)
        copy = keras.Model(copy.input, pooled, name=model.name)
    return copy


def _layers_by_level(model: keras.Model, place: str = "") -> Iterator[tuple[str, keras.layers.Layer]]:
    """The layers with variables and inner models, each once per model that it is in, with the place of that model."""
    for operation in canonical.operations(model):
        if canonical.is_graph(operation):
            yield place, operation
            yield from _layers_by_level(operation, f"{place}{id(operation)}/")
        elif getattr(operation, "variables", None):
            yield place, operation


def _written_and_read(model: keras.Model) -> Any:
    """Keras' description of a model as a file gives it back; see `check_round_trip`."""
    try:
        return json.loads(json.dumps(keras.saving.serialize_keras_object(model)))
    except Exception as e:  # Keras raises many kinds
        raise errors.ConfigError(f"backbone '{model.name}' cannot be written to a file: {_culprit(model, e)}") from e


def check_round_trip(backbone: Backbone) -> None:
    """Makes sure that a network can be built again from its description, before anything is trained on it.

    Raises:
      ConfigError: it cannot, or becomes another network; names the layer and says what would help.
    """
    if backbone.rebuilds:
        return
    try:
        again = from_config(backbone.name, json.loads(json.dumps(dict(backbone.config))), backbone.scaling)
    except (errors.K4p1Error, TypeError, ValueError) as e:
        raise errors.ConfigError(f"backbone '{backbone.name}' {_culprit(backbone.model, e.__cause__ or e)}") from e
    here, there = structure.describe(backbone.model), structure.describe(again.model)
    for one, other in zip(here, there, strict=False):
        if one != other:
            raise errors.ConfigError(
                f"backbone '{backbone.name}': layer '{one[0]}' ({one[1]}) is not the same once it was written and read; its "
                "get_config must return every argument of its constructor"
            )
    shapes = [{key: tuple(v.shape) for key, v in b.variables().items()} for b in (backbone, again)]
    if len(here) != len(there) or shapes[0] != shapes[1]:
        differing = sorted(set(shapes[0].items()) ^ set(shapes[1].items()))
        first = f" (first: {differing[0][0]})" if differing else ""
        raise errors.ConfigError(f"backbone '{backbone.name}' has other variables once it was written and read{first}")
    backbone.rebuilds = True


def _culprit(model: keras.Model, error: Exception) -> str:
    """Which layer cannot be written and read, and what to do."""
    for name, layer in canonical.leaf_layers(model):
        try:
            keras.saving.deserialize_keras_object(json.loads(json.dumps(keras.saving.serialize_keras_object(layer))))
        except Exception as e:  # as above
            if isinstance(layer, keras.layers.Lambda):
                return (
                    f"has a Lambda layer, '{name}', whose Python function no file can hold; write it with operators or "
                    "keras.ops on the tensors themselves, or as a registered keras.layers.Layer"
                )
            return (
                f"cannot be read again from a file because of layer '{name}' ({type(layer).__name__}): {errors.reason(e)}; "
                "register it with keras.saving.register_keras_serializable and let get_config return its arguments"
            )
    return f"cannot be read again from a file: {errors.reason(error)}"


def from_config(name: str, config: Mapping[str, Any], scaling: str) -> Backbone:
    """The structure that a backbone file describes, with random values.

    Raises:
      ArtifactError: the description cannot be built here, such as a custom layer that is not registered with Keras.
    """
    try:
        if config.get("network") in networks.NETWORKS:
            return networks.rebuilt(config)
        if "network" in config:
            arguments = {key: value for key, value in config.items() if key != "weights"}  # values come from the file
            return application(**arguments)
        described = copy.deepcopy(config["keras_model"])  # Keras empties what it reads
        return Backbone(keras.saving.deserialize_keras_object(described), name, config, scaling)
    except (ValueError, TypeError, KeyError) as e:
        raise errors.ArtifactError(f"cannot rebuild backbone '{name}': {errors.reason(e)}") from e


def _of_other_width(model: keras.Model, width: float) -> keras.Model:
    """The same network with `width` times the filters of every convolution, at least one each; random weights."""

    def scaled(layer: keras.layers.Layer) -> keras.layers.Layer:
        config = layer.get_config()
        if isinstance(layer, keras.layers.Conv2D):
            config["filters"] = max(1, round(config["filters"] * width))
        return type(layer).from_config(config)

    return keras.models.clone_model(model, clone_function=scaled)


def _with_imagenet_rescaling(model: keras.Model) -> keras.Model:
    """An EfficientNet with the layer that Keras adds behind its normalisation for ImageNet weights alone."""
    rescaling = keras.layers.Rescaling([1.0 / std**0.5 for std in input_scaling.IMAGENET_STD])

    def called(layer: keras.layers.Layer, *args: Any, **kwargs: Any) -> Any:
        outputs = layer(*args, **kwargs)
        return rescaling(outputs) if isinstance(layer, keras.layers.Normalization) else outputs

    rescaled = keras.models.clone_model(model, call_function=called)
    rescaled.set_weights(model.get_weights())
    return rescaled


def _of_width(width: float | None) -> str:
    return f" of width {width:g}" if width is not None else ""
