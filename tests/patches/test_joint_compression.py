"""Joint SVD of adapters (RA, section 3.4): equations, ranks by share and by budget."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from k4p1 import errors
from k4p1.patches import joint_compression as jc


def adapters(rows, columns, tasks, seed=0):
    random = np.random.default_rng(seed)
    return {f"t{t}": random.normal(size=(rows, columns)).astype("float32") for t in range(tasks)}


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 4), st.integers(0, 99), st.sampled_from(["input", "output"]))
def test_the_whole_rank_gives_every_alpha_back(rows, columns, tasks, seed, share):
    alphas = adapters(rows, columns, tasks, seed)
    spectrum = jc.Spectrum.of(alphas, share)
    rank = spectrum.largest_rank
    for number, alpha in enumerate(alphas.values()):
        factors = {jc.SHARED_FACTOR[share]: spectrum.shared(rank), jc.own_factor(share): spectrum.own(rank, number)}
        np.testing.assert_allclose(factors["beta"] @ factors["gamma"].T, alpha, atol=1e-4)


def test_factors_are_those_of_the_stack_and_keep_its_energy():
    alphas = adapters(8, 8, 3)
    spectrum, rank = jc.Spectrum.of(alphas, "input"), 4
    beta, gammas = spectrum.shared(rank), [spectrum.own(rank, t) for t in range(3)]
    np.testing.assert_allclose(sum(g.T @ g for g in gammas), np.eye(rank), atol=1e-5)  # V V^T = I
    np.testing.assert_allclose(beta.T @ beta, np.diag(spectrum.values[:rank] ** 2), atol=1e-4)  # U^T U = I
    lost = sum(np.sum((a - beta @ g.T) ** 2) for a, g in zip(alphas.values(), gammas, strict=True))
    whole = sum(np.sum(a**2) for a in alphas.values())
    assert jc.energy_kept({"layer": spectrum}, {"layer": rank}) == pytest.approx(1 - lost / whole, abs=1e-5)


@pytest.mark.parametrize("share", ["input", "output"])
def test_four_adapters_of_one_direction_are_of_rank_one_on_its_side_alone(share):
    """RA, section 3.1.1: A_dc maps channel c to d, and alpha is (C, D); four adapters write, or read, one direction."""
    random = np.random.default_rng(3)
    inputs, outputs = random.normal(size=(4, 6)), random.normal(size=(4, 5))
    common = outputs[0] if share == "output" else inputs[0]
    alphas = {
        f"t{t}": np.outer(inputs[t] if share == "output" else common, common if share == "output" else outputs[t])
        for t in range(4)
    }
    ranks = {side: int(np.sum(jc.Spectrum.of(alphas, side).values > 1e-9)) for side in ("input", "output")}
    assert ranks.pop(share) == 1
    assert list(ranks.values()) == [4]
    spectrum = jc.Spectrum.of(alphas, share)
    direction = spectrum.shared(1)[:, 0]
    assert abs(direction @ common) == pytest.approx(np.linalg.norm(direction) * np.linalg.norm(common), rel=1e-5)


def test_a_side_that_there_is_not():
    with pytest.raises(errors.PatchError, match="unknown side of the adapters to share 'outputs'; did you mean 'output'"):
        jc.Spectrum.of(adapters(2, 2, 1), "outputs")


def test_no_other_factors_of_this_rank_are_nearer():
    alpha = adapters(7, 5, 1)["t0"]
    beta, gamma = jc.low_rank(alpha, 2)
    best = np.sum((alpha - beta @ gamma.T) ** 2)
    random = np.random.default_rng(1)
    for _ in range(50):
        moved = (beta + 0.05 * random.normal(size=beta.shape)) @ (gamma + 0.05 * random.normal(size=gamma.shape)).T
        assert np.sum((alpha - moved) ** 2) >= best - 1e-4


def test_parameters_tend_to_k_over_c_with_many_tasks():
    """RA, section 3.4: (T C K + C K) / (T C^2)."""
    tasks, channels, rank = 9, 16, 8
    spectra = {"layer": jc.Spectrum.of(adapters(channels, channels, tasks))}
    ratio = jc.factor_bytes(spectra, {"layer": rank}) / (4 * tasks * channels**2)
    assert ratio == pytest.approx((tasks * channels * rank + channels * rank) / (tasks * channels**2))
    assert ratio == pytest.approx(0.5, abs=0.06)


def test_ranks_of_a_share():
    spectra = {"small": jc.Spectrum.of(adapters(3, 16, 2)), "large": jc.Spectrum.of(adapters(16, 16, 2))}
    assert jc.ranks_of_share(spectra, 0.5) == {"small": 3, "large": 8}  # of 16 output channels, 2 x 3 are in use
    assert jc.ranks_of_share({"small": jc.Spectrum.of(adapters(3, 16, 2), "input")}, 0.5) == {"small": 2}
    assert jc.ranks_of_share(spectra, 0.01) == {"small": 1, "large": 1}
    for share in (0.0, -1.0, 1.5):
        with pytest.raises(errors.PatchError, match="expected a share of the channels"):
            jc.ranks_of_share(spectra, share)


@settings(max_examples=40, deadline=None)
@given(st.integers(400, 8000), st.integers(0, 99))
def test_a_budget_is_kept_and_a_larger_one_keeps_more(budget, seed):
    spectra = {"a": jc.Spectrum.of(adapters(8, 8, 2, seed)), "b": jc.Spectrum.of(adapters(4, 8, 2, seed + 1))}
    ranks, more = jc.ranks_of_budget(spectra, budget), jc.ranks_of_budget(spectra, 2 * budget)
    assert jc.factor_bytes(spectra, ranks) <= budget
    assert all(1 <= ranks[layer] <= spectra[layer].largest_rank for layer in spectra)
    assert jc.energy_kept(spectra, ranks) <= jc.energy_kept(spectra, more) + 1e-12


def test_a_budget_goes_where_the_energy_is():
    strong, weak = {"t": 10 * adapters(8, 8, 1)["t0"]}, {"t": 0.1 * adapters(8, 8, 1)["t0"]}
    spectra = {"weak": jc.Spectrum.of(weak), "strong": jc.Spectrum.of(strong)}
    assert jc.ranks_of_budget(spectra, 64 * 9) == {"weak": 1, "strong": 8}


def test_a_budget_buys_no_rank_that_holds_nothing():
    alpha = np.outer(np.arange(1.0, 9.0), np.ones(8)).astype("float32")
    assert jc.ranks_of_budget({"a": jc.Spectrum.of({"t": alpha})}, 10**6) == {"a": 1}


def test_a_budget_below_rank_one_says_what_that_takes():
    with pytest.raises(errors.PatchError, match="10 bytes is too small: rank 1 in every layer takes 64"):
        jc.ranks_of_budget({"a": jc.Spectrum.of(adapters(8, 8, 1))}, 10)
