"""What a user of Keras writes around a run: callbacks, patience, history, looking, longer runs, interrupted ones."""

import dataclasses
import json
import os
import signal

import keras
import numpy as np
import pytest
import tensorflow as tf

import k4p1
from k4p1 import errors
from k4p1.data import Pipeline, Splits, python_data
from k4p1.engine.bookkeeping import StepReport
from k4p1.runs import callbacks, confusion_matrix, linear_probe
from tests.conftest import small_model

pytestmark = pytest.mark.slow

RANDOM = np.random.default_rng(0)
LABELS = np.arange(60) % 3
IMAGES = RANDOM.integers(0, 150, (60, 16, 16, 3))
IMAGES[np.arange(60), :, :, LABELS] += 100
IMAGES = IMAGES.astype(np.uint8)
DATA = {
    "train": (IMAGES[:40], LABELS[:40]),
    "validation": (IMAGES[40:50], LABELS[40:50]),
    "test": (IMAGES[50:], LABELS[50:]),
}


def backbone():
    return k4p1.backbone_from_model(small_model(), name="small", scaling="symmetric")


def task(**settings):
    return k4p1.Task(**{"name": "a", "data": DATA, "image_size": 16, "batch_size": 8, **settings})


def finetune(**settings):
    return k4p1.finetune(**{"backbone": backbone, "task": task(), "quiet": True, "recalibration_batches": 2, **settings})


class Diary(keras.callbacks.Callback):
    """Writes down what is called."""

    def __init__(self, stop_in=None):
        super().__init__()
        self.lines, self.logs, self.values, self._stop_in = [], [], [], stop_in

    def on_train_begin(self, logs=None):
        self.lines.append("begin")

    def on_epoch_begin(self, epoch, logs=None):
        self.lines.append(f"epoch {epoch}")

    def on_train_batch_end(self, batch, logs=None):
        assert set(logs) == {"loss"}
        self.lines.append(f"batch {batch}")

    def on_epoch_end(self, epoch, logs=None):
        self.lines.append(f"end {epoch}")
        self.logs.append(logs)
        self.values.append(self.model.get_layer("head").get_weights()[0])
        self.model.stop_training = epoch == self._stop_in

    def on_train_end(self, logs=None):
        self.lines.append("end")


@pytest.mark.parametrize("patch", ["head", "scale_bias+head"])
def test_callbacks_are_called_as_fit_calls_them(patch):
    ours, theirs = Diary(), Diary()
    result = finetune(task=task(patch=patch), epochs=2, callbacks=[ours])
    model = keras.Sequential([keras.layers.Flatten(), keras.layers.Dense(3, name="head")])
    model.compile(loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    model.fit(IMAGES[:40], LABELS[:40], batch_size=8, epochs=2, callbacks=[theirs], verbose=0)
    assert ours.lines == theirs.lines
    assert set(ours.logs[0]) == {"loss", "val_accuracy", "val_loss"}
    history = result.history["a"]
    assert history["step"] == [5, 10]
    assert history["loss"] == pytest.approx([logs["loss"] for logs in ours.logs])
    assert history["validation_accuracy"] == [logs["val_accuracy"] for logs in ours.logs]
    assert np.abs(ours.values[1] - ours.values[0]).max() > 0  # the model has the values of the moment


def test_a_callback_stops_its_task(capsys):
    diary = Diary(stop_in=1)
    result = finetune(epochs=50, callbacks={"a": [diary]}, quiet=False)
    assert diary.lines[-2:] == ["end 1", "end"]
    assert result.summary["tasks"]["a"]["steps"] == 10
    assert "stopped at a 10/250: a callback asked to" in capsys.readouterr().err


def test_keras_early_stopping_stops():
    early = keras.callbacks.EarlyStopping("val_accuracy", mode="max", patience=2, min_delta=2.0)  # nothing is better by 200%
    assert finetune(epochs=50, callbacks=[early]).summary["tasks"]["a"]["steps"] == 15


def nothing(labels, logits):
    return tf.zeros_like(logits[:, 0])


def test_patience_ends_a_run_that_gets_no_better(tmp_path, capsys):
    how = {"steps": 400, "evaluate_every": 4, "patience": 3, "model_dir": tmp_path, "quiet": False}
    for _ in range(2):  # started again, it sees at once that it has waited long enough
        result = finetune(task=task(metrics=(nothing, "accuracy")), **how)
        assert result.summary["tasks"]["a"]["steps"] == 16 == result.history["a"]["step"][-1]
        assert "stopped at a 16/400: no better state in 3 evaluations" in capsys.readouterr().err
    assert result.summary["tasks"]["a"]["metric"] == "nothing"


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"callbacks": {"b": [Diary()]}}, "unknown task of callbacks 'b'"),
        ({"callbacks": [3]}, "3 is no keras.callbacks.Callback"),
        ({"callbacks": [Diary()], "task": None, "tasks": [task(), task(name="b")]}, "callbacks belong to one task each"),
        ({"steps": 1, "epochs": 1}, "a run has steps or epochs"),
        ({"stpes": 1}, "did you mean 'steps'?"),
        ({"optimizer": "adm"}, "did you mean 'adam'?"),
    ],
)
def test_mistakes(settings, says):
    with pytest.raises(errors.ConfigError) as caught:
        finetune(**settings)
    assert says in str(caught.value) and "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    return folder, finetune(epochs=4, learning_rate=3e-2, model_dir=folder)


