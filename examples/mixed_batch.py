"""Asks one SavedModel that holds several tasks about a batch whose images belong to different tasks.

    k4p1 train  --gin_file quickstart --model_dir /tmp/k4p1/two
    k4p1 export --model_dir /tmp/k4p1/two --export_dir /tmp/k4p1/together --together
    python examples/mixed_batch.py
    python examples/mixed_batch.py --saved_model /tmp/k4p1/together --tasks parity digits

The backbone is in the file once. The signature `mixed` takes images and, for each image, the name of its task. TensorFlow
alone loads it, and TensorFlow Serving answers the same.
"""

import argparse
import pathlib

import numpy as np
import tensorflow as tf
from sklearn.datasets import load_digits


def main():
    """Prints what two tasks say of two digits each."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    written = "folder that `k4p1 export --together` wrote"
    parser.add_argument("--saved_model", default="/tmp/k4p1/together", type=pathlib.Path, help=written)
    parser.add_argument("--tasks", nargs="+", default=["digits", "parity"])
    a = parser.parse_args()

    newest = max((path for path in a.saved_model.iterdir() if path.name.isdigit()), key=lambda path: int(path.name))
    mixed = tf.saved_model.load(str(newest)).signatures["mixed"]
    digits = load_digits()
    chosen = digits.images[-4:]
    images = np.repeat(np.round(chosen[..., None] * (255 / 16)).astype(np.uint8), 3, axis=-1)
    tasks = [a.tasks[number % len(a.tasks)] for number in range(len(images))]
    answers = mixed(images=tf.constant(images), task=tf.constant(tasks))
    for digit, task, probabilities, labels in zip(
        digits.target[-4:], tasks, answers["probabilities"].numpy(), answers["labels"].numpy(), strict=True
    ):
        best = int(np.argmax(probabilities))
        print(f"a {digit}, asked for {task}: {labels[best].decode()} ({probabilities[best]:.3f})")


if __name__ == "__main__":
    main()
