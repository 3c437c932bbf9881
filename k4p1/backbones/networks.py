"""Backbones that keras.applications does not have: residual nets for small images, VGG-16 with batch normalisation."""

import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import keras
import numpy as np

from k4p1 import errors
from k4p1.backbones import residual, residual_imagenet
from k4p1.backbones.backbone import FILE_FORMAT, FILE_VERSION, Backbone
from k4p1.files import tensor_file

_CIFAR_VARIABLES = {"weight": "gamma", "bias": "beta", "running_mean": "moving_mean", "running_var": "moving_variance"}


def resnet26(weights: str | None = None, width: float = 1.0, dropout: float = 0.0) -> Backbone:
    """RA's ResNet-26: three stages, 64-128-256 channels times `width`; see `residual.resnet26`.

    Args:
      weights: None (random), the path of a backbone file of k4p1, or of a Keras weight file.
      width: of the network.
      dropout: rate before the second convolution of each block.
    """
    return _made("resnet26", weights, {"width": width, "dropout": dropout})


def cifar_resnet(weights: str | None = None, depth: int = 56) -> Backbone:
    """The CIFAR residual nets of He et al. 2016, 16-32-64 channels; see `residual.cifar_resnet`.

    Args:
      weights: None (random), the path of a backbone file of k4p1, of a Keras weight file, or of a `.npz` file of arrays
        named as in PyTorch's nets (`layer2.0.conv1.weight`), kernels (height, width, in, out).
      depth: 20, 32, 44, 56, 110, ...
    """
    return _made("cifar_resnet", weights, {"depth": depth})


def wide_resnet(weights: str | None = None, depth: int = 28, width: float = 4.0, dropout: float = 0.0) -> Backbone:
    """WRN-28-4 as PB uses it for the Visual Decathlon (section 6); see `residual.wide_resnet`.

    Args:
      weights: None (random), the path of a backbone file of k4p1, or of a Keras weight file.
      depth: 6 n + 4.
      width: of the stages.
      dropout: rate between the convolutions of a block.
    """
    return _made("wide_resnet", weights, {"depth": depth, "width": width, "dropout": dropout})


def resnet34(weights: str | None = None) -> Backbone:
    """ResNet-34 of He et al. 2016 for ImageNet, as NT has it; see `residual_imagenet.resnet34`.

    Args:
      weights: None (random), the path of a backbone file of k4p1, or of a Keras weight file.
    """
    return _made("resnet34", weights, {})


def vgg16_bn(weights: str | None = None) -> Backbone:
    """VGG-16 with a batch normalisation behind each convolution (PB, section 4), without its classifier.

    Args:
      weights: None (random), `imagenet` or the path of a Keras weight file of VGG-16 (the normalisations then start as the
        identity), or the path of a backbone file of k4p1.
    """
    return _made("vgg16_bn", weights, {})


def rebuilt(config: Mapping[str, Any]) -> Backbone:
    """The structure that a configuration of this file describes, with random values."""
    arguments = dict(config)
    return _made(arguments.pop("network"), None, arguments)


def _vgg16_bn(weights: str | None = None) -> keras.Model:
    plain = keras.applications.VGG16(input_shape=(None, None, 3), include_top=False, pooling="avg", weights=weights)
    return residual.with_batch_normalisation(plain, "vgg16_bn")


_BUILDERS: dict[str, tuple[Callable[..., keras.Model], str, int]] = {
    "resnet26": (residual.resnet26, "imagenet", 16),
    "cifar_resnet": (residual.cifar_resnet, "imagenet", 8),
    "wide_resnet": (residual.wide_resnet, "imagenet", 16),
    "resnet34": (residual_imagenet.resnet34, "imagenet", 32),
    "vgg16_bn": (_vgg16_bn, "caffe", 32),
}
NETWORKS = frozenset(_BUILDERS)


def _made(network: str, weights: str | None, arguments: dict[str, Any]) -> Backbone:
    build, scaling, minimum_size = _BUILDERS[network]
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
            backbone.assign(tensor_file.read(path, FILE_FORMAT, FILE_VERSION)[0])
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
            tensors[key] = arrays[name]
    return tensors
