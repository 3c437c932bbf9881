"""Augmentations as functions of image and seed, and their specs."""

import numpy as np
import pytest
import tensorflow as tf

from k4p1 import errors
from k4p1.data import augment

SIZE = 12


@pytest.fixture(scope="module")
def image():
    return tf.constant(np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3)), tf.uint8)


def seed(number):
    return tf.constant([5, number], tf.int64)


def variants(function, image, count=24):
    return [function(image, seed(i)).numpy() for i in range(count)]


@pytest.mark.parametrize("text", ["flip", "shift(pixels=3)", "crop(area=0.3)", "brightness(delta=0.4)"])
def test_equal_seeds_give_equal_images_and_others_differ(text, image):
    before, after = augment.parse(text)
    (function,) = before + after
    for one, other in zip(variants(function, image), variants(function, image), strict=True):
        np.testing.assert_array_equal(one, other)
    assert len({changed.tobytes() for changed in variants(function, image)}) > 1
    assert function(image, seed(0)).dtype == tf.uint8


def test_flip_mirrors_left_to_right_or_not_at_all(image):
    shown = {changed.tobytes() for changed in variants(augment.flip, image)}
    assert shown == {image.numpy().tobytes(), image.numpy()[:, ::-1].tobytes()}


def test_shift_moves_by_at_most_the_given_pixels(image):
    padded = np.pad(image.numpy(), ((2, 2), (2, 2), (0, 0)), "reflect")
    allowed = {padded[y : y + SIZE, x : x + SIZE].tobytes() for y in range(5) for x in range(5)}
    shown = {changed.tobytes() for changed in variants(lambda i, s: augment.shift(i, s, pixels=2), image, 60)}
    assert shown <= allowed
    assert len(shown) > 10


def test_crop_cuts_a_box_of_at_least_the_given_area(image):
    whole = image.numpy()
    for changed in variants(lambda i, s: augment.crop(i, s, area=0.4), image):
        height, width, _ = changed.shape
        assert height * width >= 0.4 * SIZE * SIZE * 0.8  # whole pixels
        corners = np.argwhere((whole == changed[0, 0]).all(-1))
        assert any(np.array_equal(whole[y : y + height, x : x + width], changed) for y, x in corners)


def test_brightness_adds_one_amount_within_delta():
    grey = tf.fill([4, 4, 3], tf.constant(128, tf.uint8))
    shown = np.stack(variants(lambda i, s: augment.brightness(i, s, delta=0.2), grey)).astype(int)
    assert (shown == shown[:, :1, :1, :1]).all()
    assert 0 < np.abs(shown - 128).max() <= 51


def test_brightness_stays_in_range():
    light = tf.fill([2, 2, 3], tf.constant(250, tf.uint8))
    shown = np.stack(variants(lambda i, s: augment.brightness(i, s, delta=0.9), light)).astype(int)
    assert shown.max() == 255
    assert not ((shown > 5) & (shown < 20)).any()  # 250 + more wraps to small values if it is not cut off


def test_crops_come_before_resizing_and_the_others_after():
    before, after = augment.parse("flip+crop(area=0.3)+shift")
    assert (len(before), len(after)) == (1, 2)


@pytest.mark.parametrize("text", ["", "  "])
def test_empty_text_is_none(text):
    assert augment.parse(text) == ([], [])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("flop", "unknown augmentation 'flop'; did you mean 'flip'"),
        ("shift(pixel=3)", "unknown option of augmentation 'shift' 'pixel'; did you mean 'pixels'"),
        ("flip(pixels=3)", "unknown option of augmentation 'flip' 'pixels'; Known: none"),
        ("shift(pixels=many)", r"shift\(pixels=many\): expected a whole number"),
        ("shift(pixels=0)", r"shift\(pixels=0\): expected a positive number"),
        ("brightness(delta=-1)", "expected a positive number"),
        ("shift(pixels)", "augmentation: cannot read option 'pixels'"),
        ("flip++shift", "augmentation: cannot read ''"),
        ("shift(pixels=1,pixels=2)", "given twice"),
    ],
)
def test_bad_specs(text, message):
    with pytest.raises(errors.ConfigError, match=message):
        augment.parse(text)
