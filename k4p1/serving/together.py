"""One SavedModel for all tasks of one backbone: the shared weights once, every task's private values beside them."""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np
import tensorflow as tf

from k4p1 import errors
from k4p1.data import preprocessing
from k4p1.patches.patched_model import LOGITS, PatchedModel
from k4p1.serving import saved_model
from k4p1.serving.mixed import NO_CLASS, MixedModel
from k4p1.serving.task_tables import widened

MIXED = "mixed"


@dataclasses.dataclass(frozen=True)
class TaskToServe:
    """A finished task.

    Attributes:
      patched: its model.
      labels: class names.
    """

    patched: PatchedModel
    labels: tuple[str, ...]


class ServedTogether(tf.Module):
    """Many tasks on one backbone.

    Signatures, `images` being uint8 (batch, height, width, 3) of any size, answers float32:

    * one per task, of its name: `probabilities` and `logits` (batch, classes of the task);
    * `mixed(images, task)`, task a string (batch,): `probabilities`, `logits` and `labels`, (batch, classes of the widest
      task); classes that a task does not have get probability 0, logit `NO_CLASS` and an empty label;
    * `mixed_encoded(encoded, task)`: the same for JPEG, PNG, BMP or GIF bytes of any sizes.

    Args:
      models: of mixed tasks, one per image size.
      tasks: by name.
    """

    def __init__(self, models: Sequence[MixedModel], tasks: Mapping[str, TaskToServe]):
        super().__init__()
        self._models, self._tasks = list(models), dict(tasks)
        self._held = [model.variables for model in models]  # tracked, so that they are saved
        names, self._width = list(tasks), max(len(task.labels) for task in tasks.values())
        self._group = [next(n for n, m in enumerate(models) if name in m.tasks) for name in names]
        self._row = [int(models[group].rows([name])[0]) for group, name in zip(self._group, names, strict=True)]
        wide = [[*task.labels, *[""] * (self._width - len(task.labels))] for task in tasks.values()]
        self._labels = tf.constant(wide)
        keys, numbers = tf.constant(names), tf.range(len(names))
        self._number = tf.lookup.StaticHashTable(tf.lookup.KeyValueTensorInitializer(keys, numbers), -1)
        self._one = [
            tf.function(
                model.logits, input_signature=[tf.TensorSpec([None, *model.image_size, 3]), tf.TensorSpec([], tf.int32)]
            )
            for model in models
        ]
        self._many = [
            tf.function(
                model.logits, input_signature=[tf.TensorSpec([None, *model.image_size, 3]), tf.TensorSpec([None], tf.int32)]
            )
            for model in models
        ]

    def signatures(self) -> dict[str, tf.types.experimental.GenericFunction]:
        """The signatures by name."""
        return {
            **{name: self._alone(number, name) for number, name in enumerate(self._tasks)},
            MIXED: self.mixed,
            f"{MIXED}_encoded": self.mixed_encoded,
        }

    def _alone(self, number: int, name: str):
        group, row, classes = self._group[number], self._row[number], len(self._tasks[name].labels)

        @tf.function(input_signature=[tf.TensorSpec([None, None, None, 3], tf.uint8, name="images")])
        def serve(images):
            resized = preprocessing.resize(images, self._models[group].image_size)
            logits = self._one[group](tf.cast(resized, tf.float32), tf.constant(row))[:, :classes]
            return {"probabilities": tf.nn.softmax(logits), LOGITS: logits}

        return serve

    @tf.function(
        input_signature=[
            tf.TensorSpec([None, None, None, 3], tf.uint8, name="images"),
            tf.TensorSpec([None], tf.string, name="task"),
        ]
    )
    def mixed(self, images, task):
        """Answers for raw images, each for its own task."""
        return self._answers(task, lambda chosen, size: preprocessing.resize(tf.gather(images, chosen), size))

    @tf.function(
        input_signature=[tf.TensorSpec([None], tf.string, name="encoded"), tf.TensorSpec([None], tf.string, name="task")]
    )
    def mixed_encoded(self, encoded, task):
        """Answers for encoded images, each for its own task."""

        def decoded(chosen, size):
            return tf.map_fn(
                lambda one: preprocessing.resize(preprocessing.decode(one), size),
                tf.gather(encoded, chosen),
                fn_output_signature=tf.TensorSpec([*size, 3], tf.uint8),
            )

        return self._answers(task, decoded)

    def _answers(self, task, pixels):
        number = self._number.lookup(task)
        missing = tf.boolean_mask(task, number < 0)
        known = tf.debugging.assert_equal(tf.size(missing), 0, message="unknown task; see the signatures for the known ones")
        with tf.control_dependencies([known] if known is not None else []):
            number = tf.identity(number)
        group, row = tf.gather(tf.constant(self._group), number), tf.gather(tf.constant(self._row), number)
        logits = tf.fill([tf.size(number), self._width], tf.constant(NO_CLASS))
        for index, model in enumerate(self._models):
            chosen = tf.where(group == index)
            images = tf.cast(pixels(chosen[:, 0], model.image_size), tf.float32)
            found = self._many[index](images, tf.gather(row, chosen[:, 0]))
            found = found[:, : self._width]
            found = tf.pad(found, [[0, 0], [0, self._width - found.shape[1]]], constant_values=NO_CLASS)
            logits = tf.tensor_scatter_nd_update(logits, chosen, found)
        return {
            "probabilities": tf.nn.softmax(logits),
            LOGITS: logits,
            "labels": tf.gather(self._labels, number),
        }


