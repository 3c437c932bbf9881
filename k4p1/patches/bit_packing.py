"""Masks as bits: one bit per weight for binary masks, two for ternary ones (PB, section 3: 1 extra bit a parameter)."""

import dataclasses
import math

import numpy as np

from k4p1 import errors

_MARGIN = 5e-3


@dataclasses.dataclass(frozen=True)
class BitPacking:
    """Scores s of the given shape, stored as the mask that they stand for.

    Binary: bit 1 where `s >= threshold`. Ternary: code 0, 1, 2 for the mask values 0, 1, -1, that is 1 where
    `s >= threshold`, -1 where `s <= -threshold`. Bits are packed in C order, the lowest bit of a byte first; the last byte
    is filled up with zeros.

    Attributes:
      shape: of the scores.
      threshold: of the mask.
      ternary: two bits per weight in place of one.
    """

    shape: tuple[int, ...]
    threshold: float
    ternary: bool = False

    name = "bits"

    @property
    def bits(self) -> int:
        """Bits per weight."""
        return 2 if self.ternary else 1

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Shape of the stored array: bytes."""
        return (math.ceil(math.prod(self.shape) * self.bits / 8),)

    def encode(self, scores: np.ndarray) -> np.ndarray:
        """The mask of `scores` as uint8 of `stored_shape`."""
        flat = np.asarray(scores, np.float32).reshape(-1)
        kept = flat >= np.float32(self.threshold)
        if not self.ternary:
            return np.packbits(kept, bitorder="little")
        turned = flat <= np.float32(-self.threshold)
        return np.packbits(np.stack([kept, turned & ~kept], axis=-1).reshape(-1), bitorder="little")

    def decode(self, packed: np.ndarray) -> np.ndarray:
        """Scores whose mask is the stored one, each 0.005 from its threshold, or as near to it as float32 can tell apart.

        Raises:
          ArtifactError: not bytes of `stored_shape`, or a code that stands for nothing.
        """
        if packed.dtype != np.uint8 or packed.shape != self.stored_shape:
            raise errors.ArtifactError(
                f"a mask of shape {self.shape} takes uint8 {self.stored_shape}; got {packed.dtype} {packed.shape}"
            )
        threshold = np.float32(self.threshold)
        margin = max(np.float32(_MARGIN), 2 * np.spacing(np.abs(threshold)))
        flags = np.unpackbits(packed, count=math.prod(self.shape) * self.bits, bitorder="little").astype(bool)
        if not self.ternary:
            scores = np.where(flags, threshold + margin, threshold - margin)
        else:
            kept, turned = flags.reshape(-1, 2).T
            if np.any(kept & turned):
                raise errors.ArtifactError("a ternary mask holds the code 3, which stands for nothing")
            scores = np.where(kept, threshold + margin, np.where(turned, -threshold - margin, 0.0))
        return scores.astype(np.float32).reshape(self.shape)
