"""Expected complexity of a tailored network (NT, section 3.4.1).

With a path's share c of the network's cost, and its attention a, a path is excluded with probability 1 - a; all paths into
node t are with Rin(t) = prod (1 - a), all that leave it with Rout(t), the next block included. Nothing excludes the stem's
output or reads the last node but the head: Rin(0) = Rout(L) = 0 (the paper does not say).
"""

import dataclasses
from collections.abc import Mapping, Sequence

from keras import ops

from k4p1 import errors
from k4p1.patches.tailored.paths import Path

PENALTIES = ("paper", "independent", "released")
COSTS = ("multiply_adds", "parameters", "milliseconds")


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a part of a network costs.

    Attributes:
      multiply_adds: of one image, one a channel and position for batch normalisation.
      normalised: outputs of batch normalisations, of one image.
      parameters: values, moving statistics left out.
    """

    multiply_adds: int = 0
    normalised: int = 0
    parameters: int = 0

    @property
    def flops(self) -> int:
        """As the paper counts: multiply-adds, and two for each value that a batch normalisation puts out."""
        return self.multiply_adds + self.normalised

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(*(getattr(self, f.name) + getattr(other, f.name) for f in dataclasses.fields(Cost)))


def shares(costs: Mapping[Path, float], stem: float) -> dict[Path, float]:
    """Each path's cost over that of stem and all main paths (NT, equation 6; the head is left out)."""
    whole = stem + sum(cost for path, cost in costs.items() if path.is_main)
    return {path: cost / whole for path, cost in costs.items()}


def expected(attention: Mapping[Path, object], share: Mapping[Path, float], blocks: int, penalty: str = "paper"):
    """The expected complexity as a share of the whole network, a scalar.

    * `paper`: `sum c (a - Rin(source) - Rout(node))` (equations 9 and 10). It can be negative, and is least where attention
      is spread evenly.
    * `independent`: `sum c a (1 - Rin(source)) (1 - Rout(node))`, in [0, sum c].
    * `released`: as the authors' code has it: Rin of the node before for every path, and 1 in place of 0 at both ends.

    Args:
      attention: a of each live path, numbers or scalar tensors.
      share: c of these paths.
      blocks: L.
      penalty: one of these.

    Raises:
      ConfigError: another penalty.
    """
    if penalty not in PENALTIES:
        raise errors.ConfigError(errors.unknown("penalty of complexity", penalty, PENALTIES))
    end = 1.0 if penalty == "released" else 0.0
    into = {node: _excluded([a for path, a in attention.items() if path.node == node], end) for node in range(blocks + 1)}
    out = {node: _excluded([a for path, a in attention.items() if path.source == node], end) for node in range(blocks + 1)}
    total = 0.0
    for path, a in attention.items():
        source = path.node - 1 if penalty == "released" else path.source
        if penalty == "independent":
            kept = a * (1.0 - into[source]) * (1.0 - out[path.node])
        else:
            kept = a - into[source] - out[path.node]
        total = total + share[path] * kept
    return total


def _excluded(attention: Sequence[object], at_an_end: float):
    """`prod (1 - a)` over paths; of the first node's inputs and the last one's outputs, there are none."""
    product = None
    for a in attention:
        product = 1.0 - a if product is None else product * (1.0 - a)
    return at_an_end if product is None else product


def by_path(attention: Sequence[object], paths: Sequence[Sequence[Path]]) -> dict[Path, object]:
    """Attention vectors of nodes as scalars by path."""
    return {
        path: one
        for vector, into in zip(attention, paths, strict=True)
        for path, one in zip(into, ops.unstack(vector, len(into)), strict=True)
    }
