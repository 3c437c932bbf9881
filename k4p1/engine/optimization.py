"""How a run learns: optimizer, learning rate, schedule, and what differs between head, patch and shared weights."""

import dataclasses
from collections.abc import Mapping

from k4p1 import errors
from k4p1.engine import optimizers, schedules

RATES = ("head", "patch", "shared")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optimization:
    """The learning rate of a vector is `learning_rate * schedule.factor(progress) * multiplier`.

    Attributes:
      learning_rate: the base rate.
      optimizer: name or object; see `optimizers.OPTIMIZERS`.
      schedule: name or object; see `schedules.SCHEDULES`.
      multipliers: of the learning rate, for `head`, `patch` (every other private parameter), `shared`, or one patch kind
        by name (K4P1, Figures 8 and 9 vary them).
      weight_decay: decoupled (`w <- w - rate * decay * w`), for the same names; parameters of rank 1, scales and biases,
        never decay. A number stands for all three.
      kind_optimizers: another optimizer for the parameters of a patch kind, by kind.

    Raises:
      ConfigError: unknown names, or a learning rate that is not positive.
    """

    learning_rate: float = 1e-3
    optimizer: optimizers.Optimizer | str = "adam"
    schedule: schedules.Schedule | str = "cosine"
    multipliers: Mapping[str, float] = dataclasses.field(default_factory=dict)
    weight_decay: float | Mapping[str, float] | None = None
    kind_optimizers: Mapping[str, optimizers.Optimizer] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        if isinstance(self.optimizer, str):
            object.__setattr__(self, "optimizer", optimizers.make(self.optimizer))
        if isinstance(self.schedule, str):
            object.__setattr__(self, "schedule", schedules.make(self.schedule))
        if not self.learning_rate > 0:
            raise errors.ConfigError(f"learning_rate={self.learning_rate}: wanted a positive number")
        decays = self.weight_decay
        if decays is None:
            decays = getattr(self.optimizer, "default_weight_decay", 0.0)
        if not isinstance(decays, Mapping):
            decays = dict.fromkeys(RATES, decays)
        object.__setattr__(self, "weight_decay", dict(decays))
        from k4p1 import patches

        known = {*RATES, *patches.known_kinds()}
        for setting, names in (("multipliers", self.multipliers), ("weight_decay", decays)):
            for name in names:
                if name not in known:
                    raise errors.ConfigError(errors.unknown(f"name in {setting}", name, known))

    def optimizer_of(self, kind: str) -> optimizers.Optimizer:
        """The optimizer of a patch kind's parameters."""
        return self.kind_optimizers.get(kind, self.optimizer)

    def multiplier_of(self, rate: str, kind: str) -> float:
        """The learning rate multiplier of a group: that of its kind, else of head, patch or shared."""
        return float(self.multipliers.get(kind, self.multipliers.get(rate, 1.0)))

    def decay_of(self, rate: str, kind: str, rank: int) -> float:
        """The weight decay of a parameter with `rank` axes."""
        return float(self.weight_decay.get(kind, self.weight_decay.get(rate, 0.0))) if rank > 1 else 0.0


def k4p1_rmsprop(learning_rate: float = 0.045, **settings) -> Optimization:
    """K4P1's setting (section 5): RMSProp at 0.045, decayed by 0.98 every 2.5 epochs.

    The paper names rate and decay; rho 0.9, momentum 0.9 and epsilon 1.0 are those of the MobileNetV2 and Inception training
    that it follows. With epsilon 1e-7 this rate does not learn.
    """
    return Optimization(
        learning_rate=learning_rate,
        optimizer=optimizers.RMSProp(rho=0.9, momentum=0.9, epsilon=1.0),
        schedule=schedules.Exponential(rate=0.98, epochs=2.5),
        **settings,
    )
