"""Where the scale-and-bias patch acts, and what of it is private."""

import keras
import numpy as np
import pytest
from keras import layers

from k4p1 import backbones, errors
from k4p1.backbones import followers
from k4p1.patches import PatchSpec, ScaleBias, patch_file
from k4p1.patches.apply import apply_patches
from k4p1.patches.costs import multiply_adds, task_costs
from k4p1.patches.fold import fold
from k4p1.patches.patched_normalization import PatchedNormalization
from k4p1.serving.saved_model import export_task


def owned(backbone, spec, **settings):
    """Keys of the private parameters, head aside."""
    patched = apply_patches(backbone, spec, classes=2, image_size=8, **settings)
    return {key for key in patched.private() if not key.startswith("head/")}


def of_layers(keys):
    return {key.split("/scale_bias")[0] for key in keys}


def backbone_of(build, side=None):
    image = keras.Input((side, side, 3))
    return backbones.from_model(keras.Model(image, build(image)))


def mixed_network(image):
    """Convolutions with and without a normalisation behind them, one of them in an inner model."""
    x = layers.Conv2D(4, 3, name="normalised")(image)
    x = layers.BatchNormalization(name="bn")(x)
    x = layers.Conv2D(4, 1, activation="relu", name="with_relu")(x)
    x = layers.BatchNormalization(name="bn_behind_relu")(x)
    added = layers.Conv2D(4, 1, name="added")(x)
    x = layers.BatchNormalization(name="bn_of_sum")(layers.Add()([x, added]))
    x = keras.Sequential([layers.Conv2D(4, 1, name="last")], name="inner")(x)
    x = layers.GroupNormalization(2, name="gn")(x)
    x = layers.LayerNormalization(scale=False, center=False, name="without")(layers.Dense(4, name="linear")(x))
    return layers.GlobalAveragePooling2D()(x)


def test_every_layer_has_a_scale_and_a_bias_once():
    backbone = backbone_of(mixed_network)
    normalisations = {"bn", "bn_behind_relu", "bn_of_sum", "gn"}
    assert of_layers(owned(backbone, "scale_bias")) == normalisations
    assert of_layers(owned(backbone, "scale_bias(where=every)")) == normalisations | {"with_relu", "added", "linear"}


def test_efficientnet_b0_has_32_convolutions_that_no_normalisation_follows():
    """Those of its squeeze-and-excitation blocks, of 81."""
    model = keras.applications.EfficientNetB0(weights=None, include_top=False, pooling="avg", input_shape=(None, None, 3))
    normalised = followers.normalised(model)
    convolutions = [x for x in model.layers if isinstance(x, (layers.Conv2D, layers.DepthwiseConv2D))]
    assert len(convolutions) == 81
    assert sum(id(x) not in normalised for x in convolutions) == 32


def test_every_layer_of_a_network_that_is_trained_folds(images):
    patched = apply_patches(backbone_of(mixed_network), "scale_bias(where=every)+head", classes=3, image_size=16)
    random = np.random.default_rng(0)
    for variable in patched.private().values():
        variable.assign(random.uniform(0.5, 1.5, variable.shape))
    np.testing.assert_allclose(fold(patched.model)(images), patched.model(images), atol=1e-5)


@pytest.mark.parametrize(
    ("affine", "names"), [("both", {"gamma", "beta"}), ("scale", {"gamma"}), ("bias", {"beta"}), ("frozen", set())]
)
def test_affine_says_which_of_scale_and_bias_are_private(affine, names):
    keys = owned(backbone_of(mixed_network), f"scale_bias(affine={affine})")
    assert {key.rpartition("/")[2] for key in keys} == names | {"moving_mean", "moving_variance"}
    assert ("gn" in of_layers(keys)) == bool(names)


