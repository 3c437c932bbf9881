"""Layers that contain batch normalisation: frozen means frozen, and their statistics are measured like others."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import k4p1
from k4p1 import errors
from k4p1.backbones.variable_keys import variable_keys
from k4p1.backbones.view import normalisations, view
from k4p1.engine import plan_groups
from k4p1.engine.groups import write_back
from k4p1.engine.population import PopulationStatistics
from k4p1.engine.pure import PureTask
from tests.networks.user_models import SIDE, Block, Stack

layers = keras.layers
IMAGES = np.random.default_rng(0).integers(0, 256, (4, SIDE, SIDE, 3)).astype("float32")


@keras.saving.register_keras_serializable("tests")
class AroundModel(layers.Layer):
    """A composite layer around a model, which is built when it is called."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.network = keras.Sequential([layers.Conv2D(4, 3), layers.BatchNormalization(momentum=0.9)])

    def call(self, x, training=None):
        return self.network(x, training=training)


@keras.saving.register_keras_serializable("tests")
class Average(layers.Layer):
    """Keeps a moving average of its own."""

    def build(self, shape):
        self.average = self.add_weight(name="moving_average", shape=(), initializer="zeros", trainable=False)

    def call(self, x, training=None):
        if training:
            self.average.assign(0.9 * self.average + 0.1 * keras.ops.mean(x))
        return x - self.average


def backbone_around(layer, channels=4):
    keras.utils.set_random_seed(0)
    image = keras.Input((SIDE, SIDE, 3))
    x = layer(layers.Conv2D(channels, 3, padding="same")(image))
    return k4p1.backbone_from_model(keras.Model(image, layers.GlobalAveragePooling2D()(x)), scaling="unit")


@pytest.mark.parametrize("make", [Block, Stack, AroundModel])
def test_frozen_normalisation_inside_a_layer_is_frozen(make):
    backbone = backbone_around(make())
    before, fingerprint = backbone.tensors(), backbone.fingerprint()
    patched = k4p1.apply_patches(backbone, "head", classes=2, image_size=SIDE)
    for layer in patched.model._flatten_layers():
        if isinstance(layer, layers.Dropout):
            layer.rate = 0.0
    trained, inferred = (np.asarray(patched.model(IMAGES, training=mode)) for mode in (True, False))
    np.testing.assert_allclose(trained, inferred, atol=1e-5)
    for key, value in backbone.tensors().items():
        np.testing.assert_array_equal(value, before[key])
    assert backbone.fingerprint() == fingerprint


def test_a_task_that_learns_shared_weights_beside_a_frozen_one():
    """Both modes at once: views of the same layer do not switch each other."""
    block = Block()
    block.build((None, SIDE, SIDE, 4))
    frozen, moving = view(block, batch_normalise=False), view(block, batch_normalise=True)
    assert [one.trainable for one in normalisations(frozen)] == [False, False]
    assert (
        [one.trainable for one in normalisations(moving)] == [one.trainable for one in normalisations(block)] == [True, True]
    )
    assert [id(v) for v in frozen.variables] == [id(v) for v in block.variables]


@pytest.mark.parametrize(("spec", "shared_trained"), [("full", False), ("head", True)])
def test_statistics_inside_a_layer_are_those_of_the_population(spec, shared_trained):
    backbone = backbone_around(AroundModel())
    patched = k4p1.apply_patches(backbone, spec, classes=2, image_size=SIDE, shared_trained=shared_trained, name="t")
    groups = plan_groups({"t": patched})
    population = PopulationStatistics([PureTask("t", patched, groups)], {"t": lambda: [{"inputs": tf.constant(IMAGES)}]})
    write_back(groups, population({group.name: group.initial() for group in groups}, 1))
    found = next(p for p in patched.parameters if p.key.endswith("moving_mean"))
    first, around = [site.layer for site in backbone.sites]
    maps = np.asarray(around.network.layers[0](first(IMAGES / 255.0)))
    np.testing.assert_allclose(found.variable, maps.mean((0, 1, 2)), atol=1e-5)


@pytest.mark.parametrize("shared_trained", [False, True])
def test_a_state_that_could_not_be_kept_is_refused(shared_trained):
    with pytest.raises(errors.PatchError, match=r"layer 'average_0' \(Average\) changes its variable 'moving_average'"):
        k4p1.apply_patches(backbone_around(Average()), "head", classes=2, image_size=SIDE, shared_trained=shared_trained)


def test_keys_do_not_depend_on_what_a_process_made_before():
    keys = []
    for _ in range(2):
        layer = Stack()
        layer(keras.Input((8, 8, 4)))
        recurrent = layers.Bidirectional(layers.LSTM(2))
        recurrent.build((None, 3, 2))
        keys.append([sorted(variable_keys(one).values()) for one in (layer, recurrent)])
    assert keys[0] == keys[1]
    assert "forward_lstm/lstm_cell/kernel" in keys[0][1]
    attention = layers.MultiHeadAttention(2, 4)
    attention.build((None, 3, 8), (None, 3, 8))
    assert "query/kernel" in variable_keys(attention).values()


def test_variables_that_are_alike_are_told_apart():
    @keras.saving.register_keras_serializable("tests")
    class Twins(layers.Layer):
        def build(self, shape):
            self.parts = [layers.Dense(2, name="part"), layers.Dense(2, name="part")]
            for part in self.parts:
                part.build(shape)

        def call(self, x):
            return self.parts[0](x) + self.parts[1](x)

    twins = Twins()
    twins.build((None, 3))
    assert len(set(variable_keys(twins).values())) == 4
