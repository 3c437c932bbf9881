"""Compares three patch specs on one frozen backbone: accuracy, private parameters, bytes of the patch file.

    python examples/compare_kinds.py
    python examples/compare_kinds.py --weights resnet20.npz --depth 20 --data DIR/gtsrb/1.0.0 --model_dir /tmp/k4p1/gtsrb

Without --weights, the backbone first learns to tell even digits from odd ones. The specs then take turns in one run and
share nothing but the backbone. A mask stores one bit per weight: its patch is far smaller than its number of parameters
suggests.
"""

import argparse

from rich.console import Console
from rich.table import Table

import k4p1

SPECS = {"head": "head", "scale_bias": "scale_bias+head", "mask": "mask+scale_bias+head"}


def pretrained(depth: int, steps: int, model_dir: str) -> str:
    """Trains a small network on the parity of the digits; the path of its backbone file."""
    k4p1.train(
        backbone=lambda: k4p1.cifar_resnet(depth=depth),
        tasks=[k4p1.Task(name="parity", data="embedded/parity", patch="head", image_size=32)],
        steps=steps,
        optimizer=k4p1.OptimizerConfig(learning_rate=3e-3),
        model_dir=model_dir,
        quiet=True,
    )
    return f"{model_dir}/backbone/backbone.safetensors"


def main():
    """Trains a patch of each spec and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", default="embedded/digits")
    parser.add_argument(
        "--weights", help="weight file of a CIFAR ResNet; default: trained first, on the parity of the digits"
    )
    parser.add_argument("--depth", type=int, default=8, help="of the CIFAR ResNet, 6 n + 2")
    parser.add_argument("--steps", type=int, default=200, help="of each task")
    parser.add_argument("--model_dir", default="/tmp/k4p1/compare_kinds")
    a = parser.parse_args()

    weights = a.weights or pretrained(a.depth, a.steps, f"{a.model_dir}/backbone")
    result = k4p1.finetune(
        backbone=lambda: k4p1.cifar_resnet(weights, depth=a.depth),
        tasks=[k4p1.Task(name=name, data=a.data, patch=spec, image_size=32) for name, spec in SPECS.items()],
        steps=a.steps,
        optimizer=k4p1.OptimizerConfig(learning_rate=3e-2, rules={"mask": {"learning_rate": 1e-3}}),
        model_dir=f"{a.model_dir}/patches",
        quiet=True,
    )
    table = Table(title=f"{a.data} on {result.backbone.name}, {result.summary['shared_parameters']:,} frozen parameters")
    table.add_column("patch")
    for column in ("test accuracy", "private parameters", "patch bytes"):
        table.add_column(column, justify="right")
    for task in result.summary["tasks"].values():
        accuracy, private, size = task["test_accuracy"], task["private_parameters"], task["patch_bytes"]
        table.add_row(task["patch"], f"{accuracy:.3f}", f"{private:,}", f"{size:,}")
    Console().print(table)


if __name__ == "__main__":
    main()
