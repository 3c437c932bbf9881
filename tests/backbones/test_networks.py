"""Residual nets and VGG-16-BN: sizes, weights, and every patch kind on every network."""

import json
import pathlib

import keras
import numpy as np
import pytest
import tensorflow as tf

from k4p1 import backbones, errors
from k4p1.backbones import residual, vgg
from k4p1.data import augment
from k4p1.patches.apply import apply_patches
from k4p1.patches.costs import multiply_adds
from k4p1.patches.kinds.mask import Mask
from k4p1.patches.patched_model import PRIVATE


def parameters(backbone):
    return sum(int(np.prod(v.shape)) for key, v in backbone.variables().items() if "moving_" not in key)


@pytest.mark.parametrize(
    ("build", "millions"),
    [
        (lambda: backbones.cifar_resnet(depth=20), 0.27),  # He et al. 2016, Table 6
        (lambda: backbones.cifar_resnet(depth=56), 0.85),
        (lambda: backbones.wide_resnet(), 5.87),  # PB, section 6, and NetTailor's table: 5.9 and 6.0 with heads
        (lambda: backbones.resnet26(), 5.6),
        (lambda: backbones.vgg16_bn(), 14.72),
    ],
)
def test_numbers_of_parameters(build, millions):
    assert parameters(build()) / 1e6 == pytest.approx(millions, rel=0.04)


def test_stages_halve_the_resolution():
    for build, sides in (
        (lambda: backbones.resnet26(width=0.05), (32, 16, 8)),
        (lambda: backbones.resnet26(width=0.05, form="text"), (64, 32, 16)),
        (lambda: backbones.wide_resnet(depth=10, width=0.2), (32, 16, 8)),
        (lambda: backbones.cifar_resnet(depth=8), (64, 32, 16)),
    ):
        patched = apply_patches(build(), "head", classes=2, image_size=64)
        network = next(layer for layer in patched.model.layers if hasattr(layer, "layers"))
        found = {layer.name[:6]: layer.output.shape[1] for layer in network.layers if layer.name.startswith("stage")}
        assert tuple(found.values()) == sides


@pytest.mark.parametrize(
    ("form", "side", "giga"),
    [("code", 64, 0.855), ("code", 72, 1.08), ("text", 64, 3.41)],
)
def test_multiply_adds_of_resnet26(form, side, giga):
    patched = apply_patches(backbones.resnet26(form=form), "head", classes=2, image_size=side)
    assert multiply_adds(patched.model) / 1e9 == pytest.approx(giga, rel=0.01)


def test_resnet26_ends_with_normalisation_and_has_maps_of_36_18_and_9_at_72_pixels():
    backbone = backbones.resnet26(width=0.05)
    patched = apply_patches(backbone, "head", classes=2, image_size=72)
    network = next(layer for layer in patched.model.layers if hasattr(layer, "layers"))
    found = {layer.name[:6]: layer.output.shape[1] for layer in network.layers if layer.name.startswith("stage")}
    assert tuple(found.values()) == (36, 18, 9)
    assert [layer.name for layer in backbone.model.layers[-3:]] == ["last_bn", "last_relu", "features"]
    assert not any(layer.name in ("stem_relu",) for layer in backbone.model.layers)


def test_a_file_from_before_the_two_forms_is_what_it_was(tmp_path):
    """Written by version 0.1, whose configuration names no form."""
    golden = pathlib.Path(__file__).parents[1] / "golden" / "networks"
    known = json.loads((golden / "resnet26.json").read_text(encoding="utf-8"))
    backbone = backbones.load(golden / "resnet26.safetensors")
    assert backbone.config["form"] == "text"
    images = np.array(known["images"], "float32") / 128.0 - 1.0
    np.testing.assert_allclose(backbone.model(images), known["features"], rtol=1e-4, atol=1e-4)
    backbones.save(backbone, tmp_path / "again.safetensors")
    assert backbones.load(tmp_path / "again.safetensors").fingerprint() == backbone.fingerprint()
    with pytest.raises(errors.ArtifactError, match="holds resnet26 with form='text', and form='code' is asked for"):
        backbones.resnet26(str(golden / "resnet26.safetensors"), width=0.05)


