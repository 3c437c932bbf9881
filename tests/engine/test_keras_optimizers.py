"""Optimizers of Keras are translated, or refused with the nearest of ours."""

import keras
import pytest

from k4p1 import errors
from k4p1.engine import optimizers, schedules
from k4p1.engine.optimizer_config import OptimizerConfig
from k4p1.runs.settings import RunSettings


@pytest.mark.parametrize(
    ("given", "ours", "rate", "decay"),
    [
        (keras.optimizers.SGD(0.1, momentum=0.9, nesterov=True), optimizers.SGD(momentum=0.9, nesterov=True), 0.1, None),
        (keras.optimizers.RMSprop(0.02, rho=0.8, epsilon=1.0), optimizers.RMSProp(rho=0.8, epsilon=1.0), 0.02, None),
        (keras.optimizers.Adam(3e-3, beta_1=0.8), optimizers.Adam(beta_1=0.8), 3e-3, None),
        (keras.optimizers.AdamW(1e-3, weight_decay=0.05), optimizers.AdamW(), 1e-3, 0.05),
    ],
)
def test_settings_are_kept(given, ours, rate, decay):
    config = OptimizerConfig(optimizer=given)
    assert config.optimizer == ours and config.schedule == schedules.Constant()
    assert config.learning_rate == pytest.approx(rate)
    assert config.weight_decay == (None if decay is None else pytest.approx(decay))


def test_a_cosine_is_a_cosine():
    rate = keras.optimizers.schedules.CosineDecay(0.1, 1000, alpha=0.01)
    config = OptimizerConfig(optimizer=keras.optimizers.SGD(rate))
    assert (config.learning_rate, config.schedule) == (0.1, schedules.Cosine(end=0.01))


def test_what_is_given_beside_it_comes_first():
    config = OptimizerConfig(optimizer=keras.optimizers.SGD(0.1), learning_rate=0.2, schedule="exponential")
    assert (config.learning_rate, config.schedule) == (0.2, schedules.Exponential())
    config = OptimizerConfig(optimizer=keras.optimizers.SGD(0.1), learning_rate=1e-3, schedule="cosine")
    assert (config.learning_rate, config.schedule) == (1e-3, schedules.Cosine())


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: keras.optimizers.Lion(), "unknown optimizer of Keras 'Lion'"),
        (lambda: keras.optimizers.Adam(clipnorm=1.0), "keras.optimizers.Adam(clipnorm=1.0)"),
        (
            lambda: keras.optimizers.Adam(keras.optimizers.schedules.ExponentialDecay(0.1, 10, 0.9)),
            "OptimizerConfig(schedule",
        ),
    ],
)
def test_what_we_do_not_have_is_refused_at_once(make, says):
    with pytest.raises(errors.ConfigError) as caught:
        OptimizerConfig(optimizer=make())
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_settings_of_a_run_take_names_objects_and_a_rate():
    assert RunSettings(optimizer="sgd").optimizer == OptimizerConfig(optimizer="sgd")
    assert RunSettings(learning_rate=0.5).optimizer == OptimizerConfig(learning_rate=0.5)
    given = OptimizerConfig(optimizer="sgd", learning_rate=0.1)
    assert RunSettings(optimizer=given, learning_rate=0.3).optimizer == OptimizerConfig(optimizer="sgd", learning_rate=0.3)
    for settings in ({"steps": 1, "epochs": 1}, {"epochs": 0}, {"learning_rate": -1}, {"patience": 0}):
        with pytest.raises(errors.ConfigError):
            RunSettings(**settings)
