"""Joint compression of adapters: one factor for all tasks, a small one for each (RA, section 3.4).

An adapter computes `x @ alpha`, alpha (C, D) from C input to D output channels, and is replaced by `beta @ gamma^T`, beta
(C, K), gamma (D, K). One of the factors becomes common to all tasks:

* `output`: gamma, K directions of the output that every task mixes in its own way. This is RA's stack
  `[alpha_1 ... alpha_T]`, whose matrices are indexed A_dc, output channel first (section 3.1.1).
* `input`: beta, K directions of the input that every task reads. The only one until version 0.1.

For square alphas both cost the same; they keep different things: adapters of one output direction are of rank 1 together
under `output`, and in general of rank T under `input`.
"""

import dataclasses
from collections.abc import Mapping

import numpy as np

from k4p1 import errors

_FLOAT_BYTES = 4
_NEGLIGIBLE = 1e-6  # of the largest singular value: below float32's precision


INPUT, OUTPUT = "input", "output"
SHARED_FACTOR = {INPUT: "beta", OUTPUT: "gamma"}
"""The factor that the tasks share, by the side of the adapter that it stands for."""


def own_factor(share: str) -> str:
    """The factor that stays each task's own."""
    return SHARED_FACTOR[INPUT if share == OUTPUT else OUTPUT]


@dataclasses.dataclass(frozen=True, eq=False)
class Spectrum:
    """The singular value decomposition `[A_1 ... A_T] = U S V` of the adapters of one layer.

    `A_t` is alpha_t^T (D, C) where the output side is shared, alpha_t (C, D) where the input side is. R are its rows, N its
    columns.

    Attributes:
      left: U (R, n).
      values: the singular values (n,), the largest first.
      right: V (n, T N).
      columns: N.
    """

    left: np.ndarray
    values: np.ndarray
    right: np.ndarray
    columns: int

    @classmethod
    def of(cls, alphas: Mapping[str, np.ndarray], share: str = OUTPUT) -> "Spectrum":
        """The decomposition of the adapters (C, D) of one layer, by task.

        Raises:
          PatchError: a side that is neither `input` nor `output`.
        """
        if share not in SHARED_FACTOR:
            raise errors.PatchError(errors.unknown("side of the adapters to share", share, SHARED_FACTOR))
        matrices = [np.asarray(alpha, np.float64) for alpha in alphas.values()]
        matrices = [alpha.T for alpha in matrices] if share == OUTPUT else matrices
        left, values, right = np.linalg.svd(np.concatenate(matrices, axis=1), full_matrices=False)
        return cls(left, values, right, matrices[0].shape[1])

    @property
    def largest_rank(self) -> int:
        """The rank that loses nothing: at most R, and at most T N."""
        return len(self.values)

    def bytes_of_rank_one(self) -> int:
        """What one more rank costs: a column of the shared factor and one of every task's own."""
        return _FLOAT_BYTES * (len(self.left) + self.right.shape[1])

    def energy(self, rank: int) -> float:
        """The sum of the squares of the first `rank` singular values."""
        return float(np.sum(self.values[:rank] ** 2))

    def shared(self, rank: int) -> np.ndarray:
        """`U S`, float32 (R, rank): what the tasks share; RA's beta."""
        return (self.left[:, :rank] * self.values[:rank]).astype(np.float32)

    def own(self, rank: int, task: int) -> np.ndarray:
        """`V_t^T`, float32 (N, rank): what task number `task` keeps; RA's gamma_t."""
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
    """Bytes of the shared factor and all others."""
    return sum(ranks[layer] * spectrum.bytes_of_rank_one() for layer, spectrum in spectra.items())


def energy_kept(spectra: Mapping[str, Spectrum], ranks: Mapping[str, int]) -> float:
    """The share of the squares of all singular values that the ranks keep, in [0, 1]."""
    whole = sum(spectrum.energy(len(spectrum.values)) for spectrum in spectra.values())
    return sum(spectrum.energy(ranks[layer]) for layer, spectrum in spectra.items()) / whole if whole else 1.0


def low_rank(alpha: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """(beta (C, K), gamma (D, K)) with `beta @ gamma.T` nearest to alpha: one task's own factors (RA, section 3.4)."""
    spectrum = Spectrum.of({"alone": alpha}, INPUT)
    return spectrum.shared(rank), spectrum.own(rank, 0)