def test_looking_at_a_result(finished):
    folder, result = finished
    assert "validation" in result.table() and result.table() == repr(result)
    assert result._repr_html_().startswith("<table>") and "</table>" in result._repr_html_()
    for shown in (result.models["a"], result.backbone):
        assert len(repr(shown)) < 200 and shown._repr_html_().startswith("<code>")
    model = k4p1.load_task(folder)
    assert model.labels == ("0", "1", "2")
    np.testing.assert_allclose(model(IMAGES[:4]), result.models["a"].model(IMAGES[:4]), atol=1e-5)
    assert k4p1.load_backbone(folder).fingerprint() == result.backbone.fingerprint()


def test_the_data_of_a_run(finished):
    folder, _ = finished
    images, labels = (np.concatenate(column) for column in zip(*k4p1.dataset(folder, split="test", data=DATA), strict=True))
    np.testing.assert_array_equal(images, IMAGES[50:])
    np.testing.assert_array_equal(labels, LABELS[50:])
    with pytest.raises(errors.ConfigError, match="give its data again"):
        k4p1.dataset(folder)


def test_predictions_of_arrays_and_paths(finished, tmp_path):
    folder, result = finished
    (tmp_path / "image.png").write_bytes(tf.io.encode_png(IMAGES[0]).numpy())
    found = k4p1.predict(folder, images=[tmp_path / "image.png", IMAGES[0]], top=3)
    assert [where for where, _ in found] == [str(tmp_path / "image.png"), "1"]
    assert found[0][1] == found[1][1]
    probabilities = dict(found[0][1])
    expected = np.array(tf.nn.softmax(result.models["a"].model(IMAGES[:1])))[0]
    assert [probabilities[label] for label in "012"] == pytest.approx(list(expected), rel=1e-4)
    for bad, says in ((np.zeros((4, 4)), "image 0 is (4, 4)"), (IMAGES[0] * 2.0 + 100, "expected 0 to 255")):
        with pytest.raises(errors.DataError, match=says.replace("(", r"\(").replace(")", r"\)")):
            k4p1.predict(folder, images=[bad])


