"""The head: from features to logits."""

import dataclasses
from typing import ClassVar

from k4p1 import errors
from k4p1.patches import kind


@dataclasses.dataclass(frozen=True, kw_only=True)
class Head(kind.PatchKind):
    """`logits = features @ kernel + bias`, kernel (features, classes), bias (classes,).

    Attributes:
      mode: `trained` (private), `random` (private, fixed at its random initial value: K4P1's "random last", Table 2), or
        `shared` by all tasks of a run that have the same labels (K4P1, section 5.4). A spec without `head` shares it.
    """

    name: ClassVar[str] = "head"
    summary: ClassVar[str] = "the last layer: trained, random or shared (K4P1, sections 2 and 5.4)"

    order: ClassVar[int] = 100  # what it says about the head overrides other kinds

    mode: str = "trained"

    def __post_init__(self):
        super().__post_init__()
        self._check_choice("mode", ("trained", "random", "shared"))
        if (self.layers, self.stage) != ("*", "all"):
            raise errors.PatchError(
                "head(layers=..., stage=...): the head is one layer behind the network; it has only 'mode'"
            )

    @property
    def head_mode(self):
        return self.mode

    def fits(self, site, network):
        return False

    def select(self, network):
        return []  # the head stands behind the network
