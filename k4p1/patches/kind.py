"""What all patch kinds have in common: options, the choice of layers, and the register of kinds."""

import abc
import dataclasses
import fnmatch
import typing
from collections.abc import Callable, Mapping, Sequence

from k4p1 import errors, spec_grammar
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

    Class attributes:
      name, summary: what specs call it, and one line of help.
      order: where it acts on a layer that several kinds patch, whatever the order of the spec; the lowest first.
      incompatible: names of kinds that cannot share a layer with it.
      reads_shared_kernel: whether it needs the shared kernel, and cannot share a layer with a kind that replaces it.
      renamed_options: former names of options, by which stored specs may call them.
      former_defaults: what an option means in a file that was written before there was such an option.
    """

    layers: str = "*"
    stage: str = "all"

    name: typing.ClassVar[str]
    summary: typing.ClassVar[str]
    order: typing.ClassVar[int] = 0
    incompatible: typing.ClassVar[frozenset[str]] = frozenset()
    reads_shared_kernel: typing.ClassVar[bool] = False
    renamed_options: typing.ClassVar[Mapping[str, str]] = {}
    former_defaults: typing.ClassVar[Mapping[str, object]] = {}

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
            raise errors.PatchError(f"{self.name}(momentum={momentum}): expected a number in [0, 1)")

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
                f"none of its {len(fitting)} fitting layers matches layers={self.layers}, stage={self.stage}; they are "
                f"called {', '.join(site.name for site in fitting[:4])}{', ...' if len(fitting) > 4 else ''}"
                if fitting
                else self.why_nothing(network)
            )
            raise errors.PatchError(f"patch '{self.name}' touches nothing in this network: {why}")
        return chosen

    @property
    def head_mode(self) -> str | None:
        """What becomes of the head where a spec has this kind: `trained`, `random`, `shared`; None: it does not say."""
        return None

    def conflict(self, kinds: Sequence["PatchKind"]) -> str | None:
        """Why this kind cannot be in a spec with all of `kinds`, itself included; None if it can."""
        return None

    def warnings(self, patched: typing.Any) -> list[str]:
        """What the user should know of a task model with this kind, built or trained (`PatchedModel`)."""
        return []

    def replaces_layer(self, layer: typing.Any) -> bool:
        """Whether this kind puts a layer of its own in place of `layer` (`whole_layer`) and shares it with no other kind."""
        return False

    def can_share(self, layer: typing.Any, other: "PatchKind") -> bool:
        """Whether both kinds can patch `layer`; asked in both directions."""
        return not self.replaces_layer(layer) and other.name not in self.incompatible

    def whole_layer(self, layer: typing.Any) -> typing.Any:
        """The layer to put in place of `layer`, where `replaces_layer` says so."""
        raise errors.PatchError(f"patch '{self.name}' has no layer in place of {type(layer).__name__} '{layer.name}'")

    def layer_patch(self, site: LayerSite) -> typing.Any:
        """The `LayerPatch` of this kind for a convolution or dense layer."""
        raise errors.PatchError(f"patch '{self.name}' cannot be part of {type(site.layer).__name__} '{site.layer.name}'")

    def rewire(self, model: typing.Any, layer_for: Callable, seed: int) -> typing.Any:
        """How this kind changes the graph of the network: a `Rewiring`; None where it leaves the graph alone.

        Args:
          model: of the backbone.
          layer_for: the layer that stands for an operation of the backbone in the task model.
          seed: of initial values.
        """
        return None

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


def order_of(name: str) -> int:
    """Where a kind acts on a layer that several kinds patch."""
    return _KINDS[name].order if name in _KINDS else 0


def make(
    name: str, options: dict[str, str], *, stored: bool = False, recorded: Mapping[str, object] | None = None
) -> PatchKind:
    """The kind `name` with options given as text; `stored` specs may use former names of options.

    `recorded` are all options that the writer of a file knew; those that came later have their former default.

    Raises:
      PatchError: unknown kind or option, or a value of the wrong type; the message has the nearest known name.
    """
    if name not in _KINDS:
        raise errors.PatchError(errors.unknown("patch kind", name, _KINDS))
    fields = {field.name: field for field in dataclasses.fields(_KINDS[name])}
    later = {} if recorded is None else _KINDS[name].former_defaults
    values = {option: value for option, value in later.items() if option not in recorded}
    for option, text in options.items():
        option = _KINDS[name].renamed_options.get(option, option) if stored else option
        if option not in fields:
            raise errors.PatchError(errors.unknown(f"option of patch kind '{name}'", option, fields))
        try:
            values[option] = spec_grammar.read(text, type(fields[option].default))
        except ValueError as e:
            raise errors.PatchError(f"{name}({option}={text}): {e}") from None
    return _KINDS[name](**values)


def _format(value: object) -> str:
    """A value as a spec takes it, where `+` separates kinds."""
    if isinstance(value, bool):
        return str(value).lower()
    return str(value).replace("e+", "e") if isinstance(value, float) else str(value)
