"""What masks do to a net whose batch normalisation is frozen: sparsity, accuracy, spread of features by learning rate.

    python benchmarks/mask_rates.py --data DIR/signdigits/1.0.0 --weights resnet56_cifar10.npz [--rates 1e-4 3e-4]

The figures of "Masks and frozen batch normalisation" in docs/methods.md. The spread of the features is their standard
deviation over 256 test images, mean over features.
"""

import argparse
import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
import tensorflow as tf

import k4p1
from k4p1.data import Pipeline, Splits, open_source
from k4p1.experiments.sparsity_report import total
from k4p1.patches.mask import sparsity


def main():
    """Measures and prints a row of Markdown for each rate."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", required=True, help="prepared TFDS directory")
    parser.add_argument("--weights", required=True, help="arrays of the CIFAR ResNet-56")
    parser.add_argument("--rates", nargs="*", type=float, default=[1e-4, 3e-4])
    parser.add_argument("--steps", type=int, default=150)
    a = parser.parse_args()
    source = open_source(a.data)
    images = next(iter(Pipeline(source, Splits(source), (32, 32), 256, len(source.labels)).sequential("test")))["inputs"]
    how = {"data": a.data, "patch": "mask+head", "image_size": 32, "steps": a.steps, "validation": 0.0}
    for rate in a.rates:
        result = k4p1.finetune(
            backbone=lambda: k4p1.cifar_resnet(a.weights),
            task=k4p1.Task(name="task", augment="shift(pixels=4)", **how),
            optimization=k4p1.Optimization(learning_rate=1e-3, kind_learning_rates={"mask": rate}),
            quiet=True,
        )
        patched = result.models["task"]
        scaled = patched.model.get_layer("input_scaling")(tf.constant(images))
        network = next(layer for layer in patched.model.layers if hasattr(layer, "layers"))
        spreads = [np.std(np.array(net(scaled, training=False)), axis=0).mean() for net in (network, result.backbone.model)]
        accuracy = 100 * result.summary["tasks"]["task"]["test_accuracy"]
        print(f"| {rate:g} | {total(sparsity(patched)):.1%} | {accuracy:.1f} | {spreads[0]:.4f} against {spreads[1]:.4f} |")


if __name__ == "__main__":
    main()
