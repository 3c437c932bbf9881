"""Accuracy, parameters and bytes of every method on one backbone: the measurements of docs/methods.md.

    python benchmarks/methods.py --data_dir DIR --weights resnet56_cifar10.npz --out results.jsonl [--tasks gtsrb dtd10]
        [--methods mask lora] [--steps_scale 0.2] [--seeds 0 1 2] [--table]

Fine-tunes the CIFAR ResNet-56 on prepared TFDS directories of `--data_dir` at 32 pixels, batch 32, Adam with cosine decay,
random shifts of 4 pixels, 10% of the training images held out for choosing the best checkpoint; the test split is looked at
once. Every run adds a line to `--out`; a run whose line is there is not repeated. `--table` prints what the file holds.
"""

import argparse
import collections
import json
import os
import pathlib
import statistics
import tempfile

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

STEPS = {"gtsrb": 1000, "omniglot8": 400, "signdigits": 400, "dtd10": 400}
METHODS = {  # name: (patch spec, learning rate)
    "head": ("head", 1e-2),
    "scale_bias": ("scale_bias+head", 1e-2),
    "parallel_adapter": ("parallel_adapter+scale_bias+head", 1e-2),
    "series_adapter": ("series_adapter+scale_bias+head", 1e-2),
    "mask, BN frozen": ("mask+head", 1e-2),
    "mask, BN private": ("mask+scale_bias+head", 1e-2),
    "lora": ("lora+scale_bias+head", 1e-2),
    "dan": ("dan+scale_bias+head", 1e-2),
    "full": ("full", 1e-3),
    "series, alpha = 0, BN frozen": ("series_adapter+head", 1e-2),
    "series, random alpha, BN frozen": ("series_adapter(std=0.1)+head", 1e-2),
    "series, random alpha, BN private": ("series_adapter(std=0.1)+scale_bias+head", 1e-2),
}
MASK_RATES = {"mask, BN frozen": 1e-4, "mask, BN private": 1e-3}
DEFAULT_METHODS = list(METHODS)[:9]


def measure(a, task, method, seed, rate=None):
    """One run: what goes into the file."""
    import k4p1

    spec, learning_rate = METHODS[method]
    learning_rate = rate or learning_rate
    steps = max(1, round(STEPS[task] * a.steps_scale))
    kinds = {"kind_learning_rates": {"mask": a.mask_rate or MASK_RATES[method]}} if "mask" in spec else {}
    with tempfile.TemporaryDirectory() as folder:
        result = k4p1.finetune(
            backbone=lambda: k4p1.cifar_resnet(a.weights),
            task=k4p1.Task(
                name=task,
                data=str(pathlib.Path(a.data_dir) / task / "1.0.0"),
                patch=spec,
                image_size=32,
                batch_size=32,
                steps=steps,
                augment="" if spec == "head" else "shift(pixels=4)",
            ),
            optimization=k4p1.Optimization(learning_rate=learning_rate, **kinds),
            evaluate_every=max(1, steps // 4),
            checkpoint_every=10**9,
            model_dir=folder,
            seed=seed,
            quiet=True,
        )
    found = result.summary["tasks"][task]
    return {"task": task, "method": method, "spec": spec, "seed": seed, "steps": steps, "rate": learning_rate, **found}


def table(lines):
    """Rows of Markdown: the methods; columns: test accuracy by task, private parameters, bytes."""
    cells = collections.defaultdict(list)
    sizes = {}
    for line in lines:
        cells[line["method"], line["task"]].append(100 * line["test_accuracy"])
        sizes.setdefault(line["method"], (line["private_trained"], line["patch_bytes"]))
    tasks = [task for task in STEPS if any(key[1] == task for key in cells)]
    yield "| method | " + " | ".join(tasks) + f" | trained, {tasks[0]} | bytes, {tasks[0]} |"
    yield "|---" * (len(tasks) + 3) + "|"
    for method in METHODS:
        if method not in sizes:
            continue
        row = [_cell(cells[method, task]) for task in tasks]
        yield f"| {method} | " + " | ".join(row) + " | " + " | ".join(f"{size:,}" for size in sizes[method]) + " |"


def _cell(values):
    if not values:
        return ""
    spread = f" ({min(values):.1f}-{max(values):.1f})" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}"


def main():
    """Measures what is missing, prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data_dir", help="folder of prepared TFDS directories")
    parser.add_argument("--weights", help="arrays of the CIFAR ResNet-56")
    parser.add_argument("--out", required=True, help="file of results, one JSON object a line")
    parser.add_argument("--tasks", nargs="*", default=list(STEPS), choices=list(STEPS))
    parser.add_argument("--methods", nargs="*", default=DEFAULT_METHODS, choices=list(METHODS))
    parser.add_argument("--seeds", nargs="*", type=int, default=[0])
    parser.add_argument("--rates", nargs="*", type=float, default=[None], help="learning rates in place of the method's")
    parser.add_argument("--mask_rate", type=float, help="learning rate of mask scores in place of the method's")
    parser.add_argument("--steps_scale", type=float, default=1.0, help="multiplies the steps of every task")
    parser.add_argument("--table", action="store_true", help="print the table of the file, measure nothing")
    a = parser.parse_args()
    out = pathlib.Path(a.out)
    lines = [json.loads(line) for line in out.read_text().splitlines()] if out.is_file() else []
    if not a.table:
        for seed in a.seeds:
            for task in a.tasks:
                for method in a.methods:
                    for rate in a.rates:
                        wanted = (task, method, seed, max(1, round(STEPS[task] * a.steps_scale)), rate or METHODS[method][1])
                        if any((n["task"], n["method"], n["seed"], n["steps"], n["rate"]) == wanted for n in lines):
                            continue
                        lines.append(measure(a, task, method, seed, rate))
                        with out.open("a") as file:
                            file.write(json.dumps(lines[-1]) + "\n")
                        shown = ("task", "method", "seed", "rate", "validation_accuracy", "test_accuracy")
                        print(*(lines[-1][name] for name in shown), flush=True)
    full = [line for line in lines if line["steps"] == STEPS[line["task"]]]
    short = [line for line in lines if line["steps"] != STEPS[line["task"]]]
    for title, listed in (("full length", full), ("short", short)):
        if listed:
            print(f"{title}:", *table(listed), sep="\n")


if __name__ == "__main__":
    main()
