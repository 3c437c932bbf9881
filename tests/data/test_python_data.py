"""Data that a program has in its hands."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import k4p1
from k4p1 import errors
from k4p1.data import python_data

RANDOM = np.random.default_rng(0)
IMAGES = RANDOM.integers(0, 256, (30, 8, 8, 3), dtype=np.uint8)
LABELS = np.arange(30) % 3
WEIGHTS = np.linspace(0.0, 2.0, 30).astype(np.float32)
PAIRS = tf.data.Dataset.from_tensor_slices((IMAGES, LABELS))


class Batches(keras.utils.PyDataset):
    """Ten examples at a time."""

    def __len__(self):
        return 3

    def __getitem__(self, number):
        part = slice(10 * number, 10 * number + 10)
        return IMAGES[part], LABELS[part]


def named(dataset):
    """As Keras' readers of folders leave it."""
    dataset.class_names = ["a", "b", "c"]
    return dataset


@pytest.mark.parametrize(
    "data",
    [
        (IMAGES, LABELS),
        [IMAGES.astype(np.float32), LABELS[:, None]],
        (IMAGES, keras.utils.to_categorical(LABELS)),
        PAIRS,
        PAIRS.batch(7),
        PAIRS.map(lambda image, label: {"image": image, "label": label}),
        named(PAIRS.batch(4)),
        Batches(),
        {"train": PAIRS},
    ],
)
def test_forms_of_one_data_set(data):
    source = python_data.as_source(data)
    assert source.sizes() == {"train": 30} and source.fields == ("label",)
    assert source.labels == (("a", "b", "c") if hasattr(data, "class_names") else ("0", "1", "2"))
    for _ in range(2):  # the order never changes
        found = list(source.examples("train").as_numpy_iterator())
        np.testing.assert_array_equal([one["image"] for one in found], IMAGES)
        np.testing.assert_array_equal([one["label"] for one in found], LABELS)


def test_splits_and_sample_weights():
    source = python_data.as_source({"train": (IMAGES, LABELS, WEIGHTS), "val": PAIRS.take(6), "test": Batches()})
    assert source.sizes() == {"train": 30, "validation": 6, "test": 30}
    assert source.fields == ("label", "sample_weight")
    assert [float(one["sample_weight"]) for one in source.examples("train")] == pytest.approx(list(WEIGHTS))
    assert [float(one["sample_weight"]) for one in source.examples("validation")] == [1.0] * 6


def test_classes_without_an_image_to_train_on_are_said(capsys):
    assert python_data.as_source((IMAGES, 2 * LABELS)).labels == tuple("01234")
    assert "data: no image to train on of 2 classes: 1, 3\n" in capsys.readouterr().out


def test_floats_of_0_to_1_are_recognised_and_said(capsys):
    source = python_data.as_source((IMAGES.astype(np.float32) / 255, LABELS))
    assert "float images of 0 to 1 are multiplied by 255" in capsys.readouterr().out
    np.testing.assert_array_equal(next(source.examples("train").as_numpy_iterator())["image"], IMAGES[0])


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (3, "data is a int; expected a name, a folder"),
        ([1, 2, 3, 4], "data is a list of 4; expected"),
        ({"tain": PAIRS}, "unknown split of data 'tain'; did you mean 'train'?"),
        ({"test": PAIRS}, "data has no split 'train'; it has: test"),
        ({"train": 5}, "data['train'] is a int"),
        ((IMAGES, LABELS[:5]), "data/train: 30 images and 5 labels; expected a label for each image"),
        ((IMAGES[..., 0], LABELS), "expected (n, height, width, 1 or 3); grey images are images[..., None]"),
        ((IMAGES[0], LABELS[:1]), "expected (n, height, width, 1 or 3); one image is images[None]"),
        ((np.moveaxis(IMAGES, -1, 1), LABELS), "channels come last: numpy.moveaxis(images, 1, -1)"),
        ((np.where(IMAGES > 9, np.nan, 1.0), LABELS), "values of the images are NaN or infinite"),
        ((IMAGES, np.full((30, 2), 0.5)), "expected numbers of classes (n,), or one-hot vectors"),
        ((IMAGES, LABELS, -WEIGHTS), "sample weights"),
    ],
)
def test_the_task_refuses_what_is_no_data(data, says):
    with pytest.raises(errors.DataError) as caught:
        k4p1.Task(data=data)
    assert says in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (PAIRS.repeat(), "without end; leave out repeat()"),
        (PAIRS.map(lambda image, _: image), "an element is a ndarray; expected (image, label)"),
        (PAIRS.take(0), "holds no examples"),
        (PAIRS.map(lambda image, label: (image[0], label)), "expected (height, width, channels), or a batch"),
        (
            PAIRS.take(1).concatenate(PAIRS.take(1).map(lambda image, label: (image[:4], label))),
            "images have several sizes",
        ),
    ],
)
def test_what_is_seen_when_it_is_read(data, says):
    with pytest.raises(errors.DataError) as caught:
        python_data.as_source(data).sizes()
    assert says in str(caught.value) and "\n" not in str(caught.value)
