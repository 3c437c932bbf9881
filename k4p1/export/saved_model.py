"""One SavedModel a task, ready for TensorFlow Serving: preprocessing inside, labels beside."""

import pathlib
import shutil
import tempfile
from collections.abc import Sequence

import keras
import numpy as np
import tensorflow as tf

from k4p1 import artifact, errors
from k4p1.data import preprocessing
from k4p1.export.fold import fold

_PROBE_SIZE = 4


class ServedTask(tf.Module):
    """A task model with its preprocessing.

    Signatures, each giving `probabilities` (softmax of the logits) and `logits`, float32 (batch, classes):

    * `serving_default(images)`: uint8 (batch, height, width, 3), any size;
    * `encoded(encoded)`: string (batch,), JPEG, PNG, BMP or GIF bytes, of any sizes.

    Args:
      model: task model, images of its size to logits.
      image_size: (height, width) in pixels.
      labels: class names; the asset `labels.txt`.
      labels_path: a file of them.
    """

    def __init__(self, model: keras.Model, image_size: tuple[int, int], labels: Sequence[str], labels_path: pathlib.Path):
        super().__init__()
        self._model, self._size = model, image_size
        self._weights = model.variables  # tracked, so that they are saved
        self.labels_file = tf.saved_model.Asset(str(labels_path))

    @tf.function(input_signature=[tf.TensorSpec([None, None, None, 3], tf.uint8, name="images")])
    def serve_images(self, images):
        """Classifies raw images."""
        return self._classify(preprocessing.resize(images, self._size))

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string, name="encoded")])
    def serve_encoded(self, encoded):
        """Classifies encoded images."""
        images = tf.map_fn(
            lambda one: preprocessing.resize(preprocessing.decode(one), self._size),
            encoded,
            fn_output_signature=tf.TensorSpec([*self._size, 3], tf.uint8),
        )
        return self._classify(images)

    def _classify(self, images):
        logits = tf.cast(self._model(images, training=False), tf.float32)
        return {"probabilities": tf.nn.softmax(logits), "logits": logits}


def export_task(
    model: keras.Model, image_size: tuple[int, int], labels: Sequence[str], folder: str | pathlib.Path
) -> tuple[pathlib.Path, float]:
    """Writes `<folder>/<version>/`, version one above the highest there, and checks it against the task model.

    The patch is folded into plain layers first. The SavedModel is written beside, read back and compared on a probe batch
    of random images before it takes its name.

    Args:
      model: task model, images (batch, height, width, 3) of 0 to 255 to logits.
      image_size: (height, width) in pixels.
      labels: class names.
      folder: of the task; its version folders are what TensorFlow Serving looks for.

    Returns:
      (path of the SavedModel, largest difference of the probe's logits).

    Raises:
      StorageError: the folder cannot be written.
      ArtifactError: the SavedModel read back does not compute what the task model does.
    """
    folder = pathlib.Path(folder).expanduser()
    versions = [int(p.name) for p in folder.glob("*") if p.name.isdigit()] if folder.is_dir() else []
    target = folder / str(max(versions, default=0) + 1)
    beside = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        beside = pathlib.Path(tempfile.mkdtemp(prefix=".partial-", dir=folder))
        with tempfile.TemporaryDirectory() as scratch:
            labels_path = pathlib.Path(scratch) / "labels.txt"
            labels_path.write_text("\n".join(labels) + "\n", encoding="utf-8")
            served = ServedTask(fold(model), image_size, labels, labels_path)
            signatures = {"serving_default": served.serve_images, "encoded": served.serve_encoded}
            tf.saved_model.save(served, str(beside), signatures=signatures)
        difference = _largest_difference(model, beside, image_size)
        beside.chmod(0o755)
        beside.rename(target)
        beside = None
    except OSError as e:
        raise artifact.storage_error(target, e) from e
    except (tf.errors.OpError, UnicodeError) as e:
        raise errors.StorageError(f"cannot write {target}: {str(e).splitlines()[0][:160]}") from e
    finally:
        if beside is not None:
            shutil.rmtree(beside, ignore_errors=True)
    return target, difference


def _largest_difference(model: keras.Model, path: pathlib.Path, image_size: tuple[int, int]) -> float:
    probe = np.random.default_rng(0).integers(0, 256, (_PROBE_SIZE, *image_size, 3), np.uint8)
    wanted = np.asarray(model(probe, training=False), np.float32)
    found = tf.saved_model.load(str(path)).signatures["serving_default"](images=tf.constant(probe))["logits"].numpy()
    difference = float(np.max(np.abs(wanted - found)))
    half = keras.config.dtype_policy().compute_dtype != "float32"
    allowed = (0.05 if half else 1e-4) * max(1.0, float(np.max(np.abs(wanted))))
    if not difference <= allowed:
        raise errors.ArtifactError(
            f"the SavedModel differs from the task model by {difference:.2g} in its logits, more than {allowed:.2g}; "
            "not written"
        )
    return difference
