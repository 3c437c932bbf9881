"""Building backbones: by name, from weights, from a user's own model, from a file."""

import keras
import numpy as np
import pytest
from keras import layers

from k4p1 import backbones, errors
from k4p1.backbones import build, input_scaling
from k4p1.patches.apply import apply_patches
from k4p1.patches.fold import fold
from k4p1.patches.patch_file import load_patch, save_patch
from k4p1.patches.patched_model import PRIVATE


@pytest.fixture(scope="module")
def narrow():
    """MobileNetV2 of width 0.35, random weights."""
    return backbones.mobilenet_v2(width=0.35)


# By name


@pytest.mark.parametrize(
    ("call", "parts"),
    [
        (lambda: backbones.application("MobileNetv2"), ["unknown backbone 'MobileNetv2'", "did you mean 'MobileNetV2'?"]),
        (lambda: backbones.application("inceptionv3"), ["did you mean 'InceptionV3'?"]),
        (lambda: backbones.application("Perceptron9000"), ["unknown backbone 'Perceptron9000'", "Known: ", "VGG16"]),
        (lambda: backbones.application("VGG16", width=0.5), ["unknown argument of VGG16 'width'"]),
        (lambda: backbones.application("MobileNetV2", dropot=0.1), ["unknown argument of MobileNetV2 'dropot'"]),
        (lambda: backbones.mobilenet_v2(width=0), ["MobileNetV2(width=0): the width must be positive"]),
        (lambda: backbones.mobilenet_v2(weights="imagenet", width=0.77), ["Keras cannot build MobileNetV2"]),
        (lambda: backbones.from_model(small(), scaling="symetric"), ["'symetric'", "did you mean 'symmetric'?"]),
        (lambda: input_scaling.InputScaling("cafe"), ["unknown input scaling 'cafe'", "did you mean 'caffe'?"]),
    ],
)
def test_mistakes_are_told_in_one_line(call, parts):
    with pytest.raises(errors.ConfigError) as caught:
        call()
    assert "\n" not in str(caught.value)
    for part in parts:
        assert part in str(caught.value)


def test_every_network_of_keras_applications_has_a_scaling():
    known = build.applications()
    assert {"MobileNetV2", "InceptionV3", "DenseNet121", "ResNet50V2", "VGG16", "EfficientNetB0"} <= set(known)
    found = {name: next(value for prefix, value in build._FAMILIES if name.startswith(prefix)) for name in known}
    assert set(found.values()) <= set(input_scaling.SCALINGS)
    assert (found["ResNet50"], found["ResNet50V2"], found["MobileNetV3Small"]) == ("caffe", "symmetric", "none")


@pytest.mark.parametrize("network", ["mobilenet_v2", "inception_v3", "densenet", "vgg16", "resnet"])
def test_scalings_are_those_of_keras(network):
    images = np.random.default_rng(0).integers(0, 256, (2, 5, 5, 3)).astype("float32")
    ours = {"mobilenet_v2": "symmetric", "inception_v3": "symmetric", "densenet": "imagenet"}.get(network, "caffe")
    expected = getattr(keras.applications, network).preprocess_input(images.copy())
    np.testing.assert_allclose(input_scaling.InputScaling(ours)(images), expected, atol=1e-4)


def test_scaling_of_integers_and_of_networks_that_scale_by_themselves():
    images = np.random.default_rng(0).integers(0, 256, (2, 5, 5, 3)).astype("uint8")
    np.testing.assert_array_equal(input_scaling.InputScaling("none")(images), images.astype("float32"))
    np.testing.assert_allclose(input_scaling.InputScaling("unit")(images), images / 255.0, atol=1e-6)


# Weight files


def test_weights_that_are_not_there(tmp_path):
    with pytest.raises(errors.ArtifactError, match=r"no weight file .*missing\.h5; give None, 'imagenet' or the path"):
        backbones.mobilenet_v2(weights=str(tmp_path / "missing.h5"))


@pytest.mark.filterwarnings("ignore:Skipping nested container")
def test_weights_of_another_width(weights_file):
    with pytest.raises(errors.ArtifactError, match=r"do not fit MobileNetV2 of width 0.5") as caught:
        backbones.mobilenet_v2(weights=str(weights_file), width=0.5)
    assert "\n" not in str(caught.value)


