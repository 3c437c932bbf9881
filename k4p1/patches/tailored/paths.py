"""The paths of a tailored network, and which of them are live (NT, sections 3.3 and 3.5).

Nodes are x_0 to x_L. Into node i lead the main path, block i of the backbone, from node i - 1, and proxies from the nodes
i - k to i - 1. As text, a node with its paths is `3.m.1.2`: the main path and proxies from nodes 1 and 2; nodes are joined
by `|`.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from k4p1 import errors

MAIN = "m"
DENSE = "dense"


class Path(NamedTuple):
    """A way into a node.

    Attributes:
      node: that it leads to, from 1.
      source: the node that it starts from.
      is_main: whether it is the backbone's block, or a proxy.
    """

    node: int
    source: int
    is_main: bool

    def __str__(self) -> str:
        return f"{'block' if self.is_main else 'proxy'} {self.source}->{self.node}"


def full(blocks: int, k: str) -> tuple[Path, ...]:
    """All paths of a network of so many blocks with skips of up to k: of each node the main one first, then proxies."""
    reach = blocks if k == DENSE else int(k)
    return tuple(
        path
        for node in range(1, blocks + 1)
        for path in (
            Path(node, node - 1, True),
            *(Path(node, source, False) for source in range(max(0, node - reach), node)),
        )
    )


def live(paths: Iterable[Path], blocks: int) -> tuple[Path, ...]:
    """The paths that lie on a way from the first node to the last one.

    reach[0]; reach[i] if a kept path into i starts at a reached node. need[L]; the source of a kept path into a needed node
    is needed. Live paths are kept, start reached and end needed.

    Raises:
      PatchError: no way is left; names the first node that nothing reaches.
    """
    kept = sorted(paths, key=lambda path: (path.node, not path.is_main, path.source))
    reached = {0}
    for path in kept:
        if path.source in reached:
            reached.add(path.node)
    if blocks not in reached:
        cut = next(node for node in range(1, blocks + 1) if not any(n in reached for n in range(node, blocks + 1)))
        raise errors.PatchError(
            f"no way is left from the stem to the head: nothing leads to node {cut} or behind it; keep more blocks, or "
            "lower the threshold of proxies"
        )
    needed = {blocks}
    for path in reversed(kept):
        if path.node in needed:
            needed.add(path.source)
    return tuple(path for path in kept if path.source in reached and path.node in needed)


def to_text(paths: Iterable[Path]) -> str:
    """Paths as the option `live` of a spec holds them."""
    by_node: dict[int, list[str]] = {}
    for path in paths:
        by_node.setdefault(path.node, []).append(MAIN if path.is_main else str(path.source))
    return "|".join(".".join([str(node), *ways]) for node, ways in by_node.items())


def from_text(text: str) -> tuple[Path, ...]:
    """The inverse of `to_text`.

    Raises:
      PatchError: text of another form.
    """
    paths = []
    for part in text.split("|"):
        node, *ways = part.split(".")
        known = [way for way in ways if way == MAIN or way.isdigit()]
        if not node.isdigit() or int(node) < 1 or not ways or known != ways:
            raise errors.PatchError(f"nettailor(live={text}): cannot read '{part}'; write NODE.m.SOURCE, such as 3.m.1|4.3")
        for way in ways:
            path = Path(int(node), int(node) - 1 if way == MAIN else int(way), way == MAIN)
            if path.source >= path.node or path in paths:
                raise errors.PatchError(f"nettailor(live={text}): '{part}' has a path twice, or from a later node")
            paths.append(path)
    return tuple(paths)


def prune(attention: Mapping[Path, float], blocks: int, removed: Sequence[int], threshold: float) -> tuple[Path, ...]:
    """The live paths without some main paths and without proxies of little attention (NT, section 3.5).

    Args:
      attention: of each path.
      blocks: L.
      removed: nodes whose main path goes.
      threshold: proxies of at most so much attention go.

    Raises:
      PatchError: no way is left.
    """
    kept = [p for p, a in attention.items() if (p.node not in removed if p.is_main else a > threshold)]
    return live(kept, blocks)


def least_attended(attention: Mapping[Path, float], count: int) -> tuple[int, ...]:
    """The nodes of the `count` main paths with the least attention."""
    ranked = sorted((a, path.node) for path, a in attention.items() if path.is_main)
    return tuple(sorted(node for _, node in ranked[:count]))
