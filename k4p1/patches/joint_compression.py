"""Joint compression of adapters: one factor for all tasks, a small one for each (RA, section 3.4)."""

import dataclasses
from collections.abc import Mapping

import numpy as np

from k4p1 import errors

_FLOAT_BYTES = 4
_NEGLIGIBLE = 1e-6  # of the largest singular value: below float32's precision


@dataclasses.dataclass(frozen=True, eq=False)
class Spectrum:
    """The singular value decomposition `[alpha_1 ... alpha_T] = U S V` of the adapters of one layer, each (C, D).

    Attributes:
      left: U (C, n).
      values: the singular values (n,), the largest first.
      right: V (n, T D).
      columns: D.
    """

    left: np.ndarray
    values: np.ndarray
    right: np.ndarray
    columns: int

    @classmethod
    def of(cls, alphas: Mapping[str, np.ndarray]) -> "Spectrum":
        """The decomposition of the adapters of one layer, by task."""
        stacked = np.concatenate([np.asarray(alpha, np.float64) for alpha in alphas.values()], axis=1)
        left, values, right = np.linalg.svd(stacked, full_matrices=False)
        return cls(left, values, right, next(iter(alphas.values())).shape[1])

    @property
    def largest_rank(self) -> int:
        """The rank that loses nothing: at most C, and at most T D."""
        return len(self.values)

    def bytes_of_rank_one(self) -> int:
        """What one more rank costs: a column of beta and one of every gamma_t."""
        return _FLOAT_BYTES * (len(self.left) + self.right.shape[1])

    def energy(self, rank: int) -> float:
        """The sum of the squares of the first `rank` singular values."""
        return float(np.sum(self.values[:rank] ** 2))

    def beta(self, rank: int) -> np.ndarray:
        """`beta = U S`, float32 (C, rank): what the tasks share."""
        return (self.left[:, :rank] * self.values[:rank]).astype(np.float32)

    def gamma(self, rank: int, task: int) -> np.ndarray:
        """`gamma_t = V_t^T`, float32 (D, rank): what task number `task` keeps."""
        mine = self.right[:rank, task * self.columns : (task + 1) * self.columns]
        return mine.T.astype(np.float32)


def ranks_of_share(spectra: Mapping[str, Spectrum], share: float) -> dict[str, int]:
    """K of every layer as a share of its largest rank, at least 1 (RA, section 3.4: one half).

    Raises:
      PatchError: a share that is not in (0, 1].
    """
    if not 0 < share <= 1:
        raise errors.PatchError(f"rank {share:g}: expected a share of the channels, more than 0 and at most 1")
    return {layer: max(1, round(share * spectrum.largest_rank)) for layer, spectrum in spectra.items()}


def ranks_of_budget(spectra: Mapping[str, Spectrum], budget_bytes: int) -> dict[str, int]:
    """K of every layer, at least 1, such that all factors take at most `budget_bytes`: most energy per byte comes first.

    Within a layer singular values fall, so taking them in the order of energy per byte never skips one.

    Raises:
      PatchError: a budget below rank 1 for every layer; says how much that takes.
    """
    least = sum(spectrum.bytes_of_rank_one() for spectrum in spectra.values())
    if budget_bytes < least:
        raise errors.PatchError(f"a budget of {budget_bytes:,} bytes is too small: rank 1 in every layer takes {least:,}")
    ranks = dict.fromkeys(spectra, 1)
    left = budget_bytes - least
    offers = [
        (value**2 / spectrum.bytes_of_rank_one(), layer)
        for layer, spectrum in spectra.items()
        for value in spectrum.values[1:]
        if value > _NEGLIGIBLE * spectrum.values[0]
    ]
    full = set()
    for _, layer in sorted(offers, key=lambda offer: -offer[0]):
        cost = spectra[layer].bytes_of_rank_one()
        if layer in full or cost > left:
            full.add(layer)
            continue
        ranks[layer] += 1
        left -= cost
    return ranks


def factor_bytes(spectra: Mapping[str, Spectrum], ranks: Mapping[str, int]) -> int:
    """Bytes of beta and all gammas."""
    return sum(ranks[layer] * spectrum.bytes_of_rank_one() for layer, spectrum in spectra.items())


def energy_kept(spectra: Mapping[str, Spectrum], ranks: Mapping[str, int]) -> float:
    """The share of the squares of all singular values that the ranks keep, in [0, 1]."""
    whole = sum(spectrum.energy(len(spectrum.values)) for spectrum in spectra.values())
    return sum(spectrum.energy(ranks[layer]) for layer, spectrum in spectra.items()) / whole if whole else 1.0


def low_rank(alpha: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """(beta (C, K), gamma (D, K)) with `beta @ gamma.T` nearest to alpha: one task's own factors (RA, section 3.4)."""
    spectrum = Spectrum.of({"alone": alpha})
    return spectrum.beta(rank), spectrum.gamma(rank, 0)