def test_confusion_counts_every_image_once_and_is_drawn(finished):
    folder, result = finished
    found = k4p1.evaluate(folder, data=DATA, confusion=True)["a"]
    counts = found["confusion"]
    answers = np.argmax(result.models["a"].model(IMAGES[50:]), axis=-1)
    expected = np.zeros((3, 3), int)
    np.add.at(expected, (LABELS[50:], answers), 1)
    np.testing.assert_array_equal(counts, expected)
    assert found["accuracy"] == pytest.approx(np.trace(counts) / counts.sum())
    assert (folder / "tasks" / "a" / "confusion_test.png").read_bytes()[1:4] == b"PNG"
    assert found["confusion_picture"].endswith("confusion_test.png")


def test_the_most_frequent_mistakes_come_first():
    counts = np.array([[5, 1, 4], [0, 2, 2], [0, 0, 3]])
    found = list(confusion_matrix.worst(counts, "abc", most=2))
    assert found == [("b", "c", 2, 0.5), ("a", "c", 4, 0.4)]


def test_steps_may_grow(tmp_path, capsys):
    first = finetune(steps=10, model_dir=tmp_path)
    hash_before = json.loads((tmp_path / "run.json").read_text())["config_hash"]
    longer = finetune(steps=20, model_dir=tmp_path)
    out = capsys.readouterr().out
    assert "goes on, a from 10 to 20 steps; its learning rates are now those of the longer run" in out
    record = json.loads((tmp_path / "run.json").read_text())
    assert record["config_hash"] == hash_before and record["config"]["tasks"][0]["steps"] == 20
    steps = longer.history["a"]["step"]
    assert steps == sorted(set(steps)) and steps[-1] == 20 and set(first.history["a"]["step"]) < set(steps)
    finetune(steps=20, model_dir=tmp_path)  # as often as one likes
    for other in ({"steps": 15}, {"steps": 30, "seed": 1}):
        with pytest.raises(errors.ConfigError, match="another configuration"):
            finetune(model_dir=tmp_path, **other)


class Interrupting(keras.callbacks.Callback):
    """Presses Ctrl-C."""

    def on_train_batch_end(self, batch, logs=None):
        if batch == 2:
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("method", ["finetune", "train"])
def test_an_interrupted_run_is_a_keyboard_interrupt_whose_state_opens(method, tmp_path):
    settings = {"backbone": backbone, "steps": 40, "quiet": True, "learning_rate": 1e-2, "model_dir": tmp_path}
    with pytest.raises(KeyboardInterrupt, match="saved at step 3") as caught:
        getattr(k4p1, method)(tasks=[task()], callbacks=[Interrupting()], **settings)
    assert isinstance(caught.value, errors.Interrupted)
    with pytest.raises(errors.ArtifactError, match="holds no finished task"):
        k4p1.load_task(tmp_path)
    model = k4p1.load_task(tmp_path, checkpoint="newest")
    assert model.labels == ("0", "1", "2")
    start = k4p1.apply_patches(backbone(), "scale_bias+head", classes=3, image_size=16).model
    assert np.abs(np.asarray(model(IMAGES[:4])) - np.asarray(start(IMAGES[:4]))).max() > 1e-4
    finished = getattr(k4p1, method)(tasks=[task()], **settings)
    assert finished.summary["tasks"]["a"]["steps"] == 40
    assert not (tmp_path / "checkpoints" / "backbone.safetensors").exists()
    newest = k4p1.load_task(tmp_path, "a", checkpoint="newest")
    assert np.isfinite(np.asarray(newest(IMAGES[:4]))).all()
    with pytest.raises(errors.ConfigError, match="did you mean 'newest'"):
        k4p1.load_task(tmp_path, checkpoint="nwest")


def test_a_linear_probe_that_is_ahead_is_told_of(capsys, monkeypatch):
    accuracies = iter([0.99, 0.0])
    monkeypatch.setattr(linear_probe, "validation_accuracy", lambda *_: next(accuracies))
    finetune(steps=1, learning_rate=1e-9, quiet=False, linear_probe=True)
    assert "a linear classifier on the frozen backbone's features reaches a validation accuracy of 0.990" in (
        capsys.readouterr().out
    )
    finetune(steps=1, quiet=False, linear_probe=True)
    assert "linear classifier" not in capsys.readouterr().out
    finetune(steps=1, quiet=False, linear_probe=False)
    assert "linear classifier" not in capsys.readouterr().out


