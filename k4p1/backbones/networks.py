"""Backbones that keras.applications does not have: residual nets for small images, VGG-16 with batch normalisation."""

import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import keras
import numpy as np

from k4p1 import errors
from k4p1.backbones import residual, residual_imagenet, vgg
from k4p1.backbones.backbone import FILE_FORMAT, FILE_VERSION, Backbone
from k4p1.files import tensor_file

_CIFAR_VARIABLES = {"weight": "gamma", "bias": "beta", "running_mean": "moving_mean", "running_var": "moving_variance"}


def resnet26(
    weights: str | None = None, width: float = 1.0, dropout: float = 0.0, form: str = "code", crop: int = 0
) -> Backbone:
    """RA's ResNet-26: three stages, 64-128-256 channels times `width`; see `residual.resnet26`.

    Args:
      weights: None (random), the path of a backbone file of k4p1, or of a Keras weight file.
      width: of the network.
      dropout: rate before the second convolution of each block.
      form: `code`, as the authors run it, or `text`, as their section 3.2 reads; until version 0.1 there was only `text`.
      crop: sides of the central window that the network looks at; 0: the whole image.
    """
    return _made("resnet26", weights, {"width": width, "dropout": dropout, "form": form, "crop": crop})


def cifar_resnet(weights: str | None = None, depth: int = 56) -> Backbone:
    """The CIFAR residual nets of He et al. 2016, 16-32-64 channels; see `residual.cifar_resnet`.

    Args:
      weights: None (random), the path of a backbone file of k4p1, of a Keras weight file, or of a `.npz` file of arrays
        named as in PyTorch's nets (`layer2.0.conv1.weight`), kernels (height, width, in, out).
      depth: 20, 32, 44, 56, 110, ...
    """
    return _made("cifar_resnet", weights, {"depth": depth})


def wide_resnet(
    weights: str | None = None, depth: int = 28, width: float = 4.0, dropout: float = 0.0, crop: int = 0
) -> Backbone:
    """WRN-28-4 as PB uses it for the Visual Decathlon (section 6); see `residual.wide_resnet`.

    Args:
      weights: None (random), the path of a backbone file of k4p1, or of a Keras weight file.
      depth: 6 n + 4.
      width: of the stages.
      dropout: rate between the convolutions of a block.
      crop: sides of the central window that the network looks at; 0: the whole image.
    """
    return _made("wide_resnet", weights, {"depth": depth, "width": width, "dropout": dropout, "crop": crop})


def resnet34(weights: str | None = None) -> Backbone:
    """ResNet-34 of He et al. 2016 for ImageNet, as NT has it; see `residual_imagenet.resnet34`.

    Args:
      weights: None (random), the path of a backbone file of k4p1, or of a Keras weight file.
    """
    return _made("resnet34", weights, {})


def vgg16_bn(weights: str | None = None, fully_connected: bool = False, dropout: float = 0.0) -> Backbone:
    """VGG-16 with a batch normalisation behind each convolution (PB, section 4), without its last layer; see `vgg.vgg16_bn`.

    Args:
      weights: None (random), `imagenet` or the path of a Keras weight file of VGG-16 (the normalisations then start as the
        identity), or the path of a backbone file of k4p1.
      fully_connected: with fc6 and fc7, as in PB: 537 MB in place of 59, images of 224 pixels and more; the weight file is
        then one of the whole VGG-16.
      dropout: rate behind fc6 and fc7.
    """
    return _made("vgg16_bn", weights, {"fully_connected": fully_connected, "dropout": dropout})


def rebuilt(config: Mapping[str, Any]) -> Backbone:
    """The structure that a configuration of this file describes, with random values."""
    arguments = {**_BEFORE.get(config["network"], {}), **config}
    return _made(arguments.pop("network"), None, arguments)


_BEFORE: dict[str, dict[str, Any]] = {"resnet26": {"form": "text"}}
"""What the arguments were that files of version 0.1 do not name, where the defaults are others today."""

