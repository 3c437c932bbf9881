"""Images in memory."""

import numpy as np

from k4p1.data import Arrays


def first_image(source):
    return next(iter(source.examples("train")))["image"].numpy()


def test_float_images_of_0_to_1_are_taken_for_0_to_255_and_that_is_said(capsys):
    images = np.linspace(0.0, 1.0, 2 * 2 * 2 * 3).reshape(2, 2, 2, 3)
    found = first_image(Arrays({"train": (images, [0, 1])}, ["a", "b"], "mine"))
    np.testing.assert_array_equal(found, np.round(255 * images[0]).astype(np.uint8))
    assert capsys.readouterr().out == "mine/train: float images of 0 to 1 are taken for 0 to 255\n"


def test_other_images_stay_as_they_are(capsys):
    for images in (np.full((1, 2, 2, 3), 1, np.uint8), np.full((1, 2, 2, 3), 200.4)):
        found = first_image(Arrays({"train": (images, [0])}, ["a"]))
        np.testing.assert_array_equal(found, images[0].astype(np.uint8))
    assert capsys.readouterr().out == ""
