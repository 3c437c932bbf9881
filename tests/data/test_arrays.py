"""Images in memory."""

import numpy as np
import pytest
import tensorflow as tf

from k4p1 import errors
from k4p1.data import Arrays, Pipeline, Source, Splits


def first_image(source):
    return next(iter(source.examples("train")))["image"].numpy()


def test_float_images_of_0_to_1_are_multiplied_and_that_is_said_once(capsys):
    images = np.linspace(0.0, 1.0, 2 * 2 * 2 * 3).reshape(2, 2, 2, 3)
    data = {"train": (images, [0, 1]), "test": (images / 2, [0, 1])}
    found = first_image(Arrays(data, ["a", "b"], "mine"))
    np.testing.assert_array_equal(found, np.round(255 * images[0].astype("float32")).astype(np.uint8))
    assert capsys.readouterr().out == "mine: float images of 0 to 1 are multiplied by 255\n"


INTEGERS = [np.uint8, np.int16, np.uint16, np.int32, np.uint32, np.int64, np.uint64, np.float16, np.float32, np.float64]


@pytest.mark.parametrize("dtype", INTEGERS)
def test_images_of_0_to_255_stay_as_they_are(dtype, capsys):
    images = np.array([0, 1, 7, 128, 254, 255], dtype).reshape(1, 2, 1, 3)
    found = first_image(Arrays({"train": (images, [0])}, ["a"]))
    np.testing.assert_array_equal(found, images[0].astype(np.uint8))
    assert found.dtype == np.uint8 and capsys.readouterr().out == ""


def test_dark_whole_numbers_are_not_multiplied(capsys):
    np.testing.assert_array_equal(first_image(Arrays({"train": (np.ones((1, 2, 2, 3), np.int8), [0])}, ["a"])), 1)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.array([0, 65535], np.uint16), "images go from 0 to 65535; scale or clip them to 0 to 255"),
        (np.array([-1.0, 1.0]), "images go from -1.0 to 1.0; scale"),
        (np.array([0, -1], np.int8), "images go from -1 to 0; scale"),
        (np.array([0, np.nan]), "1 values of the images are NaN or infinite"),
        (np.array([0, np.inf]), "1 values of the images are NaN or infinite"),
        (np.array([True, False]), "images are bool; expected whole numbers or floats"),
        (np.array(["a", "b"]), "images are <U1; expected"),
        (np.array([1j, 0]), "images are complex128; expected"),
    ],
)
def test_values_that_are_no_pixels_are_refused(images, message):
    with pytest.raises(errors.DataError, match=f"mine/train: {message}"):
        Arrays({"train": (images.reshape(1, 2, 1, 1), [0])}, ["a"], "mine")


def test_splits_of_different_ranges_are_refused():
    images = np.full((1, 2, 2, 3), 0.5)
    with pytest.raises(errors.DataError, match=r"mine: images go up to different values \(train to 0.5, test to 127\.5\)"):
        Arrays({"train": (images, [0]), "test": (255 * images, [0])}, ["a"], "mine")


@pytest.mark.parametrize(("labels", "what"), [([0.5], "float64"), ([np.nan], "float64"), (["a"], "<U1")])
def test_labels_are_whole_numbers(labels, what):
    with pytest.raises(errors.DataError, match=f"labels are {what}; expected whole numbers"):
        Arrays({"train": (np.zeros((1, 2, 2, 3), np.uint8), labels)}, ["a"])


class OwnSource(Source):
    """Yields pixels as a user's own source might."""

    name, labels = "own", ("a", "b")

    def __init__(self, images):
        self._images = images

    def sizes(self):
        return {"train": len(self._images)}

    def examples(self, split):
        return tf.data.Dataset.from_tensor_slices({"image": self._images, "label": np.arange(len(self._images)) % 2})


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((8, 4, 4, 3), np.float32), "own has images of float32; expected encoded bytes, or pixels"),
        (np.zeros((8, 4, 4, 1), np.uint8), r"own has images of shape \(4, 4, 1\); expected pixels"),
    ],
)
def test_pixels_of_another_source_must_be_uint8(images, message):
    source = OwnSource(images)
    with pytest.raises(errors.DataError, match=message):
        Pipeline(source, Splits(source), (4, 4), 2, 2)
