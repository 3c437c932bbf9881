"""Tries a network: a step of training with each patch, files, and what another process makes of them."""

import json
import pathlib
import warnings
from collections.abc import Callable

import keras
import numpy as np
import tensorflow as tf

import k4p1
from k4p1 import data, errors
from k4p1.engine import OptimizerConfig, Store, plan_groups
from k4p1.engine.groups import write_back
from k4p1.engine.pure import PureTask
from k4p1.engine.step import Pace, training_step
from k4p1.patches.costs import multiply_adds
from k4p1.patches.fold import fold
from k4p1.patches.patch_file import load_patch, save_patch
from k4p1.serving.export import export
from k4p1.tasks.loss import TaskLoss
from k4p1.tasks.objectives import CLASSIFICATION

SPECS = ("head", "scale_bias+head", "full", "parallel_adapter+head", "mask+head", "lora(rank=1)+head", "train")
"""Patch specs; `train` stands for multi-task training, where the shared weights learn, with `head`."""
WORKS, NO_FIT, FAILS = "works", "no fit: ", "FAILS: "
_TASK, _LABELS = "t", ("a", "b", "c")


def train_step(backbone: k4p1.Backbone, spec: str, side: int, folder: pathlib.Path) -> None:
    """One step of the engine, run eagerly; writes backbone, patch and the answers to expect into `folder`.

    Raises:
      AssertionError: shared values moved that are frozen, or nothing that should learn did.
    """
    shared_trained = spec == "train"
    images, before = _images(side), backbone.fingerprint()
    batch = {"inputs": tf.constant(images), "label": tf.constant([0, 1], tf.int64), "weight": tf.ones([2])}
    patched = k4p1.apply_patches(
        backbone,
        "head" if shared_trained else spec,
        classes=len(_LABELS),
        image_size=side,
        shared_trained=shared_trained,
        name=_TASK,
    )
    optimizer = OptimizerConfig(learning_rate=1e-3, schedule="constant")
    groups = plan_groups({_TASK: patched}, optimizer.resolved())
    start = {group.name: group.initial() for group in groups}
    store = Store(groups, {_TASK: 1})
    loss = TaskLoss.of("softmax_cross_entropy", CLASSIFICATION)
    training_step(PureTask(_TASK, patched, groups), store, loss, optimizer.schedule, Pace(1, (1.0,), 0, 0))(batch)
    learned = store.vectors()
    assert any(not np.array_equal(start[name], vector) for name, vector in learned.items()), "nothing has learned"
    write_back(groups, learned)
    patched.model(images, training=True)  # as Keras' own `fit` calls it
    assert shared_trained or backbone.fingerprint() == before, "shared values moved"
    outputs = np.asarray(patched.model(images, training=False), "float32")
    assert np.isfinite(outputs).all(), "outputs are not finite"
    folder.mkdir(parents=True, exist_ok=True)
    k4p1.save_backbone(backbone, folder / "backbone.safetensors")
    save_patch(folder / "patch.safetensors", patched, backbone, task=_TASK, labels=_LABELS)
    np.save(folder / "expected.npy", outputs)


def check_step(folder: pathlib.Path, side: int) -> None:
    """Loads what `train_step` wrote, here or in another process; loaded and folded models must give the same answers."""
    outputs = np.load(folder / "expected.npy")
    patched = load_patch(folder / "patch.safetensors", k4p1.load_backbone(folder / "backbone.safetensors"))
    half = any(layer.compute_dtype in ("float16", "bfloat16") for layer in patched.model._flatten_layers())
    allowed = (0.05 if half else 1e-3) * max(1.0, float(np.abs(outputs).max()))
    for what, model in {"loaded": patched.model, "folded": fold(patched.model)}.items():
        difference = np.abs(np.asarray(model(_images(side), training=False), "float32") - outputs).max()
        assert difference <= allowed, f"the answers of the {what} model differ by {difference:.2g}"
    assert multiply_adds(patched.model) > 0


def run(
    make: Callable[[], k4p1.Backbone], side: int, folder: pathlib.Path, patch: str = "scale_bias+head", batch_size: int = 2
) -> None:
    """A real run of one step, from its checks before training to the files behind it."""
    task = k4p1.Task(
        name=_TASK,
        data=source(side, train=2 * batch_size),
        patch=patch,
        image_size=side,
        batch_size=batch_size,
        steps=1,
        validation_fraction=0.0,
    )
    result = k4p1.finetune(backbone=make, task=task, model_dir=folder, quiet=True, recalibration_batches=2)
    entry = result.summary["tasks"][_TASK]
    assert entry["multiply_adds"] > 0
    np.save(folder / "expected.npy", np.asarray(result.models[_TASK].model(_images(side), training=False), "float32"))
    (folder / "expected.json").write_text(json.dumps({"accuracy": entry["test_accuracy"]}))


def check_run(folder: pathlib.Path, side: int) -> None:
    """Loads, evaluates and exports what `run` left; an export compares its answers with those of the task model itself."""
    outputs = np.load(folder / "expected.npy")
    answers = np.asarray(k4p1.load_task(folder, _TASK)(_images(side), training=False), "float32")
    np.testing.assert_allclose(answers, outputs, atol=0.05 * max(1.0, float(np.abs(outputs).max())))
    accuracy = k4p1.evaluate(folder, _TASK, data=source(side))[_TASK]["accuracy"]
    assert accuracy == json.loads((folder / "expected.json").read_text())["accuracy"]
    export(folder, folder / "served")


def outcome(function: Callable, *arguments) -> str:
    """What became of a call, for a table."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", errors.PatchWarning)
            function(*arguments)
    except errors.PatchError as e:
        return f"{NO_FIT}{e}"
    except Exception as e:  # whatever it is, the table shows it
        return f"{FAILS}{type(e).__name__}: {errors.reason(e)}"
    finally:
        keras.backend.clear_session()
    return WORKS


def source(side: int, train: int = 4) -> data.Arrays:
    """A few random images: some to train on, 2 to test on."""

    def split(seed, count):
        random = np.random.default_rng(seed)
        return random.integers(0, 256, (count, side, side, 3), np.uint8), np.arange(count) % len(_LABELS)

    return data.Arrays({"train": split(0, train), "test": split(1, 2)}, _LABELS)


def _images(side: int) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (2, side, side, 3)).astype("float32")
