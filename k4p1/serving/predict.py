"""Predictions of finished tasks for images."""

import pathlib
from collections.abc import Mapping, Sequence

import keras
import numpy as np
import tensorflow as tf

from k4p1 import errors
from k4p1.data import preprocessing
from k4p1.patches import patch_file
from k4p1.runs.model_dir import ModelDir
from k4p1.serving.saved_model import outputs_of
from k4p1.tasks import objectives
from k4p1.tasks.objectives import Objective

_BATCH = 32


def predict(
    model_dir: str | pathlib.Path, task: str | None = None, images: Sequence = (), top: int = 3
) -> list[tuple[str, list[tuple[str, float]]]]:
    """What a task answers for images: the `top` most probable labels with their probabilities, for one that classifies.

    Args:
      model_dir: of a finished run.
      task: may be None where the run has one task.
      images: paths, or arrays (height, width, 3) of 0 to 255, of any size.
      top: how many labels per image.

    Returns:
      (path, or place in `images`, answers) of each image.

    Raises:
      ConfigError: no such task, or no image.
      DataError: an image that cannot be read.
    """
    if task is not None and not isinstance(task, str):
        raise errors.ConfigError(f"task is a {type(task).__name__}; expected a name: predict(model_dir, task, images)")
    folder = ModelDir(model_dir)
    name = folder.one_task(task)
    if len(images) == 0:
        raise errors.ConfigError("no image given; add the paths of images")
    info = patch_file.read_info(folder.patch(name))
    objective = objectives.find(info.objective)
    patched = folder.load_task(name)
    pixels = [read_image(image, patched.image_size, place) for place, image in enumerate(images)]
    answers = []
    for start in range(0, len(pixels), _BATCH):
        outputs = outputs_of(patched.model, tf.stack(pixels[start : start + _BATCH]))
        answers += summaries(objective, outputs, info.labels, top)
    names = [str(image if isinstance(image, (str, pathlib.Path)) else place) for place, image in enumerate(images)]
    return list(zip(names, answers, strict=True))


def summaries(
    objective: Objective, outputs: Mapping[str, tf.Tensor], labels: Sequence[str], top: int
) -> list[list[tuple[str, float]]]:
    """What a task says of each image, from the outputs of its model (images, ...); see `Objective.summary`."""
    answers = {name: keras.ops.convert_to_numpy(one) for name, one in objective.answers(outputs).items()}
    count = len(next(iter(answers.values())))
    return [objective.summary({name: one[i] for name, one in answers.items()}, labels, top) for i in range(count)]


def read_image(image: object, size: tuple[int, int], place: int = 0):
    """An image as a task sees it: (height, width, 3) uint8 of its size, resized as in training.

    Args:
      image: a path, or an array (height, width, 3) of 0 to 255; floats up to 1 are taken as 0 to 1.
      size: (height, width).
      place: among the images given, for messages.

    Raises:
      DataError: a file that cannot be read, or an array of another shape or range.
    """
    if not isinstance(image, (str, pathlib.Path)):
        pixels = np.asarray(image)
        if pixels.ndim != 3 or pixels.shape[-1] != 3:
            raise errors.DataError(f"image {place} is {pixels.shape}; expected a path, or an array (height, width, 3)")
        if pixels.size and not (pixels.min() >= 0 and pixels.max() <= 255):
            raise errors.DataError(f"image {place} goes from {pixels.min()} to {pixels.max()}; expected 0 to 255")
        if np.issubdtype(pixels.dtype, np.floating) and pixels.size and 0 < pixels.max() <= 1:  # as training understands it
            pixels = pixels * 255
        return preprocessing.resize(tf.constant(np.round(pixels).astype(np.uint8)), size)
    try:
        encoded = pathlib.Path(image).read_bytes()
        return preprocessing.resize(preprocessing.decode(tf.constant(encoded)), size)
    except OSError as e:
        raise errors.DataError(f"cannot read image {image}: {e.strerror}") from e
    except tf.errors.OpError as e:
        raise errors.DataError(f"cannot decode image {image}: expected JPEG, PNG, BMP or GIF") from e
