"""The patch spec: a sum of kinds with options, as text and as an object.

    spec   := "none" | term ("+" term)*
    term   := kind | kind "(" option ("," option)* ")"
    option := name "=" value

For example `"scale_bias(statistics=frozen)+depthwise(stage=late)+head"`. What the spec does not name is shared.
"""

import dataclasses
from collections.abc import Mapping

from k4p1 import errors, spec_grammar
from k4p1.patches import kind as patch_kind

NONE = "none"


@dataclasses.dataclass(frozen=True)
class PatchSpec:
    """What a task owns. `str(spec)` gives the shortest text that parses to the same spec."""

    kinds: tuple[patch_kind.PatchKind, ...] = ()

    @classmethod
    def parse(
        cls, text: "str | PatchSpec", *, stored: bool = False, recorded: Mapping[str, Mapping[str, object]] | None = None
    ) -> "PatchSpec":
        """Reads a spec; one that is `stored` in a file may use former names of options.

        `recorded` are the options that the file lists, by kind: an option that it does not list is younger than the file.

        Raises:
          PatchError: bad syntax, unknown kind or option, a kind given twice, or kinds that exclude each other.
        """
        if isinstance(text, PatchSpec):
            return text
        if not isinstance(text, str):
            raise errors.PatchError(f"a patch spec is text such as 'scale_bias+head'; got {text!r}")
        if text.strip() == NONE:
            return cls()
        try:
            parsed = list(spec_grammar.parse(text))
        except ValueError as e:
            raise errors.PatchError(f"patch spec: {e}") from e
        return cls(
            tuple(
                patch_kind.make(name, options, stored=stored, recorded=(recorded or {}).get(name))
                for name, options in parsed
            )
        )

    def __post_init__(self):
        names = [k.name for k in self.kinds]
        for name in names:
            if names.count(name) > 1:
                raise errors.PatchError(f"patch kind '{name}' is given twice in '{self}'; join its options in one term")
        for kind in self.kinds:
            if (why := kind.conflict(self.kinds)) is not None:
                raise errors.PatchError(why)

    @property
    def head_mode(self) -> str:
        """`trained` (private), `random` (private and fixed) or `shared`, what a spec that does not name the head does."""
        modes = {kind.name: kind.head_mode for kind in sorted(self.kinds, key=lambda k: k.order) if kind.head_mode}
        return list(modes.values())[-1] if modes else "shared"

    @property
    def shares_head(self) -> bool:
        """Whether the head is left to the tasks with the same labels."""
        return self.head_mode == "shared"

    def get(self, name: str) -> patch_kind.PatchKind | None:
        """The kind `name` of this spec, or None."""
        return next((k for k in self.kinds if k.name == name), None)

    def options(self) -> dict[str, dict[str, object]]:
        """Every kind's options, defaults included, as stored in patch files."""
        return {k.name: k.options() for k in self.kinds}

    def __repr__(self) -> str:
        return f"PatchSpec({str(self)!r})"

    def __str__(self) -> str:
        return "+".join(map(str, self.kinds)) or NONE