def export_together(tasks: Mapping[str, TaskToServe], models: Sequence[MixedModel], folder: str | pathlib.Path):
    """Writes `<folder>/<version>/` and checks every task in it, alone and mixed, against its task model.

    Args:
      tasks: by name.
      models: that hold them, one per image size.
      folder: what TensorFlow Serving is pointed at.

    Returns:
      (path of the SavedModel, largest difference of its logits on the probe).

    Raises:
      ConfigError: a task has the name of a signature of the whole.
      StorageError: the folder cannot be written.
      ArtifactError: the SavedModel read back does not compute what the task models do.
    """
    for name in (MIXED, f"{MIXED}_encoded"):
        if name in tasks:
            raise errors.ConfigError(f"a task cannot be called '{name}' in a SavedModel of many tasks: a signature is")
    served = ServedTogether(models, tasks)
    about = {"tasks": {name: list(task.labels) for name, task in tasks.items()}}
    with saved_model.new_version(folder) as (partial, target):
        tf.saved_model.save(served, str(partial), signatures=served.signatures())
        saved_model.write_about(partial, about)
        difference = _largest_difference(tasks, partial)
    return target, difference


def _largest_difference(tasks: Mapping[str, TaskToServe], path: pathlib.Path) -> float:
    loaded = tf.saved_model.load(str(path))
    names = list(tasks)
    side = max(max(task.patched.image_size) for task in tasks.values())
    probe = np.random.default_rng(0).integers(0, 256, (len(names), side, side, 3), np.uint8)
    mixed = loaded.signatures[MIXED](images=tf.constant(probe), task=tf.constant(names))[LOGITS].numpy()
    largest = 0.0
    for number, (name, task) in enumerate(tasks.items()):
        image = tf.constant(probe[number : number + 1])
        resized = preprocessing.resize(image, task.patched.image_size)
        expected = saved_model.outputs_of(task.patched.model, resized)[LOGITS].numpy()
        alone = loaded.signatures[name](images=image)[LOGITS].numpy()
        wide = widened(expected, mixed.shape[1], NO_CLASS)
        difference = max(float(np.max(np.abs(alone - expected))), float(np.max(np.abs(mixed[number] - wide[0]))))
        allowed = 1e-4 * max(1.0, float(np.max(np.abs(expected))))
        if not difference <= allowed:
            raise errors.ArtifactError(
                f"the SavedModel differs from task '{name}' by {difference:.2g} in its logits, more than {allowed:.2g}; "
                "not written"
            )
        largest = max(largest, difference)
    return largest
