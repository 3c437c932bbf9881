"""What all patch kinds have in common: options, the choice of layers, and the register of kinds."""

import abc
import dataclasses
import fnmatch
import math
import typing
from collections.abc import Sequence

from k4p1 import errors
from k4p1.backbones import placement
from k4p1.backbones.site import LayerSite

STAGES = ("all", *placement.STAGES)

_KINDS: dict[str, type["PatchKind"]] = {}


@dataclasses.dataclass(frozen=True, kw_only=True)
class PatchKind(abc.ABC):
    """A kind of private parameters with its options; a patch spec is a sum of kinds.

    A kind says which layers of a network it patches (`select`). Layers that share one site are patched together: see
    `k4p1.patches.apply`.

    Attributes:
      layers: restrict the patch to canonical layer names that match this glob; `|` separates alternatives.
      stage: restrict it to the `early`, `mid` or `late` part of the network (`all`: no restriction): its three stages where
        it has three, as residual nets do (RA, section 3.2), else thirds by depth.

    Class attributes: `name` and `summary`, and where a kind learns otherwise than the rest of a run, `optimizer`,
    `learning_rate` and `weight_decay`.
    """

    layers: str = "*"
    stage: str = "all"

    name: typing.ClassVar[str]
    summary: typing.ClassVar[str]
    optimizer: typing.ClassVar[str | None] = None
    learning_rate: typing.ClassVar[float | None] = None
    weight_decay: typing.ClassVar[float | None] = None

    def __post_init__(self):
        self._check_choice("stage", STAGES)

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if getattr(cls, "name", None):
            _KINDS[cls.name] = cls

    def _check_choice(self, option: str, allowed: Sequence[str]) -> None:
        value = getattr(self, option)
        if value not in allowed:
            raise errors.PatchError(
                f"{self.name}({option}={value}): {errors.nearest(value, allowed)}Allowed: {', '.join(allowed)}"
            )

    def _check_momentum(self, momentum: float) -> None:
        if not 0 <= momentum < 1:
            raise errors.PatchError(f"{self.name}(momentum={momentum}): wanted a number in [0, 1)")

    @abc.abstractmethod
    def fits(self, site: LayerSite, network: Sequence[LayerSite]) -> bool:
        """Whether this kind patches the layer, restrictions by name and depth aside."""

    def select(self, network: Sequence[LayerSite]) -> list[LayerSite]:
        """The sites of `network` that this kind patches.

        Raises:
          PatchError: none; a patch that touches nothing is a mistake, and the message says why nothing was found.
        """
        fitting = [site for site in network if self.fits(site, network)]
        chosen = [site for site in fitting if self._matches(site)]
        if not chosen:
            why = (
                f"none of its {len(fitting)} fitting layers matches layers={self.layers}, stage={self.stage}"
                if fitting
                else self.why_nothing(network)
            )
            raise errors.PatchError(f"patch '{self.name}' touches nothing in this network: {why}")
        return chosen

    def whole_layer(self, layer: typing.Any) -> typing.Any:
        """A layer to put in place of `layer`, or None for a kind that joins others in one patched convolution."""
        return None

    def layer_patch(self, site: LayerSite) -> typing.Any:
        """The `LayerPatch` of this kind for a convolution or dense layer."""
        raise errors.PatchError(f"patch '{self.name}' cannot be part of {type(site.layer).__name__} '{site.layer.name}'")

    def why_nothing(self, network: Sequence[LayerSite]) -> str:
        """Why no layer fits, for the error message."""
        classes = sorted({type(site.layer).__name__ for site in network})
        return f"it fits none of its layer types ({', '.join(classes)})"

    def _matches(self, site: LayerSite) -> bool:
        named = any(fnmatch.fnmatchcase(site.name, pattern) for pattern in self.layers.split("|"))
        return named and self.stage in ("all", site.stage)

    def options(self) -> dict[str, object]:
        """All options by name, defaults included."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def __str__(self) -> str:
        changed = [
            f"{field.name}={_format(getattr(self, field.name))}"
            for field in dataclasses.fields(self)
            if getattr(self, field.name) != field.default
        ]
        return self.name + (f"({','.join(changed)})" if changed else "")


def known_kinds() -> dict[str, type[PatchKind]]:
    """The registered kinds by name."""
    return dict(_KINDS)


def make(name: str, options: dict[str, str]) -> PatchKind:
    """The kind `name` with options given as text.

    Raises:
      PatchError: unknown kind or option, or a value of the wrong type; the message has the nearest known name.
    """
    if name not in _KINDS:
        raise errors.PatchError(errors.unknown("patch kind", name, _KINDS))
    fields = {field.name: field for field in dataclasses.fields(_KINDS[name])}
    values = {}
    for option, text in options.items():
        if option not in fields:
            raise errors.PatchError(errors.unknown(f"option of patch kind '{name}'", option, fields))
        values[option] = _parse(name, option, text, type(fields[option].default))
    return _KINDS[name](**values)


def _parse(kind: str, option: str, text: str, wanted: type) -> object:
    if wanted is bool:
        if text.lower() in ("true", "false"):
            return text.lower() == "true"
    elif wanted in (int, float):
        try:
            value = wanted(text)
        except ValueError:
            value = math.nan
        if math.isfinite(value):
            return value
    else:
        return text
    raise errors.PatchError(f"{kind}({option}={text}): wanted {_TYPE_NAMES[wanted]}")


_TYPE_NAMES = {bool: "true or false", int: "a whole number", float: "a number"}


def _format(value: object) -> str:
    """A value as a spec takes it, where `+` separates kinds."""
    if isinstance(value, bool):
        return str(value).lower()
    return str(value).replace("e+", "e") if isinstance(value, float) else str(value)
