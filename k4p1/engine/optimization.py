"""How a run learns: optimizer, learning rate, schedule, and what differs between head, patch and shared weights."""

import dataclasses
from collections.abc import Mapping

from k4p1 import errors
from k4p1.engine import optimizers, schedules

RATES = ("head", "patch", "shared")
BY_SIZE = "by_size"


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
        never decay. A number stands for all three. `by_size` stands for `shrinkage` of the task's training images.
      kind_optimizers: another optimizer for the parameters of a patch kind, by kind.
      kind_learning_rates: another base rate for a patch kind, by kind, whatever the rate of the run. Masks have Adam at
        1e-4 without decay unless these say otherwise (PB, section 4).

    Raises:
      ConfigError: unknown names, or a learning rate that is not positive.
    """

    learning_rate: float = 1e-3
    optimizer: optimizers.Optimizer | str = "adam"
    schedule: schedules.Schedule | str = "cosine"
    multipliers: Mapping[str, float] = dataclasses.field(default_factory=dict)
    weight_decay: float | str | Mapping[str, float | str] | None = None
    kind_optimizers: Mapping[str, optimizers.Optimizer | str] = dataclasses.field(default_factory=dict)
    kind_learning_rates: Mapping[str, float] = dataclasses.field(default_factory=dict)

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

        kinds = patches.known_kinds()
        settings = {name: getattr(self, name) for name in ("kind_optimizers", "kind_learning_rates")}
        for setting, names in {"multipliers": self.multipliers, "weight_decay": decays, **settings}.items():
            known = set(kinds) if setting in settings else {*RATES, *kinds}
            for name in names:
                if name not in known:
                    raise errors.ConfigError(errors.unknown(f"name in {setting}", name, known))
        for name, decay in decays.items():
            if isinstance(decay, str) and decay != BY_SIZE:
                raise errors.ConfigError(f"weight_decay of '{name}' is '{decay}'; wanted a number or '{BY_SIZE}'")
        own_optimizers = {name: kind.optimizer for name, kind in kinds.items() if kind.optimizer is not None}
        own_rates = {name: kind.learning_rate for name, kind in kinds.items() if kind.learning_rate is not None}
        own_decays = {name: kind.weight_decay for name, kind in kinds.items() if kind.weight_decay is not None}
        for name, rate in self.kind_learning_rates.items():
            if not rate > 0:
                raise errors.ConfigError(f"kind_learning_rates of '{name}' is {rate}: wanted a positive number")
        made = {name: _made(optimizer) for name, optimizer in {**own_optimizers, **self.kind_optimizers}.items()}
        object.__setattr__(self, "kind_optimizers", made)
        object.__setattr__(self, "kind_learning_rates", {**own_rates, **self.kind_learning_rates})
        for name, optimizer in self.kind_optimizers.items():
            own_decays.setdefault(name, getattr(optimizer, "default_weight_decay", None))
        own_decays = {name: decay for name, decay in own_decays.items() if decay is not None}
        object.__setattr__(self, "weight_decay", {**own_decays, **decays})

    def optimizer_of(self, kind: str) -> optimizers.Optimizer:
        """The optimizer of a patch kind's parameters."""
        return self.kind_optimizers.get(kind, self.optimizer)

    def rate_of(self, rate: str, kind: str) -> float:
        """The highest learning rate of a group: the base rate of its kind or of the run, times the multiplier of its kind,
        else of head, patch or shared."""
        multiplier = self.multipliers.get(kind, self.multipliers.get(rate, 1.0))
        return float(self.kind_learning_rates.get(kind, self.learning_rate) * multiplier)

    def decay_of(self, rate: str, kind: str, rank: int, examples: int | None = None) -> float:
        """The weight decay of a parameter with `rank` axes, of a task with `examples` training images."""
        decay = self.weight_decay.get(kind, self.weight_decay.get(rate, 0.0)) if rank > 1 else 0.0
        return shrinkage(examples) if decay == BY_SIZE else float(decay)


def shrinkage(examples: int | None) -> float:
    """RA's weight decay of adapters by the number of training images (section 4.1): 0.002, 0.0005 or 0.0001.

    RA gives it for data sets: the first for Aircraft, DTD and Flowers, the last for CIFAR-100, GTSRB and SVHN. The bounds
    lie between the benchmark's train splits of those, up to 3,334 and from 31,367 images on, and of the three between,
    7,585 (UCF-101) to 23,520 (pedestrians), with room for a tenth held out.

    Args:
      examples: training images; None, where nobody counted them, decays least.
    """
    if examples is None or examples >= 25_000:
        return 0.0001
    return 0.0005 if examples >= 5_000 else 0.002


def _made(optimizer: optimizers.Optimizer | str) -> optimizers.Optimizer:
    return optimizers.make(optimizer) if isinstance(optimizer, str) else optimizer


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
