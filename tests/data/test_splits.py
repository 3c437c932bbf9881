"""Which examples are held out, and that the test split never depends on a seed."""

import numpy as np
import pytest

from k4p1 import errors
from k4p1.data import Arrays, Splits

TRAIN = 100


def source(**sizes):
    sizes = sizes or {"train": TRAIN}
    return Arrays({name: (np.zeros((n, 2, 2, 3)), np.arange(n) % 2) for name, n in sizes.items()}, ("a", "b"), name="made")


def members(splits, split):
    """(split of the source, index) of every example."""
    return {(part.split, int(i)) for part in splits.parts(split) for i in np.flatnonzero(part.keep)}


def test_a_tenth_of_train_is_held_out_for_validation():
    splits = Splits(source(train=TRAIN, test=30))
    assert {split: splits.size(split) for split in ("train", "validation", "test")} == {
        "train": 90,
        "validation": 10,
        "test": 30,
    }


@pytest.mark.parametrize("sizes", [{"train": TRAIN}, {"train": TRAIN, "test": 30}, {"train": TRAIN, "validation": 7}])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_splits_are_disjoint_and_complete(sizes, seed):
    splits = Splits(source(**sizes), seed=seed)
    train, validation, test = (members(splits, split) for split in ("train", "validation", "test"))
    assert not train & validation
    assert not train & test
    assert not validation & test
    assert len(train | validation | test) == sum(sizes.values())
    assert members(splits, "train+validation") == train | validation


def test_the_seed_draws_the_validation_split():
    drawn = [members(Splits(source(), seed=seed), "validation") for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_the_test_split_never_depends_on_the_seed_or_the_validation_share():
    drawn = [
        members(Splits(source(), seed=s, validation_fraction=v), "test") for s, v in ((0, 0.1), (5, 0.1), (0, 0.4), (3, 0))
    ]
    assert all(split == drawn[0] for split in drawn)
    assert len(drawn[0]) == TRAIN // 5


def test_the_test_split_of_the_source_is_taken_whole():
    assert members(Splits(source(train=TRAIN, test=30)), "test") == {("test", i) for i in range(30)}


@pytest.mark.parametrize("name", ["validation", "valid", "val"])
def test_the_validation_split_of_the_source_comes_first(name):
    splits = Splits(source(**{"train": TRAIN, "test": 30, name: 7}), validation_fraction=0.3)
    assert members(splits, "validation") == {(name, i) for i in range(7)}
    assert splits.size("train") == TRAIN
    assert splits.size("train+validation") == TRAIN + 7


def test_no_validation_where_none_is_wanted():
    splits = Splits(source(train=TRAIN, test=30), validation_fraction=0)
    assert not splits.has("validation")
    assert splits.size("train") == TRAIN
    with pytest.raises(errors.ConfigError, match="unknown split of made 'validation'"):
        splits.parts("validation")


@pytest.mark.parametrize(("asked", "nearest"), [("tests", "test"), ("valid", "validation"), ("Train", "train")])
def test_unknown_split_shows_the_nearest(asked, nearest):
    with pytest.raises(errors.ConfigError, match=f"unknown split of made '{asked}'; did you mean '{nearest}'"):
        Splits(source()).parts(asked)


@pytest.mark.parametrize("validation", [-0.1, 1.0, 2.0])
def test_the_validation_share_must_be_a_share(validation):
    with pytest.raises(errors.ConfigError, match=r"expected a number in \[0, 1\)"):
        Splits(source(), validation_fraction=validation)


def test_no_training_examples():
    with pytest.raises(errors.DataError, match="made has no training examples; its splits: test"):
        Splits(source(test=3))


@pytest.mark.parametrize("train", [1, 2])
def test_too_few_examples_for_all_splits(train):
    with pytest.raises(errors.DataError, match=f"made is too small: {train} training examples leave none for"):
        Splits(source(train=train))