def test_the_linear_probe_is_a_classifier_on_features():
    source = python_data.as_source(DATA)
    pipeline = Pipeline(source, Splits(source), (16, 16), 8, 3)
    assert linear_probe.validation_accuracy(backbone(), pipeline, (16, 16)) >= 0.8


def test_patch_sets_are_mappings(finished, tmp_path):
    folder, result = finished
    patches = k4p1.PatchSet.of_run(folder)
    assert len(patches) == 1 and list(patches) == ["a"] and "a" in patches and "b" not in patches
    assert patches["a"] is patches.model("a") and dict(patches.items()) == {"a": patches["a"]}
    with pytest.raises(KeyError, match="unknown task of this set 'b'; Known: a"):
        patches["b"]
    assert patches.get("b") is None
    assert repr(patches) == "PatchSet(1 tasks on 'small': a)" and "scale_bias+head" in patches._repr_html_()
    big = keras.ops.image.resize(IMAGES[1].astype("float32"), (20, 20))
    answers = patches.predict([("a", IMAGES[0]), ("a", np.asarray(big))], top=1)
    assert answers[0][0][0] == str(int(np.argmax(result.models["a"].model(IMAGES[:1]))))
    assert [len(one) for one in answers] == [1, 1]
    del patches["a"]
    assert list(patches) == []


def test_reports_of_several_steps_as_a_cluster_gives_them_end_epochs():
    diary = Diary()
    patched = k4p1.apply_patches(backbone(), "head", classes=3, image_size=16)
    calls = callbacks.TaskCallbacks("a", [diary], patched.model, steps=10, steps_per_epoch=5, refresh=None)
    calls.resumed({"a": 0})
    for count, other in ((2, "a"), (2, "b"), (2, "a"), (3, "a"), (3, "a")):
        calls.steps({}, [StepReport(other, 0, 1.0, 8.0, 0.0, worker=0, count=count)])
        calls.evaluated("validation", other, 0, {"accuracy": 0.5, "examples": 8.0})
    calls.ended({})
    assert diary.lines == [
        *("begin", "epoch 0", "batch 0", "batch 2", "batch 4"),
        *("end 0", "epoch 1", "batch 2", "end 1", "end"),
    ]
    assert diary.logs == [{"loss": 1.0, "val_accuracy": 0.5}] * 2


