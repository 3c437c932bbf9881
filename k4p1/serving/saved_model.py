"""One SavedModel per task, ready for TensorFlow Serving: preprocessing inside, labels beside."""

import contextlib
import pathlib
import secrets
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence

import keras
import numpy as np
import tensorflow as tf

import k4p1
from k4p1 import errors
from k4p1.data import preprocessing
from k4p1.files import atomic
from k4p1.patches.inference import inference_model
from k4p1.patches.patch_info import check_labels
from k4p1.patches.patched_model import LOGITS
from k4p1.patches.task_head import DEFAULT_OBJECTIVE
from k4p1.tasks import objectives
from k4p1.tasks.objectives import Objective

ABOUT = "assets.extra/k4p1.json"
"""Within a SavedModel: what k4p1 says of it."""
_PROBE_SIZE = 4
_NEARBY = 2.0**-20


class ServedTask(tf.Module):
    """A task model with its preprocessing.

    Signatures, each giving the answers of the task's objective; for classification `probabilities` (softmax of the logits)
    and `logits`, float32 (batch, classes):

    * `serving_default(images)`: uint8 (batch, height, width, 3), any size;
    * `encoded(encoded)`: string (batch,), JPEG, PNG, BMP or GIF bytes, of any sizes.

    Args:
      model: task model, images of its size to outputs.
      image_size: (height, width) in pixels.
      objective: of the task.
      labels_path: file of class names; the asset `labels.txt`.
    """

    def __init__(self, model: keras.Model, image_size: tuple[int, int], objective: Objective, labels_path: pathlib.Path):
        super().__init__()
        self._size = image_size
        self._weights = model.variables  # tracked, so that they are saved; a tracked model would add graphs of its own
        pixels = tf.TensorSpec([None, *image_size, 3], tf.uint8, name="pixels")
        self._answer = tf.function(  # one graph, which both signatures call
            lambda images: objective.answers(outputs_of(model, images)), input_signature=[pixels]
        )
        self.labels_file = tf.saved_model.Asset(str(labels_path))

    @tf.function(input_signature=[tf.TensorSpec([None, None, None, 3], tf.uint8, name="images")])
    def serve_images(self, images):
        """Answers for raw images."""
        return self._answer(preprocessing.resize(images, self._size))

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string, name="encoded")])
    def serve_encoded(self, encoded):
        """Answers for encoded images."""
        images = tf.map_fn(
            lambda one: preprocessing.resize(preprocessing.decode(one), self._size),
            encoded,
            fn_output_signature=tf.TensorSpec([*self._size, 3], tf.uint8),
        )
        return self._answer(images)


def outputs_of(model: keras.Model, images: tf.Tensor) -> dict[str, tf.Tensor]:
    """The outputs of a task model by name, float32; a single one is `logits`."""
    outputs = model(images, training=False)
    outputs = outputs if isinstance(outputs, dict) else {LOGITS: outputs}
    return {name: tf.cast(output, tf.float32) for name, output in outputs.items()}


