"""Where a layer stands in its network: its stage, and its place in a residual block."""

import re
from collections.abc import Sequence

import keras

from k4p1.backbones import canonical

STAGES = ("early", "mid", "late")
_STAGE_NAME = re.compile(r"stage([123])_")


def stages(names: Sequence[str]) -> list[str]:
    """The stage of every layer.

    Residual nets of three stages name their layers `stage1_...` to `stage3_...`: early, mid and late (RA, section 3.2); what
    stands before the first belongs to it, what stands behind the last to the last. In other networks these are thirds of
    the layers by depth.

    Args:
      names: canonical names in topological order.
    """
    numbered = [_STAGE_NAME.match(name) for name in names]
    if {match[1] for match in numbered if match} != {"1", "2", "3"}:
        last = max(len(names) - 1, 1)
        return [STAGES[min(3 * index // last, 2)] for index in range(len(names))]
    found, stage = [], 1
    for match in numbered:
        stage = int(match[1]) if match else stage
        found.append(STAGES[stage - 1])
    return found


def block_positions(model: keras.Model) -> dict[int, int]:
    """For convolutions on the long way through a residual block, their rank on it, from 1, by id of the layer.

    A block ends where values are added, and begins where the ways to the sum part; the way with most convolutions counts,
    so a projection on the shortcut has no rank.
    """
    positions: dict[int, int] = {}
    for operation in canonical.operations(model):
        if canonical.is_graph(operation):
            positions |= block_positions(operation)
        elif type(operation).__name__ == "Add" and operation._inbound_nodes:
            ways = [_convolutions_before(parent.operation) for parent in operation._inbound_nodes[0].parent_nodes]
            longest = max(ways, key=len, default=[])
            positions |= {id(layer): rank for rank, layer in enumerate(longest, 1)}
    return positions


def _convolutions_before(operation: keras.Operation) -> list[keras.layers.Layer]:
    """The convolutions from the last fork up to `operation`, in order."""
    found = []
    while len(operation._outbound_nodes) <= 1:
        if isinstance(operation, (keras.layers.Conv2D, keras.layers.SeparableConv2D)):
            found.append(operation)
        parents = operation._inbound_nodes[0].parent_nodes if operation._inbound_nodes else []
        if len(parents) != 1:
            break
        operation = parents[0].operation
    return found[::-1]