def test_biases_alone_of_a_dense_network():
    """K4P1, Figures 4 to 7: 2-8-16-16-8-m-2, with ReLU up to the embedding; here of the channels of one pixel."""

    def dense_network(image):
        x = layers.Flatten()(image)
        for number, units in enumerate((8, 16, 16, 8)):
            x = layers.Dense(units, activation="relu", name=f"dense{number}")(x)
        return layers.Dense(2, name="embedding")(x)

    backbone = backbone_of(dense_network, side=8)
    assert owned(backbone, "scale_bias(affine=bias)+head") == {
        f"{name}/scale_bias/beta" for name in ("dense0", "dense1", "dense2", "dense3", "embedding")
    }
    counts = {a: len(owned(backbone, f"scale_bias(affine={a})+head")) for a in ("scale", "both")}
    assert counts == {"scale": 5, "both": 10}


def test_private_is_another_word_for_both():
    assert PatchSpec.parse("scale_bias(affine=private)") == PatchSpec.parse("scale_bias")
    assert str(ScaleBias(affine="private", where="every")) == "scale_bias(where=every)"
    with pytest.raises(errors.PatchError, match=r"affine=scales\): did you mean 'scale'"):
        ScaleBias(affine="scales")
    with pytest.raises(errors.PatchError, match=r"where=all\): Allowed: normalised, every"):
        ScaleBias(where="all")


def test_rms_normalisation_has_a_scale_alone():
    backbone = backbone_of(lambda image: layers.GlobalAveragePooling2D()(layers.RMSNormalization(name="rms")(image)))
    assert owned(backbone, "scale_bias") == {"rms/scale_bias/gamma"}
    with pytest.raises(errors.PatchError, match="its normalisations have no bias"):
        owned(backbone, "scale_bias(affine=bias)")


def grouped_network(image):
    x = layers.Conv2D(4, 3, name="convolution")(image)
    x = layers.GroupNormalization(2, name="norm")(x)
    return layers.Dense(4, name="dense")(layers.GlobalAveragePooling2D()(x))


def test_a_file_that_names_no_layers_means_those_of_its_time():
    """Before there was `where`, a network without batch normalisation had scales on its convolutions alone."""
    backbone = backbone_of(grouped_network)
    options = {"scale_bias": {"statistics": "private", "affine": "private"}, "head": {}}
    before = PatchSpec.parse("scale_bias+head", stored=True, recorded=options)
    assert owned(backbone, before) == {"convolution/scale_bias/gamma", "convolution/scale_bias/beta"}
    now = PatchSpec.parse("scale_bias+head", stored=True, recorded=PatchSpec.parse("scale_bias+head").options())
    assert owned(backbone, now) == {"norm/scale_bias/gamma", "norm/scale_bias/beta"}
    info = patch_file.PatchInfo(
        "t", before, ("a", "b"), (8, 8), 0.0, "none", "b", "f" * 64, "a" * 64, shared_head="", k4p1_version="0"
    )
    assert patch_file.PatchInfo.from_metadata(info.as_metadata()).spec == before


def keras_normalisation(name, axis, **options):
    made = {
        "layer": lambda: layers.LayerNormalization(axis=axis, **options),
        "group": lambda: layers.GroupNormalization(groups=2, axis=axis, **options),
        "rms": lambda: layers.RMSNormalization(axis=axis),
    }
    return made[name]()


@pytest.mark.parametrize("precision", ["float32", "mixed_float16"])
@pytest.mark.parametrize(
    ("name", "axis"),
    [("layer", -1), ("layer", 1), ("layer", [1, 2, 3]), ("group", -1), ("group", 1), ("rms", -1)],
)
def test_outputs_are_those_of_keras(name, axis, precision):
    keras.config.set_dtype_policy(precision)
    shape = (3, 4, 6, 8)
    random = np.random.default_rng(0)
    x = random.normal(1.0, 2.0, shape).astype("float32")
    shared, other = keras_normalisation(name, axis), keras_normalisation(name, axis)
    for layer in (shared, other):
        layer.build(shape)
        for variable in layer.variables:
            variable.assign(random.uniform(0.5, 1.5, variable.shape))
    patched = PatchedNormalization(shared)
    np.testing.assert_array_equal(patched(x), shared(x))
    for private, value in zip(patched.private_variables(), other.variables, strict=True):
        private.variable.assign(value)
    assert patched(x).dtype == other(x).dtype
    np.testing.assert_array_equal(patched(x), other(x))
    np.testing.assert_array_equal(patched.folded()(x), other(x))


