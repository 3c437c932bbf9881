"""Masks under frozen batch normalisation: rates, sparsity and the spread of the features."""

import numpy as np
import pytest

from k4p1 import backbones, errors
from k4p1.cli import main
from k4p1.data import Arrays, preprocessing
from k4p1.studies import mask_rates as study

pytestmark = pytest.mark.slow

LABELS = np.arange(48) % 2
IMAGES = np.random.default_rng(0).integers(0, 128, (48, 8, 8, 3)) + 127 * LABELS[:, None, None, None]
DATA = Arrays({"train": (IMAGES[:40], LABELS[:40]), "test": (IMAGES[40:], LABELS[40:])}, ["dark", "light"])
"""Two classes of noisy images, apart in brightness."""


@pytest.fixture(scope="module")
def network():
    return backbones.cifar_resnet(depth=8)


def spread_of_test_images(network):
    resized = np.stack([preprocessing.resize(image, (32, 32)) for image in IMAGES[40:].astype(np.uint8)])
    scaled = (resized / 255 - np.array([0.485, 0.456, 0.406])) / np.array([0.229, 0.224, 0.225])
    features = np.array(network.model(scaled.astype("float32"), training=False))
    return np.std(features, axis=0).mean()


def test_higher_rates_mask_more_and_change_the_features(network):
    before = network.tensors()
    slow, fast = study.mask_rates(backbone=lambda: network, data=DATA, rates=[1e-6, 4e-3], steps=3, quiet=True)
    assert (slow.rate, fast.rate) == (1e-6, 4e-3)
    assert slow.sparsity == 0.0  # three steps of 1e-6 are far from the threshold, 5e-3 away
    assert 0.05 < fast.sparsity < 0.95
    assert slow.spread == pytest.approx(slow.backbone_spread, rel=1e-5)
    assert slow.backbone_spread == fast.backbone_spread == pytest.approx(spread_of_test_images(network), rel=1e-4)
    assert abs(fast.spread / fast.backbone_spread - 1) > 0.05
    assert all(0 <= entry.test_accuracy <= 1 for entry in (slow, fast))
    for key, value in network.tensors().items():
        np.testing.assert_array_equal(value, before[key])


def test_markdown():
    rows = list(study.markdown([study.MaskRate(3e-4, 0.1104, 0.1, 0.00071, 0.3184)]))
    assert rows[2] == "| 0.0003 | 11.0% | 10.0 | 0.0007 against 0.3184 |"
    assert len({row.count("|") for row in rows}) == 1


def test_the_command_prints_a_row_per_rate(network, tmp_path, capsys):
    weights = tmp_path / "backbone.safetensors"
    backbones.save(network, weights)
    flags = ["--data", "embedded/parity", "--weights", str(weights), "--depth", "8", "--rates", "1e-6", "--steps", "1"]
    assert main.main(["mask_rates", *flags]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("task 'task': 'mask+head' uses 7 batch normalisations")  # those of random weights
    assert out[1].startswith("rate 1e-06 (1 of 1): test ")
    assert out[-1].startswith("| 1e-06 | 0.0% | ")


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (["--rates", "1e-4,fast"], 1, "--rates 1e-4,fast: expected numbers separated by commas"),
        (["--rates", "0"], 1, "learning_rate=0.0; expected a positive number"),
        (["--data", "embedded/digit"], 2, "unknown embedded data set 'digit'; did you mean 'digits'?"),
        (["--weights", "nowhere.npz"], 2, "no weight file nowhere.npz"),
    ],
)
def test_mistakes_are_one_line(flags, code, message, capsys):
    given = ["--data", "embedded/parity", "--weights", "weights.npz"]
    assert main.main(["mask_rates", *given, *flags]) == code
    captured = capsys.readouterr()
    assert message in captured.err and len(captured.err.splitlines()) == 1
    assert not captured.out


def test_a_bad_rate_is_refused_before_anything_runs():
    def never():
        raise AssertionError("the backbone was built")

    with pytest.raises(errors.ConfigError, match="learning_rate=-1"):
        study.mask_rates(backbone=never, data=DATA, rates=[1e-4, -1.0])
