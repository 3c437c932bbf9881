"""Blocks of a network: the stretches between tensors through which everything passes.

With nodes x_0, ..., x_L, block i computes x_i = activation(G_i(x_{i-1})): x_0 is what the stem puts out, x_L the last
feature map (NT, section 3.1). G_i ends at a sum, or at a linear normalisation; what follows it at once, such as a ReLU, is
the activation. Blocks are read from the structure of residual networks (He et al. 2016), with their activation behind the
sum or at the beginning of the next block, and of inverted residuals (MobileNetV2), or from names.
"""

import dataclasses
import fnmatch
import itertools
from collections.abc import Sequence

import keras

from k4p1 import errors
from k4p1.backbones import canonical

_ACTIVATIONS = ("ReLU", "Activation", "LeakyReLU", "PReLU", "ELU", "Relu", "Relu6")
_SUMS = ("Add",)


@dataclasses.dataclass(frozen=True)
class Block:
    """A block of a network, by canonical names of operations.

    Attributes:
      source: puts out the node x_{i-1} that the block starts from.
      end: puts out G_i, before the activation.
      activation: that follows, or None: then G_i is the node.
    """

    source: str
    end: str
    activation: str | None

    @property
    def node(self) -> str:
        """The operation that puts out the node x_i."""
        return self.activation or self.end


def find_blocks(model: keras.Model, pattern: str = "", group: int = 1) -> tuple[Block, ...]:
    """The blocks of a network in order.

    Args:
      model: with canonical names.
      pattern: glob over names of layers that end the stem (the first match) and each block, `|` separates alternatives;
        empty: blocks are found from the structure.
      group: so many blocks, of the same number of channels, make one.

    Raises:
      PatchError: no sequence of blocks; says what was found.
    """
    graph = _Graph(model)
    blocks = graph.named(pattern) if pattern else graph.inverted() if graph.has_depthwise else graph.residual()
    return tuple(_grouped(graph, blocks, group))


def _grouped(graph: "_Graph", blocks: Sequence[Block], group: int) -> list[Block]:
    made: list[Block] = []
    members, channels = 0, None
    for block in blocks:
        if 0 < members < group and graph.channels(block.end) == channels:
            made[-1] = Block(made[-1].source, block.end, block.activation)
            members += 1
        else:
            made.append(block)
            members, channels = 1, graph.channels(block.end)
    return made


