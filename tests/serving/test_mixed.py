"""Batches of mixed tasks: every image gets the answer of its own task, whatever the tasks differ in."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

from k4p1 import backbones, errors
from k4p1.patches.apply import apply_patches
from k4p1.patches.patch_file import save_patch
from k4p1.serving.mixed import NO_CLASS, MixedModel
from k4p1.serving.patch_set import PatchSet
from k4p1.serving.task_tables import scale_between
from k4p1.serving.together import MIXED, TaskToServe, export_together

SPECS = {
    "scales": "scale_bias+head",
    "more_scales": "scale_bias(statistics=frozen)+head",
    "last": "head",
    "masked": "mask+scale_bias+head",
    "adapted": "parallel_adapter+scale_bias+head",
    "spatial": "depthwise+head",
    "all": "full",
}


def task(backbone, name, spec, classes, size=16):
    """A task model with private values of its own."""
    patched = apply_patches(backbone, spec, classes=classes, image_size=size, name=name)
    random = np.random.default_rng(len(name))
    for key, variable in patched.private().items():
        values = random.normal(0.0, 0.3, variable.shape)
        variable.assign(1.0 + np.abs(values) if key.endswith(("gamma", "variance")) else values)
    return patched


def pictures(count, size=16):
    return np.random.default_rng(0).integers(0, 256, (count, size, size, 3)).astype("float32")


def check(logits, patched, image):
    expected = np.asarray(patched.model(image[None]))[0]
    np.testing.assert_allclose(logits[: len(expected)], expected, atol=1e-5 * np.abs(expected).max())
    assert np.all(logits[len(expected) :] == NO_CLASS)


@pytest.fixture
def tasks(small_backbone):
    return {name: task(small_backbone, name, spec, 2 + n) for n, (name, spec) in enumerate(SPECS.items())}


def test_each_image_gets_the_answer_of_its_task(small_backbone, tasks):
    model = MixedModel(small_backbone, (16, 16))
    for name, patched in tasks.items():
        model.put(name, patched)
    names = ["all", "scales", "masked", "last", "scales", "adapted", "masked", "spatial", "more_scales"]
    images = pictures(len(names))
    answers = model(images, names)
    for name, image, logits in zip(names, images, answers, strict=True):
        check(logits, tasks[name], image)


def test_normalisation_that_stays_is_mixed_too():
    """A normalisation before a convolution, and a convolution with an activation of its own."""
    keras.utils.set_random_seed(0)
    image = keras.Input((None, None, 3))
    x = layers.BatchNormalization()(layers.Conv2D(8, 3, activation="relu")(image))
    x = layers.BatchNormalization()(layers.Conv2D(8, 1)(x) + x)
    backbone = backbones.from_model(
        keras.Model(image, layers.Dense(5, activation="tanh")(layers.GlobalAveragePooling2D()(x)))
    )
    model = MixedModel(backbone, (16, 16))
    made = {name: task(backbone, name, "scale_bias+head", 3) for name in ("a", "bb", "ccc")}
    for name, patched in made.items():
        model.put(name, patched)
    images = pictures(3)
    for name, picture, logits in zip(made, images, model(images, list(made)), strict=True):
        check(logits[:3], made[name], picture)


def test_tasks_that_come_and_go_change_tables_and_not_the_graph(small_backbone):
    model = MixedModel(small_backbone, (16, 16))
    made = {f"t{n}": task(small_backbone, "t" * n, "scale_bias+head", 4) for n in range(1, 5)}
    for name in ("t1", "t2", "t3"):
        model.put(name, made[name])
    images = pictures(2)
    model(images, ["t1", "t2"])
    function = model._function
    model.delete("t1")
    model.put("t4", made["t4"])
    model.put("t2", made["t3"])  # replaced
    answers = model(images, ["t4", "t2"])
    check(answers[0], made["t4"], images[0])
    check(answers[1], made["t3"], images[1])
    assert model._function is function and function.experimental_get_tracing_count() == 1
    with pytest.raises(errors.ConfigError, match="unknown task of this model 't1'; did you mean 't"):
        model(images, ["t1", "t2"])


def test_a_task_of_vectors_takes_the_memory_of_its_vectors(small_backbone):
    model = MixedModel(small_backbone, (16, 16))
    patched = task(small_backbone, "t", "scale_bias+head", 4)
    for number in range(64):
        model.put(str(number), patched)
    vectors = 2 * (6 + 6 + 8) + (8 + 1) * 4  # scale and bias of three layers, kernel and bias of the head
    slots = 3
    assert model.resident_bytes == 64 * 4 * (vectors + slots)


def test_what_cannot_be_mixed_is_refused_and_nothing_changes(small_backbone, tasks):
    model = MixedModel(small_backbone, (16, 16))
    model.put("scales", tasks["scales"])
    with pytest.raises(errors.ConfigError, match=r"has images of \(20, 20\); this model has \(16, 16\)"):
        model.put("large", task(small_backbone, "large", "head", 3, size=20))
    assert model.tasks == ["scales"]


@pytest.mark.parametrize("changed", [0.0, 1e-3])
def test_only_a_factor_per_channel_counts_as_a_scale(small_backbone, changed):
    layer = small_backbone.model.get_layer("stem")
    shared = np.asarray(layer.kernel, np.float64)
    scale = np.linspace(-1.0, 2.0, shared.shape[-1])
    kernel = shared * scale
    kernel[0, 0, 0, 0] += changed
    found = scale_between(layer, shared, kernel)
    assert found is None if changed else np.allclose(found, scale)


def test_a_set_of_patches_answers_mixed_batches(small_backbone, tasks, tmp_path):
    patches = PatchSet(small_backbone)
    sizes = {"scales": 16, "masked": 16, "small": 12}
    made = {**tasks, "small": task(small_backbone, "small", "scale_bias+head", 3, size=12)}
    for name in sizes:
        labels = [str(n) for n in range(made[name].model.output.shape[-1])]
        save_patch(tmp_path / name, made[name], small_backbone, task=name, labels=labels)
        patches.add(tmp_path / name)
    names = ["small", "masked", "scales", "small"]
    images = [pictures(1, sizes[name])[0] for name in names]
    for name, image, logits in zip(names, images, patches.mixed(images, names), strict=True):
        assert len(logits) == made[name].model.output.shape[-1]
        np.testing.assert_allclose(logits, made[name].model(image[None])[0], atol=1e-5)
    patches.delete("masked")
    with pytest.raises(errors.ConfigError, match="unknown task of this set 'masked'"):
        patches.mixed(images, names)
    with pytest.raises(errors.ConfigError, match=r"image 0 is \(12, 12, 3\); task 'scales' expects \(16, 16, 3\)"):
        patches.mixed(images[:1], ["scales"])
    with pytest.raises(errors.ConfigError, match="4 images and 1 task names"):
        patches.mixed(images, ["scales"])


@pytest.mark.slow
def test_one_saved_model_of_all_tasks(small_backbone, tasks, tmp_path):
    chosen = {name: tasks[name] for name in ("scales", "masked")}
    chosen["small"] = task(small_backbone, "small", "scale_bias+head", 3, size=12)
    models = {}
    for name, patched in chosen.items():
        size = patched.image_size
        models.setdefault(size, MixedModel(small_backbone, size)).put(name, patched)
    classes = {name: patched.model.output.shape[-1] for name, patched in chosen.items()}
    served = {n: TaskToServe(p, tuple(f"{n} {c}" for c in range(classes[n]))) for n, p in chosen.items()}
    path, difference = export_together(served, list(models.values()), tmp_path / "all")
    assert difference < 1e-5 and path == tmp_path / "all" / "1"
    loaded = tf.saved_model.load(str(path))
    assert set(loaded.signatures) == {*chosen, MIXED, "mixed_encoded"}
    images = tf.cast(pictures(3, 20), tf.uint8)
    names = ["small", "masked", "scales"]
    mixed = loaded.signatures[MIXED](images=images, task=tf.constant(names))
    encoded = tf.stack([tf.io.encode_png(image) for image in images])
    again = loaded.signatures["mixed_encoded"](encoded=encoded, task=tf.constant(names))
    for number, name in enumerate(names):
        alone = loaded.signatures[name](images=images[number : number + 1])
        for answer in ("logits", "probabilities"):
            row = mixed[answer][number].numpy()
            np.testing.assert_allclose(row[: classes[name]], alone[answer][0], atol=1e-5)
            np.testing.assert_allclose(again[answer][number], row, atol=1e-5)
        labels = [label.decode() for label in mixed["labels"][number].numpy()]
        assert labels[: classes[name]] == list(served[name].labels) and set(labels[classes[name] :]) <= {""}
    with pytest.raises(tf.errors.InvalidArgumentError, match="unknown task"):
        loaded.signatures[MIXED](images=images, task=tf.constant(["small", "maskd", "scales"]))