_BUILDERS: dict[str, tuple[Callable[..., keras.Model], str, int]] = {
    "resnet26": (residual.resnet26, "imagenet", 16),
    "cifar_resnet": (residual.cifar_resnet, "imagenet", 8),
    "wide_resnet": (residual.wide_resnet, "imagenet", 16),
    "resnet34": (residual_imagenet.resnet34, "imagenet", 32),
    "vgg16_bn": (vgg.vgg16_bn, "caffe", 32),
}
NETWORKS = frozenset(_BUILDERS)
_WITHOUT_WEIGHTS = ("dropout", "crop")  # arguments on which no weight depends


def _made(network: str, weights: str | None, arguments: dict[str, Any]) -> Backbone:
    build, scaling, minimum_size = _BUILDERS[network]
    minimum_size = vgg.MINIMUM_SIZE if arguments.get("fully_connected") else minimum_size
    if not isinstance(weights, (str, pathlib.Path, type(None))):
        raise errors.ConfigError(
            f"{network}(weights={weights!r}): expected the path of a file, or None; give other arguments by their names, "
            f"such as {network}({next(iter(arguments), 'weights')}=...)"
        )
    path = None if weights in (None, "imagenet") else pathlib.Path(weights).expanduser()
    if path is not None and not path.is_file():
        raise errors.ArtifactError(f"no weight file {weights}; give None or the path of a file")
    if weights == "imagenet" and network != "vgg16_bn":
        raise errors.ConfigError(f"{network} has no ImageNet weights; give weights = PATH of a file, or None")
    suffix = path.suffix if path is not None else ""
    try:
        for_builder = path or weights if network == "vgg16_bn" and suffix != ".safetensors" else None
        model = build(**arguments, **({"weights": str(for_builder)} if for_builder else {}))
        backbone = Backbone(model, network, {"network": network, **arguments}, scaling, minimum_size)
        if suffix == ".safetensors":
            tensors, metadata = tensor_file.read(path, FILE_FORMAT, FILE_VERSION)
            backbone.normalisation = metadata.get("normalisation", "")
            _check_same_network(path, json.loads(metadata["config"]), backbone.config)
            backbone.assign(tensors)
        elif suffix == ".npz":
            backbone.assign(_from_pytorch_names(path))
        elif path is not None and not for_builder:
            model.load_weights(path)
    except errors.K4p1Error:
        raise
    except Exception as e:  # Keras raises many kinds: damaged files, other shapes, no network
        reason = (str(e).strip().splitlines() or [type(e).__name__])[0][:200]
        raise errors.ArtifactError(f"the weights {weights} do not fit {network}: {reason}") from e
    return backbone


def _check_same_network(path: pathlib.Path, stored: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    """Weights of another form of a network may fit where their strides do not, and would compute something else."""
    stored = {**_BEFORE.get(stored.get("network", ""), {}), **stored}
    for name in sorted(set(stored) & set(asked) - set(_WITHOUT_WEIGHTS)):
        if stored[name] != asked[name]:
            raise errors.ArtifactError(
                f"{path} holds {stored['network']} with {name}={stored[name]!r}, and {name}={asked[name]!r} is asked for; "
                "give the same, or load the file as it is (load_backbone)"
            )


def _from_pytorch_names(path: pathlib.Path) -> dict[str, np.ndarray]:
    """Arrays of a CIFAR net by canonical key: `layer2.0.bn1.weight` is `stage2_block1_1_bn/gamma`."""
    tensors = {}
    with np.load(path, allow_pickle=False) as arrays:
        for name in arrays.files:
            *where, layer, variable = name.split(".")
            if layer == "linear":
                continue  # the classifier
            place = f"stage{where[0].removeprefix('layer')}_block{int(where[1]) + 1}" if where else "stem"
            if layer.startswith("conv"):
                key = f"{place}_{layer}/kernel" if where else f"{place}/kernel"
            elif layer.startswith("bn") and variable in _CIFAR_VARIABLES:
                number = f"_{layer.removeprefix('bn')}" if where else ""
                key = f"{place}{number}_bn/{_CIFAR_VARIABLES[variable]}"
            else:
                raise errors.ArtifactError(f"{path}: array '{name}' is none of a CIFAR residual net")
            tensors[key] = arrays[name].astype(np.float32)
    return tensors
