"""Time of a training step with each patch kind over full fine-tuning, as ratios of medians measured in turns in one run.

    python benchmarks/patches.py [--depth 20] [--rounds 7] [--steps 8] [--image_size 32] [--batch_size 32]

The CIFAR residual net, random weights, random images: speed does not depend on them. Every step also trains a head; `_bn`
has scale_bias, too, as `full` has (it owns its batch normalisation). The last line is one JSON object of
`<kind>_over_full`. Bounds: `mask_over_full` at most 1.25, `parallel_adapter_over_full` at most 1.35.
"""

import argparse
import json

from local import CLASSES, engine_stepper, medians, random_batches

from k4p1 import backbones
from k4p1.patches.apply import apply_patches

SPECS = {
    "full": "full",
    "mask": "mask+scale_bias+head",
    "mask_frozen_bn": "mask+head",
    "parallel_adapter": "parallel_adapter+scale_bias+head",
    "parallel_adapter_dropout": "parallel_adapter(dropout=0.5,dropout_block=all)+scale_bias+head",
    "series_adapter": "series_adapter+scale_bias+head",
    "lora": "lora+scale_bias+head",
    "dan": "dan+scale_bias+head",
    "scale_bias": "scale_bias+head",
}


def main():
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name, default in (("depth", 20), ("rounds", 7), ("steps", 8), ("image_size", 32), ("batch_size", 32)):
        parser.add_argument(f"--{name}", type=int, default=default)
    a = parser.parse_args()
    batches = random_batches(a.image_size, a.batch_size)
    backbone = backbones.cifar_resnet(depth=a.depth)
    steppers = {
        name: engine_stepper(apply_patches(backbone, spec, classes=CLASSES, image_size=a.image_size), batches)
        for name, spec in SPECS.items()
    }
    found = medians(steppers, a.rounds, a.steps)
    print(json.dumps({f"{name}_over_full": round(found[name] / found["full"], 3) for name in SPECS if name != "full"}))


if __name__ == "__main__":
    main()
