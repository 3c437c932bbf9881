"""What papers count: multiply-adds of networks, sizes of families of models."""

import warnings

import keras
import numpy as np
import pytest

from k4p1 import backbones, errors
from k4p1.patches.apply import apply_patches
from k4p1.patches.costs import model_size_ratio, multiply_adds, task_costs


@pytest.fixture(scope="module")
def wrn():
    return backbones.wide_resnet()


@pytest.fixture(scope="module")
def resnet26():
    return backbones.resnet26()


def family(backbone, spec, tasks=9):
    """Nine tasks beside ImageNet, as in the Visual Decathlon; one model counts for all."""
    return model_size_ratio(backbone, [apply_patches(backbone, spec, classes=10, image_size=32)] * tasks)


def test_piggyback_adds_a_bit_a_weight(wrn):
    """PB, section 6: (32 n + 9 n) / 32 n = 41/32 = 1.28."""
    assert family(wrn, "mask+head") == pytest.approx(41 / 32, abs=0.005)
    assert round(family(wrn, "mask+head"), 2) == 1.28


@pytest.mark.parametrize(
    ("spec", "printed"),
    [
        ("parallel_adapter+scale_bias+head", 2.0),
        ("series_adapter(layers=stage*)+scale_bias+head", 2.0),
        ("parallel_adapter(block=second)+scale_bias+head", 1.5),
        ("parallel_adapter(rank=1)+head", 1.0),
        ("full", 10.0),
    ],
)
def test_residual_adapters_double_the_network(resnet26, spec, printed):
    """RA, Table 1, column "#par.", which is rounded to halves; `half` and SVD: 1.5x; fine-tuning: 10x."""
    assert round(2 * family(resnet26, spec)) / 2 == printed


def test_a_factor_is_counted_once(resnet26):
    factors = {}
    for site in resnet26.sites:
        if isinstance(site.layer, keras.layers.Conv2D):
            rows, columns = site.layer.kernel.shape[-2:]
            rank = max(1, min(rows, columns) // 2)
            key = f"{site.name}/parallel_adapter/beta"
            factors[key] = keras.Variable(np.zeros((rows, rank), "float32"), trainable=False, name="beta")
    spec = "parallel_adapter+scale_bias+head"
    patched = apply_patches(resnet26, spec, classes=10, image_size=32, factors=factors)
    assert round(2 * model_size_ratio(resnet26, [patched] * 9)) / 2 == 1.5  # RA, Table 1, "Parallel SVD"


@pytest.mark.parametrize(
    ("build", "size", "printed"),
    [
        (lambda: backbones.cifar_resnet(depth=20), 32, 40.6e6),  # He et al. 2016: 41 million
        (lambda: backbones.cifar_resnet(depth=56), 32, 125.7e6),
        (lambda: backbones.mobilenet_v2(), 224, 300e6),  # Sandler et al. 2018: 300 million, classifier included
        (lambda: backbones.application("VGG16"), 224, 15.35e9),
        (lambda: backbones.application("ResNet50"), 224, 3.9e9),
    ],
)
@pytest.mark.slow
def test_multiply_adds_of_known_networks(build, size, printed):
    patched = apply_patches(build(), "head", classes=10, image_size=size)
    assert multiply_adds(patched.model) == pytest.approx(printed, rel=0.03)


@pytest.mark.parametrize(
    ("spec", "added"),
    [
        ("parallel_adapter", 16 * 16 * 6 * 8),
        ("parallel_adapter(rank=2)", 16 * 16 * 2 * (6 + 8)),
        ("lora(rank=2)", 16 * 16 * 2 * (6 + 8)),
        ("series_adapter(rank=2)", 16 * 16 * (2 * 2 * 8 + 8)),
        ("dan", 16 * 16 * 8 * 8),
        ("mask", 0),
        ("scale_bias(layers=norm)", 0),
    ],
)
def test_patches_add_multiply_adds_until_they_are_folded(spec, added):
    image = keras.Input((None, None, 3))
    x = keras.layers.Conv2D(6, 1, name="front")(image)
    x = keras.layers.Conv2D(8, 1, use_bias=False, name="mix")(x)
    backbone = backbones.from_model(keras.Model(image, keras.layers.BatchNormalization(name="norm")(x)), name="mixing")
    if "layers" not in spec:
        spec = spec.replace("(", "(layers=mix,") if "(" in spec else f"{spec}(layers=mix)"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", errors.PatchWarning)
        costs = task_costs(apply_patches(backbone, spec, classes=2, image_size=16))
    assert (costs.added_unfolded, costs.added_folded) == (added, 0)
    assert costs.multiply_adds == 16 * 16 * (3 * 6 + 6 * 8 + 8) + 8 * 2
