"""Learning rates as functions of progress."""

import pytest
import tensorflow as tf

from k4p1 import errors
from k4p1.engine import schedules
from k4p1.engine.optimizer_config import OptimizerConfig, k4p1_rmsprop


def factor(schedule, progress, epochs=(10.0,)):
    return float(schedule.factor(tf.constant(progress), epochs))


def test_cosine_goes_from_one_to_its_end():
    assert factor(schedules.Cosine(), 0.0) == 1.0
    assert factor(schedules.Cosine(), 0.5) == pytest.approx(0.5)
    assert factor(schedules.Cosine(end=0.1), 1.0) == pytest.approx(0.1)


def test_warmup_rises_linearly():
    schedule = schedules.Constant(warmup=0.1)
    assert factor(schedule, 0.05) == pytest.approx(0.5)
    assert factor(schedule, 0.5) == 1.0


def test_exponential_decays_every_two_and_a_half_epochs():
    schedule = schedules.Exponential()
    assert factor(schedule, 2.4 / 10) == 1.0
    assert factor(schedule, 2.6 / 10) == pytest.approx(0.98)
    assert factor(schedule, 5.1 / 10) == pytest.approx(0.98**2)


def test_tasks_of_a_run_decay_at_the_same_progress():
    """Two tasks with 10 and 40 epochs: the decay period is the mean of 2.5/10 and 2.5/40 of the run, for both."""
    assert schedules.Exponential().period((10.0, 40.0)) == pytest.approx((0.25 + 0.0625) / 2)


def test_steps_fall_at_their_epochs():
    """RA as its authors run it: 0.1 at 80 and at 100 of 120 epochs, whatever the task's own number of epochs."""
    schedule = schedules.Steps(at=[80, 100], of=120)
    factors = [factor(schedule, epoch / 120) for epoch in (0, 79.9, 80.1, 99.9, 100.1, 119.9)]
    assert factors == pytest.approx([1.0, 1.0, 0.1, 0.1, 0.01, 0.01])
    assert factor(schedules.Steps(at=(45,), of=60), 0.75) == pytest.approx(0.1)
    assert schedules.make("steps", rate=0.5, at=(0.2,)).at == (0.2,)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"at": (80, 100)}, "expected increasing numbers below 1.0"),
        ({"at": (0.5, 0.2)}, "expected increasing numbers"),
        ({"at": ()}, r"expected numbers such as .80, 100."),
        ({"at": 0.5}, r"expected numbers such as .80, 100."),
        ({"at": (0,)}, "expected a positive number"),
        ({"rate": 0}, "expected a positive number"),
    ],
)
def test_steps_that_cannot_be(settings, message):
    with pytest.raises(errors.ConfigError, match=message):
        schedules.Steps(**settings)


def test_k4p1_setting():
    """K4P1, section 5: RMSProp, rate 0.045, decay 0.98 per 2.5 epochs."""
    setting = k4p1_rmsprop()
    assert (setting.learning_rate, setting.optimizer.rho, setting.optimizer.momentum, setting.optimizer.epsilon) == (
        0.045,
        0.9,
        0.9,
        1.0,
    )
    assert (setting.schedule.rate, setting.schedule.epochs) == (0.98, 2.5)


@pytest.mark.parametrize("warmup", [-0.1, 1.0])
def test_warmup_is_a_share_of_the_run(warmup):
    with pytest.raises(errors.ConfigError, match="warmup"):
        schedules.Cosine(warmup=warmup)


def test_unknown_names_show_the_nearest():
    with pytest.raises(errors.ConfigError, match="did you mean 'cosine'"):
        OptimizerConfig(schedule="cosin")
    with pytest.raises(errors.ConfigError, match="positive"):
        OptimizerConfig(learning_rate=0.0)