class _Graph:
    """The operations of a model in topological order, and those through which everything passes (`cuts`)."""

    def __init__(self, model: keras.Model):
        self.model = model
        self.operations = [] if isinstance(model, keras.Sequential) else canonical.operations(model)
        self.place = {id(operation): place for place, operation in enumerate(self.operations)}
        self.by_name = {operation.name: operation for operation in self.operations}
        inside = {id(node) for nodes in model._nodes_by_depth.values() for node in nodes} if self.operations else set()
        self.parents: list[list[int]] = []
        for operation in self.operations:
            nodes = [node for node in operation._inbound_nodes if id(node) in inside]
            found = [self.place.get(id(parent.operation), -1) for node in nodes for parent in node.parent_nodes]
            self.parents.append(found)
        last = [0] * len(self.operations)
        for place, found in enumerate(self.parents):
            for parent in found:
                if parent >= 0:
                    last[parent] = max(last[parent], place)
        reach, self.cuts = 0, []
        for place in range(len(self.operations)):
            if reach <= place and all(parent < place for parent in self.parents[place]):
                self.cuts.append(place)
            reach = max(reach, last[place])

    @property
    def has_depthwise(self) -> bool:
        return any(isinstance(operation, keras.layers.DepthwiseConv2D) for operation in self.operations)

    def channels(self, name: str) -> int:
        return keras.tree.flatten(self.by_name[name].output)[0].shape[-1]

    def residual(self) -> list[Block]:
        """Blocks that end at the sum of ways that part at one place."""
        blocks: list[Block] = []
        joins = [(one, other) for one, other in itertools.pairwise(self.cuts) if other - one > 1]
        sums = [join for join in joins if self._type(join[1]) in _SUMS]
        for fork, end in sums:
            source = self._name(fork)
            if blocks:
                between = self._between(self.place[id(self.by_name[blocks[-1].node])], fork)
                if any(self._type(place) not in (*_ACTIVATIONS, "BatchNormalization", "Dropout") for place in between):
                    raise self._no_sequence(blocks[-1].node, source, joins)
                source = blocks[-1].node
            blocks.append(Block(source, self._name(end), self._activation_after(end)))
        if not blocks or len(sums) < len(joins):
            raise self._no_sequence(None, None, joins)
        return blocks

    def inverted(self) -> list[Block]:
        """Blocks with a depthwise convolution that end in a linear normalisation, or a sum behind it."""
        first = next(p for p, operation in enumerate(self.operations) if isinstance(operation, keras.layers.DepthwiseConv2D))
        source = self._before_expansion(first)
        blocks: list[Block] = []
        begin = source
        for place in [cut for cut in self.cuts if cut > first]:
            is_end = self._type(place) in _SUMS or (
                self._type(place) == "BatchNormalization"
                and place + 1 < len(self.operations)
                and self._type(place + 1) not in (*_ACTIVATIONS, *_SUMS)
            )
            depthwise = any(
                isinstance(self.operations[p], keras.layers.DepthwiseConv2D) for p in range(begin + 1, place + 1)
            )
            if is_end and depthwise:
                blocks.append(Block(self._name(begin), self._name(place), None))
                begin = place
        if not blocks:
            raise self._no_sequence(None, None, [])
        return blocks

    def named(self, pattern: str) -> list[Block]:
        """Blocks that end where names match."""
        patterns = pattern.split("|")
        matching = [
            place
            for place, operation in enumerate(self.operations)
            if any(fnmatch.fnmatchcase(operation.name, one) for one in patterns)
        ]
        if len(matching) < 2:
            raise errors.PatchError(
                f"blocks={pattern} matches {len(matching)} layers of '{self.model.name}'; a network of blocks needs the end "
                f"of its stem and at least one block (layers: {self._some_names()})"
            )
        for place in matching:
            if place not in self.cuts:
                some = ", ".join(self._name(cut) for cut in self.cuts[:12])
                raise errors.PatchError(
                    f"blocks={pattern}: other ways pass by '{self._name(place)}'; a block ends where everything passes, "
                    f"such as {some}"
                )
        blocks = []
        for source, node in itertools.pairwise(matching):
            is_activation = self._type(node) in _ACTIVATIONS and self.parents[node][0] > source
            end = self._name(self.parents[node][0]) if is_activation else self._name(node)
            blocks.append(Block(self._name(source), end, self._name(node) if is_activation else None))
        return blocks

    def _activation_after(self, place: int) -> str | None:
        following = place + 1
        if following < len(self.operations) and self._type(following) in _ACTIVATIONS and self._feeds_only(place, following):
            return self._name(following)
        return None

    def _feeds_only(self, place: int, following: int) -> bool:
        return [p for p, parents in enumerate(self.parents) if place in parents] == [following]

    def _before_expansion(self, depthwise: int) -> int:
        """The place of the node before the first inverted residual: the stem's end, a 1x1 expansion left out."""
        place = self.parents[depthwise][0]
        while self._type(place) == "ZeroPadding2D":
            place = self.parents[place][0]
        back = place
        while back >= 0 and self._type(back) in (*_ACTIVATIONS, "BatchNormalization"):
            back = self.parents[back][0]
        is_expansion = back > 0 and isinstance(self.operations[back], keras.layers.Conv2D)
        if is_expansion and tuple(self.operations[back].kernel_size) == (1, 1) and self.parents[back][0] >= 0:
            return self.parents[back][0]
        return place

    def _between(self, one: int, other: int) -> range:
        return range(one + 1, other + 1)

    def _name(self, place: int) -> str:
        return self.operations[place].name

    def _type(self, place: int) -> str:
        return type(self.operations[place]).__name__

    def _some_names(self) -> str:
        names = [operation.name for operation in self.operations]
        return ", ".join(names[:6]) + (", ..." if len(names) > 6 else "")

    def _no_sequence(self, node: str | None, fork: str | None, joins: Sequence[tuple[int, int]]) -> errors.PatchError:
        ends = [f"{self._name(end)} ({self._type(end)})" for _, end in joins]
        found = f"{len(ends)} places where ways meet ({', '.join(ends[:4])}{', ...' if len(ends) > 4 else ''})"
        gap = f", and other layers between '{node}' and '{fork}'" if node else ""
        return errors.PatchError(
            f"'{self.model.name}' is no sequence of residual blocks: found {found if ends else 'a chain of layers'}{gap}; "
            "name the layers that end the stem and each block: nettailor(blocks='GLOB')"
        )