def test_a_window_shows_what_a_random_crop_does_and_the_centre_where_nothing_is_shifted():
    image = tf.constant(np.random.default_rng(0).integers(0, 256, (18, 18, 3)), tf.uint8)
    window = residual.CentralWindow(14)
    whole = image.numpy()
    crops = {whole[y : y + 14, x : x + 14].tobytes() for y in range(5) for x in range(5)}
    shifted = [augment.shift(image, tf.constant([3, i], tf.int64), pixels=2) for i in range(200)]
    assert {np.array(window(one[None]))[0].tobytes() for one in shifted} == crops
    np.testing.assert_array_equal(window(image[None])[0], whole[2:16, 2:16])
    np.testing.assert_array_equal(window(image[None, :13, :15])[0], whole[:13, :14])  # a shorter side stays whole


def test_a_network_with_a_window_has_the_weights_of_one_without(tmp_path):
    keras.utils.set_random_seed(2)
    plain = backbones.resnet26(width=0.05)
    backbones.save(plain, tmp_path / "plain.safetensors")
    windowed = backbones.resnet26(str(tmp_path / "plain.safetensors"), width=0.05, crop=16)
    images = np.random.default_rng(0).normal(size=(2, 24, 24, 3)).astype("float32")
    np.testing.assert_allclose(windowed.model(images), plain.model(images[:, 4:20, 4:20]), atol=1e-5)
    assert apply_patches(windowed, "head", classes=2, image_size=24).model.output_shape == (None, 2)
    assert backbones.wide_resnet(depth=10, width=0.2, crop=16).model.get_layer("window").side == 16