def export_task(
    model: keras.Model,
    image_size: tuple[int, int],
    labels: Sequence[str],
    folder: str | pathlib.Path,
    objective: str | Objective = DEFAULT_OBJECTIVE,
) -> tuple[pathlib.Path, float]:
    """Writes `<folder>/<version>/`, version one above the highest there, and checks it against the task model.

    Patch and normalisation are folded into plain layers first (`k4p1.patches.inference`); `ABOUT` says how many
    normalisations were, and how many stayed. The SavedModel is written beside, read back and compared on a probe batch
    of random images before it takes its name.

    Args:
      model: task model, images (batch, height, width, 3) of 0 to 255 to logits.
      image_size: (height, width) in pixels.
      labels: class names.
      folder: of the task; its version folders are what TensorFlow Serving looks for.
      objective: of the task; it says what the SavedModel answers.

    Returns:
      (path of the SavedModel, largest difference of its answers on the probe).

    Raises:
      ConfigError: labels that do not match the classes.
      StorageError: the folder cannot be written.
      ArtifactError: the SavedModel read back does not compute what the task model does.
    """
    objective = objectives.find(objective)
    check_labels(model.output, labels, objective.name)
    if any(len(label.splitlines()) > 1 for label in labels):
        raise errors.ConfigError("a label has several lines; labels.txt holds one label per line")
    with new_version(folder) as (partial, target):
        with tempfile.TemporaryDirectory() as scratch:
            labels_path = pathlib.Path(scratch) / "labels.txt"
            labels_path.write_text("\n".join(labels) + "\n", encoding="utf-8")
            inference = inference_model(model)
            served = ServedTask(inference.model, image_size, objective, labels_path)
            signatures = {"serving_default": served.serve_images, "encoded": served.serve_encoded}
            tf.saved_model.save(served, str(partial), signatures=signatures)
        counts = {name: getattr(inference, name) for name in ("normalisations_folded", "normalisations_kept")}
        write_about(partial, counts)
        difference = _largest_difference(model, objective, partial, image_size)
    return target, difference


@contextlib.contextmanager
def new_version(folder: str | pathlib.Path) -> Iterator[tuple[pathlib.Path, pathlib.Path]]:
    """(where to write, where it will be): a version folder that takes its name once it is complete, or never exists.

    Raises:
      StorageError: the folder cannot be written.
    """
    folder = pathlib.Path(folder).expanduser()
    versions = [int(p.name) for p in folder.glob("*") if p.name.isdigit()] if folder.is_dir() else []
    target = folder / str(max(versions, default=0) + 1)
    partial = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        beside = folder / f".partial-{secrets.token_hex(6)}"
        beside.mkdir()  # unlike mkdtemp, with the permissions that the umask leaves
        partial = beside
        yield partial, target
        partial.rename(target)
        partial = None
    except OSError as e:
        raise atomic.storage_error(target, e) from e
    except (tf.errors.OpError, UnicodeError) as e:
        raise errors.StorageError(f"cannot write {target}: {str(e).splitlines()[0][:160]}") from e
    finally:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)


def write_about(path: pathlib.Path, values: Mapping[str, object]) -> None:
    """Writes what k4p1 says of a SavedModel beside it."""
    atomic.write_json(path / ABOUT, {"k4p1_version": k4p1.__version__, **values})


def _largest_difference(model: keras.Model, objective: Objective, path: pathlib.Path, image_size: tuple[int, int]) -> float:
    """Between the answers of a task model and of its SavedModel.

    Folding changes the order of arithmetic. That may change 1e-4 of the largest answer; or ten times as much as an image
    that is almost the same changes it: much, in a network with statistics of too few images.

    Raises:
      ArtifactError: they differ by more.
    """
    probe = np.random.default_rng(0).integers(0, 256, (_PROBE_SIZE, *image_size, 3), np.uint8)
    expected = objective.answers(outputs_of(model, tf.constant(probe)))
    nearby = objective.answers(outputs_of(model, tf.constant(probe, tf.float32) * (1.0 + _NEARBY)))
    found = tf.saved_model.load(str(path)).signatures["serving_default"](images=tf.constant(probe))
    half = any(layer.compute_dtype in ("float16", "bfloat16") for layer in model._flatten_layers())
    largest = 0.0
    for name, answer in expected.items():
        if not answer.dtype.is_floating:  # such as class numbers: equal but for ties, which rounding may decide otherwise
            continue
        answer = answer.numpy()
        difference = float(np.max(np.abs(answer - found[name].numpy())))
        allowed = (0.05 if half else 1e-4) * max(1.0, float(np.max(np.abs(answer))))
        allowed = max(allowed, 10.0 * float(np.max(np.abs(answer - nearby[name].numpy()))))
        if not difference <= allowed:
            raise errors.ArtifactError(
                f"the SavedModel differs from the task model by {difference:.2g} in its {name}, more than {allowed:.2g}; "
                "not written"
            )
        largest = max(largest, difference)
    return largest
