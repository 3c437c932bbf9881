"""A layer of a backbone and where it stands."""

import dataclasses
import typing


@dataclasses.dataclass(frozen=True)
class LayerSite:
    """A layer of the backbone and where it stands.

    Attributes:
      name: the canonical name.
      layer: the shared `keras.layers.Layer`.
      depth: position among the layers that own variables, in topological order, 0 (first) to 1 (last).
      block_position: rank among the convolutions on the long way through its residual block, from 1; None outside of one.
      stage: `early`, `mid` or `late`.
    """

    name: str
    layer: typing.Any
    depth: float
    block_position: int | None = None
    stage: str = "early"
