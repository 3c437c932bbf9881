"""SavedModels: raw and encoded images, labels, checked before they take their name."""

import numpy as np
import pytest
import tensorflow as tf

from k4p1 import errors
from k4p1.data import preprocessing
from k4p1.patches.apply import apply_patches
from k4p1.patches.inference import inference_model
from k4p1.serving import saved_model

LABELS = ("left", "right", "straight on")


@pytest.fixture
def patched(small_backbone):
    return apply_patches(small_backbone, "scale_bias+depthwise+head", classes=3, image_size=16, seed=3)


@pytest.fixture
def exported(patched, tmp_path):
    path, difference = saved_model.export_task(patched.model, (16, 16), LABELS, tmp_path / "task")
    assert difference < 1e-5
    return tf.saved_model.load(str(path)), path


def picture(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def test_raw_images_of_any_size(exported, patched):
    loaded, _ = exported
    images = np.stack([picture(23, 31, seed) for seed in range(3)])
    found = loaded.signatures["serving_default"](images=tf.constant(images))
    expected = patched.model(preprocessing.resize(tf.constant(images), (16, 16)), training=False)
    np.testing.assert_allclose(found["logits"], expected, atol=1e-5)
    np.testing.assert_allclose(tf.reduce_sum(found["probabilities"], axis=-1), np.ones(3), atol=1e-6)


def test_encoded_images_of_different_sizes(exported, patched):
    loaded, _ = exported
    pictures = [picture(16, 16), picture(40, 20, 1)]
    encoded = tf.stack([tf.io.encode_png(p) for p in pictures])
    found = loaded.signatures["encoded"](encoded=encoded)["logits"]
    for row, pixels in zip(found, pictures, strict=True):
        expected = patched.model(preprocessing.resize(tf.constant(pixels), (16, 16))[None], training=False)[0]
        np.testing.assert_allclose(row, expected, atol=1e-5)


def test_labels_are_an_asset(exported):
    _, path = exported
    assert (path / "assets" / "labels.txt").read_text().splitlines() == list(LABELS)


def test_versions_count_up(patched, tmp_path):
    for version in ("1", "2"):
        path, _ = saved_model.export_task(patched.model, (16, 16), LABELS, tmp_path)
        assert path.name == version
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1", "2"]


def test_a_wrong_export_is_not_kept(patched, tmp_path, monkeypatch):
    def wrong(model):
        made = inference_model(model)
        for variable in made.model.trainable_variables:
            variable.assign(variable + 1.0)
        return made

    monkeypatch.setattr(saved_model, "inference_model", wrong)
    with pytest.raises(errors.ArtifactError, match="differs from the task model"):
        saved_model.export_task(patched.model, (16, 16), LABELS, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made(patched, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(errors.StorageError, match="a part of the path is a file"):
        saved_model.export_task(patched.model, (16, 16), LABELS, tmp_path / "file" / "task")
