"""The Visual Decathlon score: what the papers print comes out of their accuracies."""

import pytest

from k4p1 import errors
from k4p1.methods.decathlon import FINETUNING, decathlon_score, task_points

ROWS = {  # accuracies in RA's column order, printed score
    "Finetuning, RA Table 1": ((60.32, 60.34, 82.12, 92.82, 55.53, 99.42, 81.41, 89.12, 96.55, 51.20), 3096),
    "Series, RA Table 1": ((60.32, 61.87, 81.22, 93.88, 57.13, 99.27, 81.67, 89.62, 96.57, 50.12), 3159),
    "Parallel, RA Table 1": ((60.32, 64.21, 81.91, 94.73, 58.83, 99.38, 84.68, 89.21, 96.54, 50.94), 3412),
    "Parallel SVD, RA Table 1": ((60.32, 66.04, 81.86, 94.23, 57.82, 99.24, 85.74, 89.25, 96.62, 52.50), 3398),
    "Rebuffi et al. 2017, RA Table 1": ((59.23, 63.73, 81.31, 93.30, 57.02, 97.47, 83.43, 89.82, 96.17, 50.28), 2643),
    "Rosenfeld and Tsotsos, PB Table 8": ((57.74, 64.12, 80.07, 91.3, 56.54, 98.46, 86.05, 89.67, 96.77, 49.38), 2851),
    "Piggyback, PB Table 8": ((57.69, 65.29, 79.87, 96.99, 57.45, 97.27, 79.09, 87.63, 97.24, 47.48), 2838),
    "Scratch, PB Table 8": ((59.87, 57.1, 75.73, 91.2, 37.77, 96.55, 56.3, 88.74, 96.63, 43.27), 1625),
    "Feature, PB Table 8": ((59.67, 23.31, 63.11, 80.33, 45.37, 68.16, 73.69, 58.79, 43.54, 26.8), 544),
    "NetTailor": ((61.42, 75.07, 81.84, 94.68, 61.28, 99.52, 86.53, 90.09, 96.44, 49.54), 3744),
    "LwF, NetTailor's table": ((59.87, 61.15, 82.23, 92.34, 58.83, 97.57, 83.05, 88.08, 96.10, 50.04), 2515),
}


@pytest.mark.parametrize("row", ROWS)
def test_printed_scores(row):
    accuracies, printed = ROWS[row]
    assert decathlon_score(dict(zip(FINETUNING, accuracies, strict=True))) == pytest.approx(printed, abs=3)


def test_the_baseline_earns_a_quarter_and_perfection_everything():
    assert decathlon_score(FINETUNING) == pytest.approx(2500)
    assert decathlon_score(dict.fromkeys(FINETUNING, 100.0)) == pytest.approx(10_000)
    assert decathlon_score(dict.fromkeys(FINETUNING, 0.0)) == 0.0


def test_a_baseline_of_ones_own():
    assert task_points({"mine": 90.0}, {"mine": 80.0}) == {"mine": pytest.approx(562.5)}


@pytest.mark.parametrize(
    ("accuracies", "baseline", "message"),
    [
        ({"gtsbr": 90.0}, None, "did you mean 'gtsrb'"),
        ({"gtsrb": 101.0}, None, "expected percent, 0 to 100"),
        ({"mine": 50.0}, {"mine": -1.0}, "baseline of task 'mine'"),
    ],
)
def test_mistakes(accuracies, baseline, message):
    with pytest.raises(errors.ConfigError, match=message):
        decathlon_score(accuracies, baseline)
