"""Answers for two tasks with one loaded backbone: `k4p1.PatchSet`.

    python examples/serve_patch_set.py

The backbone is in memory once; a task costs the memory of its patch. There is no active task: every call names its own, so
that threads do not disturb one another.
"""

import argparse
import concurrent.futures

import numpy as np

import k4p1
from k4p1.data import embedded, preprocessing


def main():
    """Trains two tasks, unless `model_dir` has them already, and serves both."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=100, help="of each task")
    parser.add_argument("--model_dir", default="/tmp/k4p1/serve_patch_set")
    a = parser.parse_args()
    tasks = [
        k4p1.Task(name="digits", data="embedded/digits", image_size=32, patch="scale_bias+head"),
        k4p1.Task(name="parity", data="embedded/parity", image_size=32, patch="parallel_adapter+scale_bias+head"),
    ]
    k4p1.train(
        backbone=lambda: k4p1.cifar_resnet(depth=8),
        tasks=tasks,
        steps=a.steps,
        optimizer=k4p1.OptimizerConfig(learning_rate=1e-2),
        model_dir=a.model_dir,
        quiet=True,
    )

    # 1. One backbone, and two patches on it.
    patches = k4p1.PatchSet(k4p1.load_backbone(f"{a.model_dir}/backbone/backbone.safetensors"))
    for task in tasks:
        patches.add(f"{a.model_dir}/tasks/{task.name}/patch.safetensors")

    # 2. Ask both, each in a thread of its own. A task model takes images of its size, resized as in training.
    test = next(iter(embedded("digits").examples("test").batch(8)))
    images = preprocessing.resize(test["image"], (32, 32))
    with concurrent.futures.ThreadPoolExecutor() as threads:
        answers = dict(zip(patches.names, threads.map(lambda name: patches(name, images), patches.names), strict=True))
    for name, logits in answers.items():
        print(f"{name}:", ", ".join(patches.labels(name)[i] for i in np.argmax(logits, axis=-1)))
    print("truth:", ", ".join(str(label) for label in test["label"].numpy()))

    # 3. Merge a patch that is asked often: plain layers, as fast as the unpatched network, for a copy of its weights.
    patches.merge("parity")
    print(f"merged, logits differ by at most {np.abs(patches('parity', images) - answers['parity']).max():.1e}")
    patches.unmerge("parity")
    print("unmerged, logits are equal:", np.array_equal(patches("parity", images), answers["parity"]))

    # 4. Delete a task: its patch is freed, the other one goes on.
    patches.delete("parity")
    print("left:", ", ".join(patches.names))


if __name__ == "__main__":
    main()