def test_a_file_that_holds_no_weights(tmp_path):
    path = tmp_path / "broken.weights.h5"
    path.write_bytes(b"not a weight file")
    with pytest.raises(errors.ArtifactError, match=r"the weights of .* do not fit MobileNetV2 of width 0.35"):
        backbones.mobilenet_v2(weights=str(path), width=0.35)


def test_pretrained_weights(weights_file):
    backbone = backbones.mobilenet_v2(weights=str(weights_file), width=0.35)
    tensors = backbone.tensors()
    assert backbone.features == 1280
    assert not np.allclose(tensors["Conv1/kernel"], backbones.mobilenet_v2(width=0.35).tensors()["Conv1/kernel"])
    assert np.abs(tensors["bn_Conv1/moving_mean"]).max() > 0


# Builds in one process


@pytest.mark.slow
def test_a_patch_of_the_first_inception_v3_loads_into_the_second(inception, tmp_path):
    assert [layer.name for layer in inception.model.layers][1:3] == ["conv2d_0", "batch_normalization_0"]
    patched = apply_patches(inception, "scale_bias+head", classes=3, image_size=75, seed=1)
    random = np.random.default_rng(0)
    for parameter in patched.parameters:
        if parameter.owner == PRIVATE:
            parameter.variable.assign(random.uniform(0.5, 1.0, parameter.variable.shape))
    save_patch(tmp_path / "patch", patched, inception, task="t", labels=["a", "b", "c"])

    second = backbones.inception_v3()
    assert second.structure_hash() == inception.structure_hash()
    assert second.fingerprint() != inception.fingerprint()  # other random weights
    second.assign(inception.tensors())
    assert second.fingerprint() == inception.fingerprint()
    loaded = load_patch(tmp_path / "patch", second)
    images = random.uniform(0, 255, (2, 75, 75, 3)).astype("float32")
    np.testing.assert_allclose(loaded.model(images), patched.model(images), atol=1e-4, rtol=1e-4)


def test_structures_differ_between_widths_and_scalings(mobilenet, narrow):
    assert mobilenet.structure_hash() != narrow.structure_hash()
    hashes = {backbones.from_model(small(), scaling=name).structure_hash() for name in input_scaling.SCALINGS}
    assert len(hashes) == len(input_scaling.SCALINGS)


def test_fingerprint_follows_every_value(small_backbone):
    before = small_backbone.fingerprint()
    assert small_backbone.fingerprint() == before
    for variable in small_backbone.variables().values():
        value = np.array(variable)
        changed = value.copy()
        changed.flat[-1] = np.nextafter(changed.flat[-1], np.float32(9))
        variable.assign(changed)
        assert small_backbone.fingerprint() != before
        variable.assign(value)
    assert small_backbone.fingerprint() == before


def test_tasks_on_a_backbone_do_not_change_its_fingerprint(small_backbone):
    before = small_backbone.structure_hash(), small_backbone.fingerprint()
    tasks = [apply_patches(small_backbone, spec, classes=2, image_size=16) for spec in ("full", "scale_bias+depthwise+head")]
    assert (small_backbone.structure_hash(), small_backbone.fingerprint()) == before
    assert tasks


@pytest.mark.parametrize("size", [48, 72, 80, 112])
def test_one_build_serves_every_image_size_with_the_same_padding(narrow, size):
    """keras.applications pads in another way when it is built for 48, 72, 80 or 112 pixels; a clone does not."""
    patched = apply_patches(narrow, "none", classes=2, image_size=size)
    images = np.random.default_rng(0).uniform(0, 255, (1, size, size, 3)).astype("float32")
    features = np.array(narrow.model(images / 127.5 - 1.0))
    np.testing.assert_allclose(patched.model(images), features @ patched.head.kernel, atol=1e-4)


# A user's own model


def small() -> keras.Model:
    image = keras.Input((None, None, 3))
    return keras.Model(image, layers.Conv2D(4, 3)(image))


def test_feature_maps_are_averaged(images):
    model = small()
    backbone = backbones.from_model(model, name="mine")
    assert (backbone.name, backbone.features, backbone.scaling) == ("mine", 4, "none")
    np.testing.assert_allclose(backbone.model(images), np.mean(model(images), axis=(1, 2)), atol=1e-4)


