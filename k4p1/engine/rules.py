"""Update rules: one ordered list says how every parameter of a run is updated.

A rule is a pattern over (owner, kind, layer) with settings. For every parameter, and for every setting apart, the last rule
that matches and names the setting wins. The list of a run is

1. what the run says in general (`OptimizerConfig`: learning rate, optimizer, weight decay);
2. a task's own learning rate;
3. rate factors and weight decays by group (`head`, `patch`, `shared`);
4. what a patch kind needs (`DEFAULTS`), such as Adam at 1e-4 for masks;
5. rate factors and weight decays by kind;
6. the rules of the user, in their order.

Parameters of rank 1, scales and biases, never decay.
"""

import dataclasses
import fnmatch
from collections.abc import Mapping, Sequence
from typing import Any

from k4p1 import checks, errors, patches
from k4p1.engine import optimizers
from k4p1.engine.optimizers import Optimizer
from k4p1.patches.patched_model import FACTORS, SHARED, Parameter, PatchedModel

HEAD, PATCH = "head", "patch"
GROUPS = (HEAD, PATCH, SHARED)
BY_SIZE = "by_size"
SETTINGS = ("learning_rate", "rate_factor", "optimizer", "weight_decay", "frozen")
_BACKBONE = "backbone"
_NUMBERS = {
    "learning_rate": checks.POSITIVE,
    "rate_factor": checks.AT_LEAST_ZERO,
    "weight_decay": dataclasses.replace(checks.AT_LEAST_ZERO, words=f"a number of at least 0, or '{BY_SIZE}'"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rule:
    """Settings for the parameters that match a pattern; None leaves a setting to the rules before.

    Attributes:
      owner: glob over `shared` and the names of tasks.
      kind: glob over patch kinds, `head` and `backbone`; `patch` stands for every patch kind but the head.
      layer: glob over canonical layer names.
      task: glob over the tasks whose steps update the parameter; differs from the owner for shared parameters alone.
      learning_rate: base rate, whatever that of the run is.
      rate_factor: multiplies the base rate.
      optimizer: name or object.
      weight_decay: see `OptimizerConfig`; or `by_size`.
      frozen: whether the parameter keeps its value. False lifts an earlier rule; what a method freezes stays frozen.
      source: where the rule comes from, for tables and messages.

    Raises:
      ConfigError: an unknown kind or optimizer, or a number out of range.
    """

    owner: str = "*"
    kind: str = "*"
    layer: str = "*"
    task: str = "*"
    learning_rate: float | None = None
    rate_factor: float | None = None
    optimizer: Optimizer | str | None = None
    weight_decay: float | str | None = None
    frozen: bool | None = None
    source: str = "rule"

    def __post_init__(self):
        known = [PATCH, _BACKBONE, FACTORS, *patches.known_kinds()]
        if not _is_glob(self.kind) and self.kind not in known:
            raise errors.ConfigError(errors.unknown(f"kind in rule '{self.source}'", self.kind, known))
        if self.optimizer is not None:
            object.__setattr__(self, "optimizer", optimizers.find(self.optimizer))
        if self.frozen is not None:
            checks.check_flag(f"rule '{self.source}': frozen", self.frozen)
        if self.weight_decay is None and self.optimizer is not None:
            decay = getattr(self.optimizer, "default_weight_decay", None)
            object.__setattr__(self, "weight_decay", decay)
        for setting, allowed in _NUMBERS.items():
            value = getattr(self, setting)
            if value is not None and not (setting == "weight_decay" and value == BY_SIZE):
                checks.check_number(f"rule '{self.source}': {setting}", value, allowed)

    def matches(self, owner: str, kind: str, layer: str, task: str | None) -> bool:
        """Whether a parameter fits the pattern; `task` None stands for any."""
        is_kind = kind not in (HEAD, _BACKBONE, FACTORS) if self.kind == PATCH else fnmatch.fnmatchcase(kind, self.kind)
        return (
            is_kind
            and fnmatch.fnmatchcase(owner, self.owner)
            and fnmatch.fnmatchcase(layer, self.layer)
            and (task is None or fnmatch.fnmatchcase(task, self.task))
        )


@dataclasses.dataclass(frozen=True)
class Update:
    """How a parameter is updated in the steps of one task.

    Attributes:
      rate: base learning rate times factor; the schedule multiplies it.
      optimizer, weight_decay, frozen: see `Rule`.
      sources: the rule that won, by setting.
    """

    rate: float
    optimizer: Optimizer
    weight_decay: float
    frozen: bool
    sources: Mapping[str, str] = dataclasses.field(default_factory=dict, compare=False)


class Rules:
    """The ordered list of rules of a run.

    Args:
      rules: in order; the last one that matches wins, setting by setting.
      examples: training images of each task, for a weight decay `by_size`.
    """

    def __init__(self, rules: Sequence[Rule], examples: Mapping[str, int] | None = None):
        self.rules = tuple(rules)
        self._examples = dict(examples or {})

    def update_of(self, parameter: Parameter, task: str) -> Update:
        """How a parameter is updated in the steps of `task`, whose own it is unless it is shared."""
        values: dict[str, Any] = {"rate_factor": 1.0, "weight_decay": 0.0, "frozen": False}
        sources: dict[str, str] = {}
        owner, layer = parameter.owner_in(task), layer_of(parameter)
        for rule in self.rules:
            if rule.matches(owner, parameter.kind, layer, task):
                for setting in SETTINGS:
                    if getattr(rule, setting) is not None:
                        values[setting], sources[setting] = getattr(rule, setting), rule.source
        decay = values["weight_decay"]
        if len(parameter.variable.shape) <= 1:
            if decay:
                sources["weight_decay"] = "rank 1"
            decay = 0.0
        elif decay == BY_SIZE:
            decay = shrinkage(self._examples.get(task))
        rate = float(values["learning_rate"] * values["rate_factor"])
        return Update(rate, values["optimizer"], float(decay), bool(values["frozen"]), sources)

    def unmatched(self, models: Mapping[str, PatchedModel]) -> list[Rule]:
        """The user's rules that match no parameter of the task models."""
        places = {(p.owner_in(task), p.kind, layer_of(p)) for task, patched in models.items() for p in patched.parameters}
        return [
            rule
            for rule in self.rules
            if rule.source.startswith(USER) and not any(rule.matches(*place, None) for place in places)
        ]


USER = "rules"


def parse(rules: "Mapping[str, Mapping[str, Any]] | Sequence[Rule]") -> list[Rule]:
    """The user's rules, from objects or from patterns as text with their settings.

    A pattern is `KIND`, `OWNER/KIND` or `OWNER/KIND/LAYER`, each a glob: `mask`, `shared`, `digits/head`,
    `*/backbone/stage1_*`. The word `shared` alone stands for the shared weights.

    Raises:
      ConfigError: no such setting or kind; the nearest name is shown.
    """
    if not isinstance(rules, Mapping):
        for rule in rules or ():
            if not isinstance(rule, Rule):
                raise errors.ConfigError(
                    f"rules hold {rule!r}; expected Rule objects, or {{'pattern': {{'setting': value}}}}"
                )
        return [dataclasses.replace(rule, source=f"{USER}[{number}]") for number, rule in enumerate(rules or ())]
    made = []
    for pattern, settings in rules.items():
        if not isinstance(settings, Mapping):
            raise errors.ConfigError(f"rule '{pattern}' is {settings!r}; expected settings such as {{'rate_factor': 0.1}}")
        for name in settings:
            if name not in SETTINGS:
                raise errors.ConfigError(errors.unknown(f"setting in rule '{pattern}'", name, SETTINGS))
        made.append(Rule(**pattern_fields(pattern), **settings, source=f"{USER}['{pattern}']"))
    return made


def pattern_fields(pattern: str) -> dict[str, str]:
    """The fields `owner`, `kind` and `layer` of a pattern as text."""
    parts = str(pattern).split("/", 2)
    if len(parts) == 1:
        parts = ["*", _BACKBONE if pattern == SHARED else pattern]
    return dict(zip(("owner", "kind", "layer"), parts, strict=False))


def layer_of(parameter: Parameter) -> str:
    """The canonical name of the layer that a parameter belongs to: its key is `layer/variable`, or `layer/kind/variable`."""
    parts = parameter.key.split("/")
    if parameter.owner != SHARED:
        for place in range(len(parts) - 2, 0, -1):
            if parts[place] == parameter.kind:
                return "/".join(parts[:place])
    return "/".join(parts[:-1])


def shrinkage(examples: int | None) -> float:
    """RA's weight decay of adapters by the number of training images (section 4.1): 0.002, 0.0005 or 0.0001.

    RA gives it for data sets: the first for Aircraft, DTD and Flowers, the last for CIFAR-100, GTSRB and SVHN. The bounds
    lie between the benchmark's train splits of those, up to 3,334 and from 31,367 images on, and of the three between,
    7,585 (UCF-101) to 23,520 (pedestrians), with room for a tenth held out.

    Args:
      examples: training images; None, where they were not counted, decays least.
    """
    if examples is None or examples >= 25_000:
        return 0.0001
    return 0.0005 if examples >= 5_000 else 0.002


def _is_glob(text: str) -> bool:
    return any(character in text for character in "*?[")


DEFAULTS: list[Rule] = [
    Rule(kind="mask", optimizer="adam", learning_rate=1e-4, weight_decay=0.0, source="mask (PB, section 4)"),
]
"""What patch kinds need where they learn otherwise than the rest of a run; append a `Rule` for a kind of your own."""
