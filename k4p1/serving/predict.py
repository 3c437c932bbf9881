"""Predictions of finished tasks for image files."""

import pathlib
from collections.abc import Sequence

import keras

from k4p1 import errors
from k4p1.data import preprocessing
from k4p1.patches import patch_file
from k4p1.runs.model_dir import ModelDir
from k4p1.serving.saved_model import outputs_of
from k4p1.tasks import objectives


def predict(
    model_dir: str | pathlib.Path, task: str | None, images: Sequence[str | pathlib.Path], top: int = 3
) -> list[tuple[str, list[tuple[str, float]]]]:
    """What tasks answer for image files: the `top` most probable labels with their probabilities, for one that classifies.

    Args:
      model_dir: of a finished run.
      task: may be None where the run has one task.
      images: paths.
      top: how many labels per image.

    Raises:
      DataError: an image that cannot be read.
    """
    import tensorflow as tf

    folder = ModelDir(model_dir)
    names = folder.chosen_tasks(task)
    if len(names) > 1:
        raise errors.ConfigError(f"{folder.root} has several tasks; say which with --task: {', '.join(names)}")
    if not images:
        raise errors.ConfigError("no image given; add the paths of images")
    info = patch_file.read_info(folder.patch(names[0]))
    objective = objectives.find(info.objective)
    pixels = []
    patched = folder.load_task(names[0])
    for path in images:
        try:
            encoded = pathlib.Path(path).read_bytes()
            pixels.append(preprocessing.resize(preprocessing.decode(tf.constant(encoded)), patched.image_size))
        except OSError as e:
            raise errors.DataError(f"cannot read image {path}: {e.strerror}") from e
        except tf.errors.OpError as e:
            raise errors.DataError(f"cannot decode image {path}: expected JPEG, PNG, BMP or GIF") from e
    found = []
    for path, image in zip(images, pixels, strict=True):
        answers = objective.answers(outputs_of(patched.model, image[None]))
        one = {name: keras.ops.convert_to_numpy(answer)[0] for name, answer in answers.items()}
        found.append((str(path), objective.summary(one, info.labels, top)))
    return found
