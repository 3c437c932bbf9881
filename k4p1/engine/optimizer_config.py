"""How a run learns: learning rate, optimizer, schedule, and what differs between head, patch, shared weights and kinds."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import keras

from k4p1 import checks, errors, patches
from k4p1.engine import keras_optimizers, optimizers, rules, schedules
from k4p1.engine.rules import GROUPS, Rule, Rules

_DEFAULTS = {"learning_rate": 1e-3, "schedule": "cosine"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """The learning rate of a parameter is `learning_rate * schedule.factor(progress) * rate_factor`.

    Short names for common cases, and `rules` for all others; `k4p1.engine.rules` has the order in which they apply.

    Attributes:
      learning_rate: the base rate; None: 1e-3, or that of an optimizer of Keras.
      optimizer: name or object; see `optimizers.OPTIMIZERS`. One of Keras is translated, with its learning rate and
        weight decay, where these are not given here.
      schedule: name or object; see `schedules.SCHEDULES`. None: `cosine`, or that of an optimizer of Keras, whose rate
        stays constant if it is a number.
      rate_factors: multiply the learning rate of `head`, `patch` (every other private parameter), `shared`, or one patch
        kind by name (K4P1, Figures 8 and 9 vary them).
      weight_decay: for the same names. SGD and RMSProp add it to the gradient, `g + decay * w`; Adam and AdamW, as in Keras,
        shrink the weights themselves, `w <- w - rate * decay * w`. Parameters of rank 1, scales and biases, never decay. A
        number stands for all three groups. `by_size` stands for `rules.shrinkage` of the task's training images, which are
        RA's numbers for SGD with momentum.
      rules: further rules, later ones first: `{pattern: {setting: value}}` such as
        `{"mask": {"learning_rate": 1e-3}, "*/backbone/stage1_*": {"frozen": True}}`, or `Rule` objects.

    Raises:
      ConfigError: unknown names, or a number out of range.
    """

    learning_rate: float | None = None
    optimizer: optimizers.Optimizer | keras.optimizers.Optimizer | str = "adam"
    schedule: schedules.Schedule | str | None = None
    rate_factors: Mapping[str, float] = dataclasses.field(default_factory=dict)
    weight_decay: float | str | Mapping[str, float | str] | None = None
    rules: Mapping[str, Mapping[str, Any]] | Sequence[Rule] = ()

    def __post_init__(self):
        defaults = dict(_DEFAULTS)
        if isinstance(self.optimizer, keras.optimizers.Optimizer):
            translated = keras_optimizers.translated(self.optimizer)
            object.__setattr__(self, "optimizer", translated.pop("optimizer"))
            defaults |= translated
        for name, value in defaults.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        object.__setattr__(self, "optimizer", optimizers.find(self.optimizer))
        object.__setattr__(self, "schedule", schedules.find(self.schedule))
        checks.check_number("learning_rate", self.learning_rate, checks.POSITIVE)
        if not isinstance(self.rate_factors, Mapping):
            raise errors.ConfigError(f"rate_factors={self.rate_factors!r}; expected a mapping such as {{'head': 10.0}}")
        known = {*GROUPS, *patches.known_kinds()}
        for setting in ("rate_factors", "weight_decay"):
            given = getattr(self, setting)
            for name in given if isinstance(given, Mapping) else ():
                if name not in known:
                    raise errors.ConfigError(errors.unknown(f"name in {setting}", name, known))
        self.resolved()

    def resolved(
        self, task_rates: Mapping[str, float | None] | None = None, examples: Mapping[str, int] | None = None
    ) -> Rules:
        """The ordered rules of a run.

        Args:
          task_rates: learning rates of tasks that have their own, by task.
          examples: training images of each task.
        """
        base = Rule(learning_rate=self.learning_rate, optimizer=self.optimizer, weight_decay=0.0, source="OptimizerConfig")
        own = [
            Rule(task=task, learning_rate=rate, source=f"Task.learning_rate of {task}")
            for task, rate in (task_rates or {}).items()
            if rate is not None
        ]
        by_group, by_kind = self._short_names()
        return Rules([base, *own, *by_group, *rules.DEFAULTS, *by_kind, *rules.parse(self.rules)], examples)

    def _short_names(self) -> tuple[list[Rule], list[Rule]]:
        """`rate_factors` and `weight_decay` as rules: those of groups, and those of kinds."""
        decays = self.weight_decay
        if decays is None:
            decays = getattr(self.optimizer, "default_weight_decay", {})
        if not isinstance(decays, Mapping):
            decays = dict.fromkeys(GROUPS, decays)
        by_group, by_kind = [], []
        for setting, source, values in (
            ("rate_factor", "rate_factors", self.rate_factors),
            ("weight_decay", "weight_decay", decays),
        ):
            for name, value in values.items():
                rule = Rule(**rules.pattern_fields(name), **{setting: value}, source=f"{source}['{name}']")
                (by_group if name in GROUPS else by_kind).append(rule)
        return by_group, by_kind


def k4p1_rmsprop(learning_rate: float = 0.045, **settings: Any) -> OptimizerConfig:
    """K4P1's setting (section 5): RMSProp at 0.045, decayed by 0.98 every 2.5 epochs.

    The paper names rate and decay; rho 0.9, momentum 0.9 and epsilon 1.0 are those of the MobileNetV2 and Inception training
    that it follows. With epsilon 1e-7 this rate does not learn.

    Args:
      learning_rate: the base rate.
      **settings: further fields of `OptimizerConfig`; `optimizer` and `schedule` are set.
    """
    return OptimizerConfig(
        learning_rate=learning_rate,
        optimizer=optimizers.RMSProp(rho=0.9, momentum=0.9, epsilon=1.0),
        schedule=schedules.Exponential(rate=0.98, epochs=2.5),
        **settings,
    )
