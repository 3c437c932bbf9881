"""Networks that users bring: what they train is saved, loads and computes the same."""

import keras
import numpy as np
import pytest

import k4p1
from k4p1 import backbones, errors
from k4p1.patches.costs import multiply_adds
from k4p1.patches.patch_file import load_patch, save_patch

pytestmark = pytest.mark.slow

layers = keras.layers
IMAGES = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3)).astype("float32")


def backbone(body, shape=(None, None, 3), **options):
    keras.utils.set_random_seed(0)
    image = keras.Input(shape)
    x = body(image)
    x = layers.GlobalAveragePooling2D()(x) if len(x.shape) == 4 else x
    return backbones.from_model(keras.Model(image, x), scaling="unit", **options)


def convolution(x, channels=8):
    return layers.BatchNormalization()(layers.Conv2D(channels, 3)(x))


def attention(x):
    x = layers.Reshape((64, 8))(layers.Conv2D(8, 4, strides=4)(x))
    return layers.GlobalAveragePooling1D()(layers.MultiHeadAttention(2, 4)(x, x))


def finetuned(network, folder, **changes):
    how = {"image_size": 32, "batch_size": 8, "steps": 2, "patch": "scale_bias+head", "validation_fraction": 0}
    task = k4p1.Task(name="t", data="embedded/digits", **{**how, **changes})
    return k4p1.finetune(backbone=network, task=task, model_dir=folder, quiet=True, recalibration_batches=1)


NETWORKS = {
    "an inner Sequential of open size": lambda: backbone(
        lambda i: keras.Sequential([layers.Conv2D(8, 3), layers.BatchNormalization()])(i)
    ),
    "an inner model after augmentation": lambda: backbone(
        lambda i: keras.Sequential([layers.RandomFlip(), layers.Conv2D(4, 3), layers.BatchNormalization()])(
            layers.Rescaling(2.0)(i)
        )
    ),
    "numpy numbers in arguments": lambda: backbone(
        lambda i: layers.ReLU(max_value=np.float32(6))(convolution(i, np.int64(8)))
    ),
    "an adapted Normalization": lambda: backbone(lambda i: convolution(layers.Normalization()(i))),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_what_a_run_leaves_loads_and_computes_the_same(name, tmp_path):
    result = finetuned(NETWORKS[name](), tmp_path)
    expected = np.array(result.models["t"].model(IMAGES, training=False))  # RandomFlip is in training mode unless told
    np.testing.assert_allclose(k4p1.load_task(tmp_path, "t")(IMAGES, training=False), expected, atol=1e-5)
    assert result.summary["tasks"]["t"]["multiply_adds"] > 0
    assert k4p1.evaluate(tmp_path, "t")["t"]["accuracy"] == pytest.approx(result.summary["tasks"]["t"]["test_accuracy"])


def test_a_users_model_survives_load_and_save(tmp_path):
    k4p1.save_backbone(backbone(convolution), tmp_path / "one.safetensors")
    loaded = k4p1.load_backbone(tmp_path / "one.safetensors")
    k4p1.save_backbone(loaded, tmp_path / "two.safetensors")
    assert k4p1.load_backbone(tmp_path / "two.safetensors").fingerprint() == loaded.fingerprint()
    finetuned(loaded, tmp_path / "run")
    assert k4p1.evaluate(tmp_path / "run")["t"]["examples"] > 0


def test_variables_of_one_name_in_a_layer_are_told_apart(tmp_path):
    network = backbone(attention, (32, 32, 3))
    patched = k4p1.apply_patches(network, "full", classes=2, image_size=32)
    owned = patched.owned()
    assert len({p.key for p in owned}) == len(owned) == 12
    random = np.random.default_rng(1)
    for parameter in owned:
        parameter.variable.assign(random.normal(0.0, 0.5, parameter.variable.shape))
    save_patch(tmp_path / "p", patched, network, task="t", labels=("a", "b"))
    np.testing.assert_array_equal(load_patch(tmp_path / "p", network).model(IMAGES), patched.model(IMAGES))
    finetuned(network, tmp_path / "run", patch="head")


def test_each_call_of_an_inner_model_counts():
    inner_image = keras.Input((None, None, 3))
    inner = keras.Model(inner_image, layers.Conv2D(3, 3, padding="same", name="c")(inner_image), name="inner")
    once = k4p1.apply_patches(backbone(lambda i: inner(i)), "head", classes=2, image_size=32)
    twice = k4p1.apply_patches(backbone(lambda i: inner(inner(i))), "head", classes=2, image_size=32)
    head = 2 * 3
    assert multiply_adds(once.model) == 32 * 32 * 81 + head
    assert multiply_adds(twice.model) == 2 * 32 * 32 * 81 + head


def test_statistics_that_never_move_are_not_measured():
    network = backbone(lambda i: layers.BatchNormalization(momentum=1.0)(layers.Conv2D(8, 3)(i)))
    task = k4p1.Task(name="t", data="embedded/digits", image_size=32, batch_size=8, patch="head", steps=2)
    result = k4p1.train(backbone=network, tasks=[task], quiet=True, recalibration_batches=1)
    assert np.isfinite(result.summary["tasks"]["t"]["test_loss"])


def test_a_backbone_file_cannot_ask_for_weights(monkeypatch):
    from k4p1.backbones import build

    asked = []
    monkeypatch.setattr(build, "application", lambda **arguments: asked.append(arguments))
    build.from_config("x", {"network": "MobileNetV2", "weights": "imagenet", "width": 0.35}, "symmetric")
    assert asked == [{"network": "MobileNetV2", "width": 0.35}]


@pytest.mark.parametrize(
    ("weights", "message"),
    [({"x": 2.0, "y": -3.0}, "would hold a negative variance"), ({"x": float("nan")}, "expected a finite number")],
)
def test_weights_of_a_combination_that_make_no_sense(weights, message, tmp_path):
    network = backbone(convolution)
    patches = k4p1.PatchSet(network)
    for name in "xy":
        patched = k4p1.apply_patches(network, "scale_bias+head", classes=2, image_size=32)
        save_patch(tmp_path / name, patched, network, task=name, labels=("a", "b"))
        patches.add(tmp_path / name)
    with pytest.raises(errors.PatchError, match=message):
        patches.combine("z", weights)
    assert patches.names == ["x", "y"]


def test_labels_are_shown_as_they_are(capsys):
    from k4p1.runs import tables

    tables.print_rows("[/x] title", ("image", "label"), [("[a].png", "[cat] 0.9")])
    shown = capsys.readouterr().out
    assert "[cat] 0.9" in shown and "[a].png" in shown and "[/x] title" in shown


def test_export_after_mixed_precision_under_another_policy(tmp_path):
    from k4p1.serving.export import export

    how = {"image_size": 32, "batch_size": 8, "steps": 20, "patch": "series_adapter+head"}
    task = k4p1.Task(name="t", data="embedded/digits", **how)
    k4p1.finetune(
        backbone=lambda: backbone(convolution), task=task, model_dir=tmp_path / "run", quiet=True, precision="mixed_bfloat16"
    )
    keras.config.set_dtype_policy("float32")  # what a new process has
    _, difference = export(tmp_path / "run", tmp_path / "served")["t"]
    assert difference < 0.5