def test_width_and_dropout():
    assert parameters(backbones.resnet26(width=0.5)) < 0.3 * parameters(backbones.resnet26())
    layers = [type(layer).__name__ for layer in backbones.resnet26(width=0.1, dropout=0.3).model.layers]
    assert layers.count("Dropout") == 12
    assert "Dropout" not in {type(layer).__name__ for layer in backbones.wide_resnet(depth=10, width=1).model.layers}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: backbones.cifar_resnet(depth=21), "depth=21.*6 n [+] 2"),
        (lambda: backbones.wide_resnet(depth=27), "depth=27.*6 n [+] 4"),
        (lambda: backbones.resnet26(width=0), "width must be positive"),
        (lambda: backbones.cifar_resnet("/no/such/file.npz"), "no weight file"),
        (lambda: backbones.wide_resnet("imagenet"), "no ImageNet weights"),
        (lambda: backbones.resnet26(form="cod"), "unknown form of resnet26 'cod'; did you mean 'code'"),
        (lambda: backbones.resnet26(width=0.05, crop=-1), "crop=-1.: expected a number of pixels"),
        (lambda: backbones.vgg16_bn(dropout=0.5), "it acts behind fc6 and fc7"),
    ],
)
def test_mistakes_are_told_in_one_line(call, message):
    with pytest.raises((errors.ConfigError, errors.ArtifactError), match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_arrays_that_do_not_fit(tmp_path):
    np.savez(tmp_path / "other.npz", **{"conv1.weight": np.zeros((3, 3, 3, 16), np.float32)})
    with pytest.raises(errors.ArtifactError, match="missing"):
        backbones.cifar_resnet(str(tmp_path / "other.npz"), depth=8)
    np.savez(tmp_path / "strange.npz", **{"attention.weight": np.zeros(3)})
    with pytest.raises(errors.ArtifactError, match=r"array 'attention.weight' is none of a CIFAR residual net"):
        backbones.cifar_resnet(str(tmp_path / "strange.npz"), depth=8)
    (tmp_path / "damaged.npz").write_bytes(b"PK no")
    with pytest.raises(errors.ArtifactError, match="do not fit cifar_resnet"):
        backbones.cifar_resnet(str(tmp_path / "damaged.npz"), depth=8)


@pytest.mark.slow
def test_pretrained_cifar_net_classifies(real_data):
    """92% on CIFAR-10 as it was published; about 82% on lossy copies of its images."""
    tfds = pytest.importorskip("tensorflow_datasets")
    path = real_data.parent / "weights" / "resnet20_cifar10.npz"
    if not path.is_file():
        pytest.skip("the CIFAR weights are not beside the project")
    backbone = backbones.cifar_resnet(str(path), depth=20)
    patched = apply_patches(backbone, "head", classes=10, image_size=32)
    with np.load(path) as arrays:
        patched.head.kernel.assign(arrays["linear.weight"])
        patched.head.bias.assign(arrays["linear.bias"])
    data = tfds.builder_from_directory(str(real_data / "cifar10_30k" / "1.0.0")).as_dataset(split="test[:500]").batch(500)
    batch = next(iter(data))
    accuracy = np.mean(np.argmax(patched.model(batch["image"]), axis=-1) == batch["label"].numpy())
    assert accuracy > 0.75


def test_batch_normalisation_inserted_into_vgg16_starts_as_the_identity(tmp_path):
    plain = keras.applications.VGG16(input_shape=(None, None, 3), include_top=False, pooling="avg", weights=None)
    plain.save_weights(tmp_path / "vgg.weights.h5")
    backbone = backbones.vgg16_bn(str(tmp_path / "vgg.weights.h5"))
    images = np.random.default_rng(0).normal(0.0, 50.0, (2, 32, 32, 3)).astype("float32")
    expected = np.array(plain(images))
    np.testing.assert_allclose(backbone.model(images), expected, atol=1e-4 * np.abs(expected).max())
    assert sum(isinstance(layer, keras.layers.BatchNormalization) for layer in backbone.model.layers) == 13


def test_a_dense_layer_on_maps_is_a_convolution():
    random = np.random.default_rng(0)
    maps, kernel = random.normal(size=(2, 3, 3, 4)).astype("float32"), random.normal(size=(36, 5)).astype("float32")
    dense = maps.reshape(2, -1) @ kernel
    convolved = keras.ops.conv(maps, vgg.as_convolution(kernel, 3), padding="valid")
    np.testing.assert_allclose(np.array(convolved)[:, 0, 0], dense, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_sizes_of_vgg16_and_five_masks():
    """PB, Tables 2 to 4, in millions of bytes, without the last layer: 537; with five tasks 621, with one 554."""
    backbone = backbones.vgg16_bn(fully_connected=True)
    network = 4 * sum(int(np.prod(v.shape)) for v in backbone.variables().values())
    masked = Mask().select(backbone.sites)  # no scores are made: each weight costs a bit
    mask = sum(int(np.prod(site.layer.kernel.shape)) for site in masked) / 8
    assert len(masked) == 15
    assert [round((network + tasks * mask) / 1e6) for tasks in (0, 1, 5)] == [537, 554, 621]
    assert backbone.features == 4096 and backbone.minimum_size == 224


NETWORKS = {
    "resnet26": lambda: backbones.resnet26(width=0.1),
    "cifar_resnet": lambda: backbones.cifar_resnet(depth=14),
    "wide_resnet": lambda: backbones.wide_resnet(depth=10, width=0.5),
    "vgg16_bn": backbones.vgg16_bn,
    "VGG16": lambda: backbones.application("VGG16"),
    "ResNet50": lambda: backbones.application("ResNet50"),
    "DenseNet121": lambda: backbones.application("DenseNet121"),
    "MobileNetV2": lambda: backbones.mobilenet_v2(width=0.35),
}
REFUSED = {("depthwise", name) for name in NETWORKS if name != "MobileNetV2"} | {
    ("parallel_adapter(block=second)", name) for name in ("VGG16", "vgg16_bn", "DenseNet121")
}


_LARGE = ("ResNet50", "DenseNet121", "vgg16_bn", "VGG16", "wide_resnet", "resnet34")


@pytest.fixture(scope="module", params=[pytest.param(n, marks=[pytest.mark.slow] * (n in _LARGE)) for n in NETWORKS])
def network(request):
    return request.param, NETWORKS[request.param]()


@pytest.mark.filterwarnings("ignore::k4p1.errors.PatchWarning")
@pytest.mark.parametrize(
    "spec",
    [
        "scale_bias+head",
        "depthwise",
        "series_adapter",
        "parallel_adapter",
        "parallel_adapter(block=second)",
        "mask",
        "lora(rank=1)",
        "dan",
        "packnet",
    ],
)
def test_every_kind_works_on_every_network_or_says_why_not(network, spec):
    name, backbone = network
    if (spec, name) in REFUSED:
        with pytest.raises(errors.PatchError, match="touches nothing in this network: it has no"):
            apply_patches(backbone, spec, classes=2, image_size=32)
        return
    patched = apply_patches(backbone, spec, classes=2, image_size=32)
    assert patched.count(PRIVATE, "trained") > 0
    assert patched.model.output_shape == (None, 2)


@pytest.mark.parametrize("name", ["resnet26", "cifar_resnet", "wide_resnet"])
def test_a_file_gives_the_same_network(name, tmp_path):
    backbone = NETWORKS[name]()
    backbones.save(backbone, tmp_path / "backbone.safetensors")
    loaded = backbones.load(tmp_path / "backbone.safetensors")
    assert loaded.fingerprint() == backbone.fingerprint() and loaded.name == name
    again = getattr(backbones, name)(
        str(tmp_path / "backbone.safetensors"), **{k: v for k, v in backbone.config.items() if k != "network"}
    )
    assert again.fingerprint() == backbone.fingerprint()
