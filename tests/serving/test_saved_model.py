"""SavedModels: raw and encoded images, labels, checked before they take their name."""

import io
import os

import keras
import numpy as np
import pytest
import tensorflow as tf
from PIL import Image, ImageOps
from tensorflow.core.protobuf import saved_model_pb2

from k4p1 import backbones, errors
from k4p1.data import preprocessing
from k4p1.patches.apply import apply_patches
from k4p1.patches.inference import inference_model
from k4p1.patches.patch_file import load_patch, save_patch
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


def turned(pixels, number):
    """JPEG bytes of an image that a camera stored in another orientation, and the pixels as they are meant to be shown."""
    exif = Image.Exif()
    exif[0x0112] = number
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", exif=exif)
    return buffer.getvalue(), np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(buffer.getvalue()))))


def test_encoded_images_are_turned_as_in_training(exported, patched):
    loaded, _ = exported
    smooth = np.stack(np.meshgrid(np.arange(40) * 6, np.arange(24) * 10), axis=-1)
    smooth = np.concatenate([smooth, smooth[..., :1] // 2], axis=-1).astype(np.uint8)
    encoded, shown = zip(*(turned(smooth, number) for number in (1, 6, 8, 3)), strict=True)
    found = loaded.signatures["encoded"](encoded=tf.constant(encoded))["logits"].numpy()
    for row, content, pixels in zip(found, encoded, shown, strict=True):
        trained_on = preprocessing.resize(preprocessing.decode(tf.constant(content)), (16, 16))
        np.testing.assert_allclose(row, patched.model(trained_on[None], training=False)[0], atol=1e-5)
        assert np.abs(trained_on.numpy().astype(int) - preprocessing.resize(pixels, (16, 16)).numpy()).max() <= 4
    assert np.abs(found[0] - found[1]).max() > 1e-3


def test_both_signatures_call_one_graph_of_the_network(exported):
    _, path = exported
    graph = saved_model_pb2.SavedModel.FromString((path / "saved_model.pb").read_bytes()).meta_graphs[0].graph_def
    functions = {f.signature.name: [node.op for node in f.node_def] for f in graph.library.function}
    depthwise = [name for name, ops in functions.items() if any("Depthwise" in op for op in ops)]
    assert len(depthwise) == 1, depthwise
    assert not any("Depthwise" in node.op for node in graph.node)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (("a", "b"), r"2 labels \(a, b\) for a task model of 3 classes; give one label per class"),
        ((), "labels are (); expected a sequence of names".replace("()", r"\(\)")),
        ("abc", "labels are 'abc'; expected a sequence of names"),
        (("a", "b", "c\nd"), "a label has several lines"),
    ],
)
def test_labels_that_do_not_match_are_refused(labels, message, patched, tmp_path):
    with pytest.raises(errors.ConfigError, match=message):
        saved_model.export_task(patched.model, (16, 16), labels, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_permissions_are_those_of_the_umask(patched, tmp_path):
    before = os.umask(0o027)
    try:
        path, _ = saved_model.export_task(patched.model, (16, 16), LABELS, tmp_path / "task")
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o750


@pytest.mark.parametrize("precision", ["mixed_float16", "mixed_bfloat16"])
@pytest.mark.parametrize("spec", ["series_adapter(layers=stem)+parallel_adapter(layers=mix)+head", "lora+head", "mask+head"])
@pytest.mark.slow
def test_after_mixed_precision_under_another_policy(spec, precision, tmp_path):
    """What a new process has: files of a run in half precision, and float32 as the policy."""
    keras.config.set_dtype_policy(precision)
    image = keras.Input((None, None, 3))
    x = keras.layers.BatchNormalization(name="bn")(keras.layers.Conv2D(8, 3, name="stem")(image))
    x = keras.layers.Conv2D(8, 1, activation="relu", name="mix")(x)
    backbone = backbones.from_model(keras.Model(image, x), name="half", scaling="unit")
    trained = apply_patches(backbone, spec, classes=3, image_size=16)
    random = np.random.default_rng(0)
    for variable in trained.private().values():
        values = random.normal(0.0, 0.5, variable.shape)
        variable.assign(1.0 + np.abs(values) if variable.name == "moving_variance" else values)
    backbones.save(backbone, tmp_path / "backbone")
    save_patch(tmp_path / "patch", trained, backbone, task="t", labels=LABELS)
    keras.config.set_dtype_policy("float32")
    loaded = load_patch(tmp_path / "patch", backbones.load(tmp_path / "backbone"))
    path, _ = saved_model.export_task(loaded.model, loaded.image_size, LABELS, tmp_path / "served")
    assert path.is_dir()