def test_what_a_callback_sees_is_what_its_logs_measured():
    found = []

    class Measuring(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            answers = np.argmax(self.model(IMAGES[40:50], training=False), axis=-1)
            found.append((float(np.mean(answers == LABELS[40:50])), logs["val_accuracy"]))

    finetune(epochs=3, learning_rate=3e-2, callbacks=[Measuring()])
    assert len(found) == 3 and all(ours == pytest.approx(theirs) for ours, theirs in found)


def test_an_interruption_in_a_callback_saves_the_steps_taken(tmp_path):
    class Interrupted(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            if epoch == 1:
                os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt, match="saved at step 10"):
        finetune(steps=4000, callbacks=[Interrupted()], model_dir=tmp_path)
    assert k4p1.load_task(tmp_path, checkpoint="newest").labels == ("0", "1", "2")


def test_float_images_of_0_to_1_are_predicted_as_they_are_trained(finished):
    folder, _ = finished
    whole, unit = (k4p1.predict(folder, images=list(images)) for images in (IMAGES[:4], IMAGES[:4] / 255.0))
    assert [one[1][0][0] for one in whole] == [one[1][0][0] for one in unit]
    patches = k4p1.PatchSet.of_run(folder)
    assert patches.predict([("a", IMAGES[0] / 255.0)])[0][0][0] == whole[0][1][0][0]


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: finetune(task=task(loss=lambda y, z: tf.reduce_mean(z)), steps=1), "expected one value per example"),
        (lambda: finetune(task=task(loss=lambda y: y), steps=1), "loss lambda fails on (labels, logits)"),
        (lambda: finetune(task=task(metrics=(lambda y, z: 1 / 0,)), steps=1), "fails on (labels, logits): division by zero"),
        (lambda: task(metrics=("accuracy", keras.metrics.AUC)), "metric AUC is a class; give one of it: AUC(...)"),
        (lambda: task(loss=keras.losses.MeanSquaredError), "is a class; give one of it"),
        (lambda: finetune(task=task(augment=lambda image: image / 255.0), steps=1), "fails on an image (16, 16, 3) uint8"),
        (lambda: finetune(task=task(augment=lambda image: image[:8]), steps=1), "gives an image (8, 16, 3); expected"),
        (lambda: finetune(task=task(metrics=(keras.metrics.F1Score(),)), steps=1), "gives 3 values; expected one number"),
        (lambda: finetune(task=task(data=DATA, validation_fraction=0.0), steps=1, patience=2), "patience: no task has a"),
        (lambda: task(class_weight="balanced"), "class_weight='balanced'; expected {label: weight}"),
        (lambda: finetune(steps=1, callbacks=[keras.callbacks.ReduceLROnPlateau()]), "ReduceLROnPlateau cannot be used"),
        (lambda: k4p1.train(backbone=backbone, tasks={"a": task()}, steps=1), "tasks: expected a list of Task(...)"),
        (lambda: k4p1.apply_patches(small_model(), "head", classes=2, image_size=16), "expected a Backbone"),
        (lambda: k4p1.PatchSet("runs"), "PatchSet.of_run(MODEL_DIR)"),
        (lambda: k4p1.save_backbone("a.safetensors", backbone()), "the first argument is a str"),
        (lambda: k4p1.predict("runs", ["a.png"]), "task is a list; expected a name"),
        (lambda: k4p1.load_patch(backbone(), "a.safetensors"), "expected the path of a patch file and a Backbone"),
        (lambda: k4p1.application("MobileNet", include_top=True), "a backbone ends before the classifier"),
        (lambda: k4p1.PatchSet(backbone())(IMAGES, "a"), "the task is a ndarray; expected (name, images)"),
        (lambda: k4p1.PatchSet(backbone()).predict(IMAGES), "number 0 is a ndarray"),
        (lambda: k4p1.PatchSet(backbone()).predict({"a": IMAGES}), "got a dict"),
        (lambda: k4p1.PatchSet(backbone()).predict([(IMAGES[0], "a")]), "the task of number 0 is a ndarray"),
        (lambda: k4p1.compare(3), "runs is a int; expected folders of runs, or results"),
        (lambda: k4p1.compare([]), "no run; give folders"),
        (lambda: finetune(backbone=""), "backbone is an empty text"),
        (lambda: finetune(backbone="weights.h5"), "is a file of weights alone; name the network"),
    ],
)
def test_first_tries_are_told_what_is_right(call, says):
    with pytest.raises(errors.ConfigError) as caught:
        call()
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_forms_that_are_taken(tmp_path, capsys):
    names = np.array(["red", "green", "blue"])[LABELS]
    one = k4p1.Task(name="a", data=(IMAGES, names), image_size=16, batch_size=8, augment=lambda image: 255 - image)
    one = dataclasses.replace(one, loss=keras.losses.sparse_categorical_crossentropy)
    result = k4p1.train(backbone=backbone, tasks=one, steps=2, model_dir=tmp_path, quiet=True)
    assert k4p1.load_task(tmp_path).labels == ("blue", "green", "red")
    assert k4p1.fold(result.models["a"]).output_shape == (None, 3)
    assert k4p1.Task(data=tmp_path, name="a").data == str(tmp_path)
    assert k4p1.OptimizerConfig(optimizer="AdamW") == k4p1.OptimizerConfig(optimizer="adamw")