def test_what_is_no_backbone():
    class Subclassed(keras.Model):
        def call(self, inputs):
            return inputs

    two = [keras.Input((8, 8, 3)), keras.Input((8, 8, 3))]
    needed = "must be a functional keras.Model from one tensor of images to one tensor of features"
    with pytest.raises(errors.ConfigError, match=f"{needed}; got a Subclassed"):
        backbones.from_model(Subclassed(), name="mine")
    with pytest.raises(errors.ConfigError, match=needed):
        backbones.from_model(keras.Model(two, layers.Flatten()(layers.add(two))))
    with pytest.raises(errors.ConfigError, match="must output features"):
        image = keras.Input((8, 8, 3))
        backbones.from_model(keras.Model(image, layers.Reshape((8, 24))(image)))


def test_vgg16_has_no_batch_normalisation_and_gets_scales_before_its_activations():
    """All 13 convolutions carry their ReLU; the patch acts before it, and folds into the convolution."""
    backbone = backbones.application("VGG16")
    assert backbone.scaling == "caffe"
    patched = apply_patches(backbone, "scale_bias+head", classes=2, image_size=32)
    layers_patched = {key.split("/")[0] for key in patched.private()} - {"head"}
    assert layers_patched == {site.name for site in backbone.sites}
    assert len(layers_patched) == 13
    random = np.random.default_rng(0)
    for variable in patched.private().values():
        variable.assign(random.uniform(0.5, 1.5, variable.shape))
    images = random.uniform(0, 255, (2, 32, 32, 3)).astype("float32")
    folded = fold(patched.model)
    expected = np.array(patched.model(images))
    np.testing.assert_allclose(folded(images), expected, atol=1e-5 * np.abs(expected).max())
    assert all(layer.activation is keras.activations.relu for layer in _convolutions(folded))


def _convolutions(model):
    return [layer for layer in model._flatten_layers() if isinstance(layer, layers.Conv2D)]


# Files


def test_a_backbone_file_gives_the_same_network(small_backbone, images, tmp_path):
    path = tmp_path / "backbone.safetensors"
    fingerprint = backbones.save(small_backbone, path)
    loaded = backbones.load(path)
    assert loaded.fingerprint() == fingerprint == small_backbone.fingerprint()
    assert (loaded.name, loaded.scaling) == ("small", "symmetric")
    np.testing.assert_array_equal(loaded.model(images), small_backbone.model(images))


def test_a_network_of_keras_is_built_again_from_its_file(narrow, tmp_path):
    path = tmp_path / "backbone.safetensors"
    backbones.save(narrow, path)
    loaded = backbones.load(path)
    assert loaded.fingerprint() == narrow.fingerprint()
    assert (loaded.config, loaded.minimum_size) == (narrow.config, narrow.minimum_size)
    again = backbones.mobilenet_v2(weights=str(path), width=0.35)
    assert again.fingerprint() == narrow.fingerprint()


def test_a_backbone_file_of_another_width_does_not_fit(narrow, tmp_path):
    path = tmp_path / "backbone.safetensors"
    backbones.save(narrow, path)
    with pytest.raises(errors.ArtifactError, match="does not fit backbone 'MobileNetV2': its shape is"):
        backbones.mobilenet_v2(weights=str(path), width=0.5)


def test_a_normalisation_layer_survives_the_file(images, tmp_path):
    """EfficientNet's first layer keeps its statistics beside its variables."""
    image = keras.Input((None, None, 3))
    normalise = layers.Normalization()
    normalise.adapt(images)
    backbone = backbones.from_model(keras.Model(image, layers.Conv2D(4, 3)(normalise(image))))
    backbones.save(backbone, tmp_path / "backbone.safetensors")
    loaded = backbones.load(tmp_path / "backbone.safetensors")
    np.testing.assert_allclose(loaded.model(images), backbone.model(images), atol=1e-6)


def test_a_backbone_with_inner_models_and_operations_survives_the_file(images, tmp_path):
    image = keras.Input((None, None, 3))
    stack = keras.Sequential([layers.Conv2D(4, 3, padding="same"), layers.BatchNormalization()])
    x = layers.Conv2D(4, 1)(image)
    backbone = backbones.from_model(keras.Model(image, keras.ops.relu(x + stack(x) * 0.5)))
    fingerprint = backbones.save(backbone, tmp_path / "backbone.safetensors")
    loaded = backbones.load(tmp_path / "backbone.safetensors")
    assert loaded.fingerprint() == fingerprint
    np.testing.assert_allclose(loaded.model(images), backbone.model(images), atol=1e-5)


