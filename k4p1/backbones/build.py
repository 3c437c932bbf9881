"""Builds backbones: networks of keras.applications, a user's own model, or one read from a file."""

import copy
import inspect
import pathlib
import warnings
from collections.abc import Mapping
from typing import Any

import keras

from k4p1 import errors
from k4p1.backbones import networks
from k4p1.backbones.backbone import FILE_FORMAT, FILE_VERSION, Backbone
from k4p1.files import tensor_file

_MINIMUM_SIZES = {"InceptionV3": 75, "InceptionResNetV2": 75, "Xception": 71}
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


def applications() -> dict[str, Any]:
    """The networks of keras.applications by name."""
    return {name: f for name, f in vars(keras.applications).items() if inspect.isfunction(f) and name[0].isupper()}


def application(network: str, weights: str | None = None, width: float | None = None, **arguments: Any) -> Backbone:
    """A network of keras.applications without its classifier, global average pooling at its end.

    Args:
      network: its name, such as `MobileNetV2`, `InceptionV3`, `DenseNet121`.
      weights: None (random), `imagenet` (downloaded by Keras), or the path of a weight file for the network without
        classifier, or of a backbone file that k4p1 wrote.
      width: multiplies the filters of every convolution: `alpha` of the MobileNets; InceptionV3 is rebuilt.
      **arguments: further arguments of the Keras function, such as `minimalistic`.

    Raises:
      ConfigError: unknown network or argument.
      ArtifactError: a weight file that does not exist, cannot be read or does not fit.
    """
    known = applications()
    if network not in known:
        raise errors.ConfigError(errors.unknown("backbone", network, known))
    config = {"network": network, **({"width": width} if width is not None else {}), **arguments}
    accepted = inspect.signature(known[network]).parameters
    is_rebuilt = width not in (None, 1.0) and network == "InceptionV3"
    has_own_width = width is not None and network != "InceptionV3"
    keras_arguments = {**arguments, **({"alpha": width} if has_own_width else {})}
    for name in keras_arguments:
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
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Keras warns once per layer about weights that do not fit, then raises
            model = known[network](
                input_shape=(None, None, 3),
                include_top=False,
                pooling="avg",
                weights=None if is_ours or is_rebuilt else str(path) if path else weights,
                **keras_arguments,
            )
            if is_rebuilt:
                model = _of_other_width(model, width)
                if path is not None and not is_ours:
                    model.load_weights(path)
    except Exception as e:  # Keras raises many kinds: bad arguments, damaged files, no network
        if weights == "imagenet" and not isinstance(e, ValueError):
            raise errors.ArtifactError(
                f"Keras cannot load the ImageNet weights of {network}{_of_width(width)} ({_first_line(e)}); give weights = "
                "PATH of a file, or None"
            ) from e
        if path is None:
            raise errors.ConfigError(f"Keras cannot build {network}: {_first_line(e)}") from e
        raise errors.ArtifactError(f"the weights of {path} do not fit {network}{_of_width(width)}: {_first_line(e)}") from e
    scaling = next(value for prefix, value in _FAMILIES if network.startswith(prefix))
    backbone = Backbone(model, network, config, scaling, _MINIMUM_SIZES.get(network, 32))
    if is_ours:
        backbone.assign(tensor_file.read(path, FILE_FORMAT, FILE_VERSION)[0])
    return backbone


def mobilenet_v2(weights: str | None = None, width: float = 1.0) -> Backbone:
    """MobileNetV2 of any width: 17,056 batch normalisation channels and 64,224 depthwise kernel values at width 1."""
    return application("MobileNetV2", weights=weights, width=width)


def inception_v3(weights: str | None = None, width: float = 1.0) -> Backbone:
    """InceptionV3: 17,216 batch normalisation channels, without scales in Keras; a scale-and-bias patch adds them.

    Keras has it at width 1 only; another width multiplies the filters of every convolution, and has no ImageNet weights.
    """
    return application("InceptionV3", weights=weights, width=width)


def from_model(model: keras.Model, name: str = "custom", scaling: str = "none") -> Backbone:
    """A user's own functional model, from images to features or feature maps (which are averaged).

    The model's layers become shared. Its layers get canonical names. Build it with input (None, None, 3) where it allows
    any image size.

    Raises:
      ConfigError: not a functional model with one image input.
    """
    if hasattr(model, "_run_through_graph") and len(model.inputs) == 1 and len(model.output.shape) == 4:
        pooled = keras.layers.GlobalAveragePooling2D(name="features")(model.output)
        model = keras.Model(model.input, pooled, name=model.name)
    backbone = Backbone(model, name, {}, scaling)
    backbone.config = {"keras_model": keras.saving.serialize_keras_object(model)}
    return backbone


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
        raise errors.ArtifactError(f"cannot rebuild backbone '{name}': {_first_line(e)}") from e


def _of_other_width(model: keras.Model, width: float) -> keras.Model:
    """The same network with `width` times the filters of every convolution, at least one each; random weights."""

    def scaled(layer: keras.layers.Layer) -> keras.layers.Layer:
        config = layer.get_config()
        if isinstance(layer, keras.layers.Conv2D):
            config["filters"] = max(1, round(config["filters"] * width))
        return type(layer).from_config(config)

    return keras.models.clone_model(model, clone_function=scaled)


def _of_width(width: float | None) -> str:
    return f" of width {width:g}" if width is not None else ""


def _first_line(e: Exception) -> str:
    return (str(e).strip().splitlines() or [type(e).__name__])[0][:200]
