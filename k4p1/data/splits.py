"""Train, validation and test of a source, held out by a seed where the source has no such split."""

import dataclasses

import numpy as np

from k4p1 import checks, errors
from k4p1.data.source import Source

SPLITS = ("train", "validation", "test", "train+validation")
_TEST_SHARE = 0.2


@dataclasses.dataclass(frozen=True)
class Part:
    """A part of a source's split.

    Attributes:
      split: name of the split in the source.
      keep: bool (examples of the split,): which examples belong to the part.
    """

    split: str
    keep: np.ndarray

    @property
    def size(self) -> int:
        """The number of examples."""
        return int(self.keep.sum())


class Splits:
    """The parts of a source.

    Where the source has no test split, 20% of train, the same for every seed, are held out for it. Where it has no
    validation split, a share of the rest of train is, drawn by the seed. `train+validation` is for a refit after selection.

    Args:
      source: the data.
      seed: of the validation split.
      validation_fraction: share of train to hold out where there is no validation split; 0 for none.

    Raises:
      DataError: no train split, or a part that would be empty.
    """

    def __init__(self, source: Source, seed: int = 0, validation_fraction: float = 0.1):
        checks.check_number("validation_fraction", validation_fraction, checks.SHARE)
        sizes = source.sizes()
        if not sizes.get("train"):
            raise errors.DataError(f"{source.name} has no training examples; its splits: {', '.join(sizes) or 'none'}")
        train = np.ones(sizes["train"], bool)
        self._parts: dict[str, list[Part]] = {}
        if sizes.get("test"):
            self._parts["test"] = [Part("test", np.ones(sizes["test"], bool))]
        else:
            held = _draw(train, _TEST_SHARE, seed=0)
            self._parts["test"] = [Part("train", held)]
            train = train & ~held
        everything = [Part("train", train)]
        own = next((name for name in ("validation", "valid", "val") if sizes.get(name)), None)
        if own and validation_fraction:
            self._parts["validation"] = [Part(own, np.ones(sizes[own], bool))]
            everything += self._parts["validation"]
        elif validation_fraction:
            held = _draw(train, validation_fraction, seed)
            self._parts["validation"] = [Part("train", held)]
            train = train & ~held
        self._parts |= {"train": [Part("train", train)], "train+validation": everything}
        self._name = source.name
        for name in self._parts:
            if not self.size(name):
                raise errors.DataError(
                    f"{source.name} is too small: {sizes['train']} training examples leave none for {name}"
                )

    def parts(self, split: str) -> list[Part]:
        """The parts that make up a split.

        Raises:
          ConfigError: unknown split, or no validation split was asked for.
        """
        if split not in self._parts:
            raise errors.ConfigError(errors.unknown(f"split of {self._name}", split, self._parts))
        return self._parts[split]

    def size(self, split: str) -> int:
        """The number of examples of a split."""
        return sum(part.size for part in self.parts(split))

    def has(self, split: str) -> bool:
        """Whether there is such a split."""
        return split in self._parts


def _draw(allowed: np.ndarray, share: float, seed: int) -> np.ndarray:
    candidates = np.flatnonzero(allowed)
    count = max(1, round(share * len(candidates)))
    chosen = np.random.default_rng(seed).permutation(candidates)[:count]
    drawn = np.zeros_like(allowed)
    drawn[chosen] = True
    return drawn
