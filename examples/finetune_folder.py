"""Fine-tunes a scale-and-bias patch on a folder of images, `class/*.png`, and predicts two of them.

    python examples/finetune_folder.py
    python examples/finetune_folder.py --data flowers --weights imagenet --image_size 96 --model_dir /tmp/k4p1/flowers

Without --data, the handwritten digits that come with scikit-learn are written as such a folder first. Without --weights, the
frozen backbone is random: that shows how it works, not how well. A patch is meant for a backbone that has learned something.
"""

import argparse
import pathlib
import tempfile

import numpy as np
import tensorflow as tf
from sklearn.datasets import load_digits

import k4p1
from k4p1.data.image_folder import SUFFIXES
from k4p1.serving.predict import predict


def write_digits(folder: pathlib.Path) -> pathlib.Path:
    """Writes 1,797 digits, 8 x 8 grey pixels, as `folder/<digit>/<number>.png`."""
    digits = load_digits()
    for number, (image, digit) in enumerate(zip(digits.images, digits.target, strict=True)):
        path = folder / str(digit) / f"{number:04}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.round(image[..., None] * (255 / 16)).astype(np.uint8)
        path.write_bytes(tf.io.encode_png(pixels).numpy())
    return folder


def main():
    """Fine-tunes, prints the test accuracy, predicts."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", help="folder class/*.jpg or class/*.png; default: the digits of scikit-learn")
    parser.add_argument("--weights", help="'imagenet' (downloaded), or a weight file; default: random values")
    parser.add_argument("--image_size", type=int, default=32)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--learning_rate", type=float, default=3e-2)
    parser.add_argument("--model_dir", default="/tmp/k4p1/finetune_folder")
    a = parser.parse_args()

    data = pathlib.Path(a.data) if a.data else write_digits(pathlib.Path(tempfile.gettempdir(), "k4p1_digits"))
    result = k4p1.finetune(
        backbone=lambda: k4p1.mobilenet_v2(weights=a.weights, width=0.35),
        task=k4p1.Task(name="folder", data=str(data), patch="scale_bias+head", image_size=a.image_size),
        steps=a.steps,
        optimizer=k4p1.OptimizerConfig(learning_rate=a.learning_rate),
        model_dir=a.model_dir,
    )
    print(f"test accuracy: {result.summary['tasks']['folder']['test_accuracy']:.3f}")

    images = sorted(path for path in data.rglob("*") if path.suffix.lower() in SUFFIXES)
    for path, best in predict(a.model_dir, "folder", [images[0], images[-1]]):
        print(path, ", ".join(f"{label} {probability:.3f}" for label, probability in best))


if __name__ == "__main__":
    main()
