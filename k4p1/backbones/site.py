"""A layer of a backbone and where it stands."""

import dataclasses
import typing


@dataclasses.dataclass(frozen=True)
class LayerSite:
    """A layer of the backbone and where it stands.

    Attributes:
      name: the canonical name.
      layer: the shared `keras.layers.Layer`.
      block_position: rank among the convolutions on the long way through its residual block, from 1; None outside of one.
      stage: `early`, `mid` or `late`.
      normalised: whether a normalisation reads its linear output, and nothing else does.
    """

    name: str
    layer: typing.Any
    block_position: int | None = None
    stage: str = "early"
    normalised: bool = False