def test_a_layer_that_is_unknown_here_is_told_by_the_file(tmp_path):
    @keras.saving.register_keras_serializable("elsewhere")
    class Squared(layers.Layer):
        def call(self, inputs):
            return inputs**2

    image = keras.Input((None, None, 3))
    backbone = backbones.from_model(keras.Model(image, layers.Conv2D(4, 3)(Squared()(image))), name="mine")
    backbones.save(backbone, tmp_path / "backbone.safetensors")
    keras.saving.get_custom_objects().pop("elsewhere>Squared")
    with pytest.raises(errors.ArtifactError, match="cannot rebuild backbone 'mine'") as caught:
        backbones.load(tmp_path / "backbone.safetensors")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("stem/kernel"), "1 missing \\(first: stem/kernel\\)"),
        (lambda t: t.update({"tail/kernel": np.zeros(3)}), "1 unknown \\(first: tail/kernel\\)"),
        (
            lambda t: t.update({"mix/kernel": np.zeros((1, 1, 6, 9))}),
            "'mix/kernel' does not fit .*\\(1, 1, 6, 9\\), expected",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_refused_and_nothing_is_written(small_backbone, change, message):
    before = small_backbone.fingerprint()
    tensors = {key: value + 1 for key, value in small_backbone.tensors().items()}
    change(tensors)
    with pytest.raises(errors.ArtifactError, match=message):
        small_backbone.assign(tensors)
    assert small_backbone.fingerprint() == before


@pytest.mark.slow
def test_inception_of_another_width():
    """Half the filters of every convolution; found again from its file description."""
    half = build.inception_v3(width=0.5)
    assert half.features == 1024
    patched = apply_patches(half, "scale_bias+head", classes=3, image_size=80)
    assert patched.count("private", "statistics") == 17216
    assert build.from_config(half.name, half.config, half.scaling).structure_hash() == half.structure_hash()
    with pytest.raises(errors.ConfigError, match="width 1 only"):
        build.inception_v3(weights="imagenet", width=0.5)


def test_a_network_without_its_own_scaling_is_refused():
    with pytest.raises(errors.ConfigError, match=r"MobileNetV3Small\(include_preprocessing=False\).*leave it out"):
        backbones.application("MobileNetV3Small", include_preprocessing=False)


@pytest.mark.slow
@pytest.mark.parametrize("side", [32, 33])
def test_nasnet_is_the_one_that_keras_builds_for_that_size(side):
    keras.utils.set_random_seed(0)
    theirs = keras.applications.NASNetMobile(input_shape=(side, side, 3), include_top=False, pooling="avg", weights=None)
    backbone = backbones.application("NASNetMobile")
    backbone.model.set_weights(theirs.get_weights())
    images = np.random.default_rng(0).uniform(-1, 1, (2, side, side, 3)).astype("float32")
    np.testing.assert_array_equal(backbone.model(images, training=False), theirs(images, training=False))


@keras.saving.register_keras_serializable(package="tests")
class Unnamed(keras.layers.Layer):
    """A layer that leaves the names of its variables to Keras."""

    def build(self, input_shape):
        self.scale = self.add_weight(shape=(3,), initializer="ones")
        self._shifts = [self.add_weight(shape=(3,)) for _ in range(2)]

    def call(self, inputs):
        return self.scale * inputs + sum(self._shifts)


def test_keys_of_unnamed_variables_do_not_depend_on_what_was_built_before():
    found = []
    for _ in range(2):
        image = keras.Input((8, 8, 3))
        backbone = backbones.from_model(keras.Model(image, Unnamed(name="unnamed")(image)))
        found.append(sorted(backbone.variables()))
    assert found[0] == found[1] == ["unnamed_0/0/variable", "unnamed_0/1/variable", "unnamed_0/scale"]


@pytest.mark.parametrize("dtype", ["float16", "float64", "int32"])
def test_values_of_another_type_are_not_cast_silently(dtype, small_backbone):
    before = small_backbone.fingerprint()
    tensors = {key: value.astype(dtype) for key, value in small_backbone.tensors().items()}
    with pytest.raises(errors.ArtifactError, match=dtype):
        small_backbone.assign(tensors)
    assert small_backbone.fingerprint() == before


def test_offline_weights_of_imagenet_are_not_downloaded(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("K4P1_OFFLINE", "1")
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    with pytest.raises(errors.ArtifactError, match=r"offline, and mobilenet_v2_.*_0\.35_.*h5 is not in the folder models/"):
        backbones.mobilenet_v2(weights="imagenet", width=0.35)
