"""Optimizers and learning rates of Keras in terms of ours."""

from typing import Any

import keras

from k4p1 import errors
from k4p1.engine import optimizers, schedules

_OURS: dict[str, tuple[str, tuple[str, ...]]] = {
    "SGD": ("sgd", ("momentum", "nesterov")),
    "RMSprop": ("rmsprop", ("rho", "momentum", "epsilon")),
    "Adam": ("adam", ("beta_1", "beta_2", "epsilon")),
    "AdamW": ("adamw", ("beta_1", "beta_2", "epsilon")),
}
"""Optimizers of Keras: ours, and the settings that both have by the same name."""
_REFUSED = ("clipnorm", "clipvalue", "global_clipnorm", "use_ema", "gradient_accumulation_steps", "centered", "amsgrad")


def translated(optimizer: keras.optimizers.Optimizer) -> dict[str, Any]:
    """Fields of `OptimizerConfig` that mean the same as an optimizer of Keras; a rate that is a number stays constant.

    Its weight decay is that of our optimizer: of SGD and RMSProp, it is then added to the gradient.

    Raises:
      ConfigError: one that we do not have, or a setting of it; the nearest of ours is shown.
    """
    kind = type(optimizer).__name__
    if kind not in _OURS:
        raise errors.ConfigError(errors.unknown("optimizer of Keras", kind, _OURS))
    config = optimizer.get_config()
    for setting in _REFUSED:
        if config.get(setting):
            raise errors.ConfigError(
                f"keras.optimizers.{kind}({setting}={config[setting]!r}): fused updates of flat vectors do not have it; "
                "leave it out"
            )
    name, settings = _OURS[kind]
    ours = optimizers.OPTIMIZERS[name](**{setting: config[setting] for setting in settings})
    decay = {"weight_decay": config["weight_decay"]} if config.get("weight_decay") else {}
    return {"optimizer": ours, **_rate(optimizer), **decay}


def _rate(optimizer: keras.optimizers.Optimizer) -> dict[str, Any]:
    given = optimizer._learning_rate
    if not isinstance(given, keras.optimizers.schedules.LearningRateSchedule):
        rate = float(keras.ops.convert_to_numpy(optimizer.learning_rate))
        return {"learning_rate": rate, "schedule": schedules.Constant()}
    if type(given) is keras.optimizers.schedules.CosineDecay and not given.warmup_steps:
        return {
            "learning_rate": float(given.initial_learning_rate),
            "schedule": schedules.Cosine(end=float(given.alpha)),
        }
    raise errors.ConfigError(
        f"learning_rate={type(given).__name__}: schedules of k4p1 are functions of a run's progress; give "
        "OptimizerConfig(schedule=...) with one of: " + ", ".join(schedules.SCHEDULES)
    )