@pytest.mark.parametrize("axis", [-1, 1])
def test_a_layer_without_scale_and_bias_gains_them(axis):
    shape = (2, 4, 6, 8)
    x = np.random.default_rng(0).normal(size=shape).astype("float32")
    shared = layers.GroupNormalization(groups=2, axis=axis, scale=False)
    shared.build(shape)
    patched = PatchedNormalization(shared)
    np.testing.assert_array_equal(patched(x), shared(x))
    patched.gamma.assign(2.0 * np.ones(patched.gamma.shape))
    np.testing.assert_allclose(patched(x), 2.0 * np.array(shared(x)), rtol=1e-6)
    np.testing.assert_array_equal(patched.folded()(x), patched(x))
    alone = PatchedNormalization(shared, affine="bias")
    alone(x)
    assert [private.name for private in alone.private_variables()] == ["beta"] and alone.gamma is None


@pytest.fixture(scope="module")
def transformer():
    """A small vision transformer of keras.layers: patches of 4 pixels, two blocks, features of the mean token."""
    keras.utils.set_random_seed(0)
    image = keras.Input((16, 16, 3))
    x = layers.Reshape((16, 12))(layers.Conv2D(12, 4, strides=4, name="patches")(image))
    for block in ("first", "second"):
        normed = layers.LayerNormalization(epsilon=1e-6, name=f"{block}_norm1")(x)
        attended = layers.MultiHeadAttention(2, 6, name=f"{block}_attention")(normed, normed)
        x = layers.Add(name=f"{block}_sum1")([x, attended])
        hidden = layers.LayerNormalization(epsilon=1e-6, name=f"{block}_norm2")(x)
        hidden = layers.Dense(24, activation="gelu", name=f"{block}_mlp1")(hidden)
        x = layers.Add(name=f"{block}_sum2")([x, layers.Dense(12, name=f"{block}_mlp2")(hidden)])
    x = layers.GlobalAveragePooling1D(name="mean")(layers.LayerNormalization(name="last_norm")(x))
    return backbones.from_model(keras.Model(image, x, name="transformer"), scaling="symmetric")


@pytest.mark.parametrize(
    ("spec", "trained"),
    [
        ("scale_bias+head", 5 * 24 + 39),
        ("scale_bias(where=every)+head", 5 * 24 + 24 + 2 * (48 + 24) + 39),
        ("lora(rank=2)+scale_bias(affine=bias)+head", 5 * 12 + (2 * 48 + 24) + 4 * 2 * 36 + 39),
    ],
)
@pytest.mark.slow
def test_a_vision_transformer_is_patched_saved_folded_and_exported(transformer, tmp_path, images, spec, trained):
    patched = apply_patches(transformer, spec, classes=3, image_size=16)
    assert patched.count("private", "trained") == trained and patched.count("private", "statistics") == 0
    random = np.random.default_rng(0)
    for variable in patched.private().values():
        variable.assign(random.normal(1.0, 0.1, variable.shape))
    expected = np.array(patched.model(images))
    np.testing.assert_allclose(fold(patched.model)(images), expected, rtol=1e-4, atol=1e-4)
    patch_file.save_patch(tmp_path / "patch.safetensors", patched, transformer, task="t", labels=("a", "b", "c"))
    loaded = patch_file.load_patch(tmp_path / "patch.safetensors", transformer)
    np.testing.assert_array_equal(loaded.model(images), expected)
    cost = task_costs(patched)
    assert cost.added_folded == 0
    _, difference = export_task(patched.model, (16, 16), ("a", "b", "c"), tmp_path / "served")
    assert difference < 1e-3


def test_costs_count_every_value_that_a_normalisation_scales():
    """Whatever the axis of its channels."""
    first = layers.GroupNormalization(2, axis=1, name="first")
    image = keras.Input((16, 16, 3))
    x = first(layers.Permute((3, 1, 2))(layers.Conv2D(4, 1, name="convolution")(image)))
    model = keras.Model(image, layers.GlobalAveragePooling2D(data_format="channels_first")(x))
    assert multiply_adds(model) == 16 * 16 * 3 * 4 + 16 * 16 * 4
