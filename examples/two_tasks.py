"""Trains two tasks together on one backbone, then a third one on the backbone that they left.

    python examples/two_tasks.py

`k4p1.train`: the shared weights learn from all tasks. `k4p1.finetune`: they are frozen, and only the patch of the new task
learns. The three tasks ask different questions about the same handwritten digits, which come with scikit-learn.
"""

import argparse

import numpy as np

import k4p1
from k4p1.data import Arrays, embedded

WITH_LOOP = (0, 6, 8, 9)


def loops() -> Arrays:
    """Whether a digit has a closed loop. Images and splits are those of `embedded/digits`."""
    digits, splits = embedded("digits"), {}
    for split in digits.sizes():
        examples = list(digits.examples(split).as_numpy_iterator())
        has_loop = np.isin([example["label"] for example in examples], WITH_LOOP)
        splits[split] = np.stack([example["image"] for example in examples]), has_loop
    return Arrays(splits, labels=["no loop", "loop"], name="loops")


def main():
    """Trains the first two tasks, fine-tunes the third."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=100, help="of each task")
    parser.add_argument("--model_dir", default="/tmp/k4p1/two_tasks")
    a = parser.parse_args()
    optimizer = k4p1.OptimizerConfig(learning_rate=1e-2)

    first = k4p1.train(
        backbone=lambda: k4p1.cifar_resnet(depth=8),
        tasks=[
            k4p1.Task(name="digits", data="embedded/digits", image_size=32, patch="scale_bias+head"),
            k4p1.Task(name="parity", data="embedded/parity", image_size=32, patch="scale_bias+head"),
        ],
        steps=a.steps,
        optimizer=optimizer,
        model_dir=f"{a.model_dir}/together",
    )
    backbone = k4p1.load_backbone(f"{a.model_dir}/together/backbone/backbone.safetensors")
    before = backbone.fingerprint()
    second = k4p1.finetune(
        backbone=backbone,
        task=k4p1.Task(name="loops", data=loops(), image_size=32, patch="scale_bias+head"),
        steps=a.steps,
        optimizer=optimizer,
        model_dir=f"{a.model_dir}/third",
    )
    for name, task in {**first.summary["tasks"], **second.summary["tasks"]}.items():
        private = task["private_parameters"]
        print(f"{name}: test accuracy {task['test_accuracy']:.3f} with {private:,} private parameters")
    print("backbone unchanged by the third task:", backbone.fingerprint() == before)


if __name__ == "__main__":
    main()
