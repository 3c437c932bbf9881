"""Canonical names: equal over builds in one process, whatever number Keras gave a layer."""

import keras
import pytest
from keras import layers

from k4p1 import backbones
from k4p1.backbones import canonical


def automatic() -> keras.Model:
    """Automatic names, given names, an inner model, a sequential one and operations that are no layers."""
    inner_input = keras.Input((None, None, 4))
    inner = keras.Model(inner_input, layers.BatchNormalization()(layers.Conv2D(4, 1)(inner_input)), name="block")
    stack = keras.Sequential([layers.Conv2D(4, 1), layers.ReLU()])
    image = keras.Input((None, None, 3))
    x = layers.Conv2D(4, 3, name="stem")(image)
    y = stack(inner(layers.Conv2D(4, 1)(x)))
    x = keras.ops.relu(x + y) * 0.5
    return keras.Model(image, layers.DepthwiseConv2D(3)(layers.Conv2D(4, 1)(x)))


def names(model):
    return [name for name, _ in canonical.leaf_layers(model)]


def test_names_are_class_and_rank_with_inner_models_as_prefix():
    model = automatic()
    canonical.rename(model)
    assert names(model) == [
        "stem",
        "conv2d_0",
        "block/conv2d_0",
        "block/batch_normalization_0",
        "sequential_0/conv2d_0",
        "sequential_0/re_lu_0",
        "conv2d_1",
        "depthwise_conv2d_0",
    ]
    operations = [o.name for o in canonical.operations(model) if not isinstance(o, keras.layers.Layer)]
    assert operations == ["add_0", "relu_0", "multiply_0"]


def test_names_are_the_same_for_every_build_and_a_second_renaming():
    first, second = automatic(), automatic()
    assert names(first) != names(second)  # what Keras gives
    canonical.rename(first)
    canonical.rename(second)
    assert names(first) == names(second)
    canonical.rename(second)
    assert names(first) == names(second)


def test_a_given_name_keeps_its_place():
    """A layer that is called `conv2d_x` by its author is left alone, and no automatic layer takes a name twice."""
    image = keras.Input((None, None, 3))
    x = layers.Conv2D(2, 1, name="my_conv2d")(layers.Conv2D(2, 1)(image))
    x = layers.ReLU(name="conv2d_0")(layers.Conv2D(2, 1)(x))
    model = keras.Model(image, x)
    canonical.rename(model)
    assert names(model) == ["conv2d_1", "my_conv2d", "conv2d_2", "conv2d_0"]


def test_every_name_of_a_large_net_is_given_once(inception):
    listed = names(inception.model)
    assert len(listed) == len(set(listed)) == 311  # with the pooling layer, without the input
    assert listed[0] == "conv2d_0"
    assert "conv2d_93" in listed and "batch_normalization_93" in listed


@pytest.mark.parametrize(
    "change",
    [
        lambda x: layers.UpSampling2D(2)(x),
        lambda x: layers.UpSampling2D(3)(x),
        lambda x: layers.UpSampling2D(2, interpolation="bilinear")(x),
        lambda x: layers.Cropping2D(1)(x),
        lambda x: layers.ReLU()(x),
        lambda x: layers.ReLU(max_value=6)(x),
        lambda x: layers.Conv2D(4, 3, dilation_rate=2)(x),
        lambda x: layers.Conv2D(4, 3, padding="same")(x),
        lambda x: layers.Conv2D(4, 3, activation="relu")(x),
        lambda x: layers.Rescaling(0.5)(x),
        lambda x: layers.Rescaling(0.5, offset=1.0)(x),
        lambda x: x * 0.5,
        lambda x: x * 0.25,
        lambda x: keras.ops.relu(x),
        lambda x: layers.add([x, layers.ReLU()(x)]),
    ],
)
def test_structure_hash_tells_networks_apart(change):
    def build(alter):
        image = keras.Input((None, None, 3))
        return backbones.from_model(keras.Model(image, alter(layers.Conv2D(4, 3)(image)))).structure_hash()

    changed = build(change)
    assert changed == build(change)
    _SEEN.setdefault(changed, change)
    assert _SEEN[changed] is change
    assert changed != build(lambda x: x)


_SEEN: dict[str, object] = {}


def test_structure_hash_tells_connections_apart():
    def build(swapped):
        image = keras.Input((None, None, 3))
        a, b = layers.Conv2D(4, 1, name="a")(image), layers.Conv2D(4, 1, name="b")(image)
        c = layers.Conv2D(4, 1, name="c")(b if swapped else a)
        d = layers.Conv2D(4, 1, name="d")(a if swapped else b)
        return backbones.from_model(keras.Model(image, layers.Concatenate()([c, d]))).structure_hash()

    assert build(False) == build(False) != build(True)


def test_input_size_and_input_name_are_no_part_of_the_structure():
    def build(size, name):
        image = keras.Input((size, size, 3), name=name)
        return backbones.from_model(keras.Model(image, layers.Conv2D(4, 3)(image))).structure_hash()

    assert build(None, "image") == build(32, "pixels")


def test_structure_hash_of_a_net_with_inner_models_and_operations():
    hashes = {backbones.from_model(automatic()).structure_hash() for _ in range(2)}
    assert len(hashes) == 1
