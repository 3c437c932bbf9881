"""Speed of training on one machine, as ratios of medians measured in turns within one run.

    python benchmarks/local.py [--rounds 7] [--steps 8] [--image_size 96] [--batch_size 32]

MobileNetV2 0.35, random weights, random images: speed does not depend on them. The last line is one JSON object:

* `engine_over_loop`: the engine's step over a hand-written `tf.function` loop with Keras' Adam on the same model;
* `scale_bias_over_full`: a scale-and-bias step over a full fine-tuning step, both by the engine;
* `cached_head_speedup`: an epoch of head-only training that computes features, over one on cached features.
"""

import argparse
import json
import os
import statistics
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf

from k4p1 import backbones, data
from k4p1.engine import OptimizerConfig, Store, plan_groups
from k4p1.engine.pure import PureTask
from k4p1.engine.step import Pace, training_step
from k4p1.patches.apply import apply_patches
from k4p1.tasks.cached_features import CachedFeatures
from k4p1.tasks.loss import TaskLoss
from k4p1.tasks.objectives import CLASSIFICATION

CLASSES = 10
HEAD_IMAGES = 512


def random_batches(image_size, batch_size):
    """One batch, repeated: the pipeline is not what is measured."""
    random = np.random.default_rng(0)
    batch = {
        "inputs": random.integers(0, 256, (batch_size, image_size, image_size, 3), np.uint8),
        "label": random.integers(0, CLASSES, batch_size),
        "weight": np.ones(batch_size, np.float32),
    }
    return tf.data.Dataset.from_tensors(batch).cache().repeat().prefetch(2)


def engine_stepper(patched, batches, steps=10**9):
    """One step of the engine on a patched model."""
    optimizer = OptimizerConfig(schedule="constant")
    groups = plan_groups({"task": patched}, optimizer.resolved())
    store = Store(groups, {"task": steps})
    task = PureTask("task", patched, groups)
    step = training_step(
        task, store, TaskLoss.of("softmax_cross_entropy", CLASSIFICATION), optimizer.schedule, Pace(steps, (1.0,), 0, 0)
    )
    function, iterator = tf.function(lambda iterator: step(next(iterator))), iter(batches)
    return lambda: float(function(iterator).loss)


def loop_stepper(model, batches):
    """What one writes by hand: gradient tape, Keras' Adam, one tf.function."""
    optimizer = keras.optimizers.Adam(1e-3)
    optimizer.build(model.trainable_variables)
    loss_function = keras.losses.SparseCategoricalCrossentropy(from_logits=True)

    @tf.function
    def step(iterator):
        batch = next(iterator)
        with tf.GradientTape() as tape:
            loss = loss_function(batch["label"], model(batch["inputs"], training=True))
        variables = model.trainable_variables
        optimizer.apply_gradients(zip(tape.gradient(loss, variables), variables, strict=True))
        return loss

    iterator = iter(batches)
    return lambda: float(step(iterator))


def medians(contestants, rounds, steps):
    """Median seconds a step of each contestant, in turns; the first round, which traces, does not count."""
    times = {name: [] for name in contestants}
    for round_ in range(rounds + 1):
        for name, stepper in contestants.items():
            start = time.perf_counter()
            for _ in range(steps):
                stepper()
            if round_:
                times[name].append((time.perf_counter() - start) / steps)
    found = {name: statistics.median(values) for name, values in times.items()}
    for name, seconds in found.items():
        print(f"{name}: {1000 * seconds:.2f} ms", flush=True)
    return found


def head_epochs(backbone, image_size, batch_size):
    """Epochs of head-only training, with and without cached features."""
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (HEAD_IMAGES, image_size, image_size, 3), np.uint8)
    source = data.Arrays({"train": (images, random.integers(0, CLASSES, HEAD_IMAGES))}, range(CLASSES))
    splits = data.Splits(source, validation_fraction=0.0)
    patched = apply_patches(backbone, "head", classes=CLASSES, image_size=image_size)
    pipeline = data.Pipeline(source, splits, patched.image_size, batch_size, CLASSES)
    cached = CachedFeatures(pipeline, patched)
    steps = pipeline.examples("train") // batch_size

    def epoch_of(stepper):
        return lambda: [stepper() for _ in range(steps)]

    return {
        "head epoch, features recomputed": epoch_of(engine_stepper(patched, pipeline.training())),
        "head epoch, features cached": epoch_of(engine_stepper(cached.patched, cached.training())),
    }


def main():
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name, default in (("rounds", 7), ("steps", 8), ("image_size", 96), ("batch_size", 32)):
        parser.add_argument(f"--{name}", type=int, default=default)
    a = parser.parse_args()
    build = {"classes": CLASSES, "image_size": a.image_size}
    batches = random_batches(a.image_size, a.batch_size)

    trained = apply_patches(backbones.mobilenet_v2(width=0.35), "scale_bias+head", shared_trained=True, **build)
    by_hand = apply_patches(backbones.mobilenet_v2(width=0.35), "scale_bias+head", shared_trained=True, **build)
    found = medians(
        {"engine step": engine_stepper(trained, batches), "hand-written loop": loop_stepper(by_hand.model, batches)},
        a.rounds,
        a.steps,
    )
    ratios = {"engine_over_loop": found["engine step"] / found["hand-written loop"]}

    backbone = backbones.mobilenet_v2(width=0.35)
    patched = {spec: apply_patches(backbone, spec, **build) for spec in ("scale_bias+head", "full")}
    found = medians({f"step of {spec}": engine_stepper(p, batches) for spec, p in patched.items()}, a.rounds, a.steps)
    ratios["scale_bias_over_full"] = found["step of scale_bias+head"] / found["step of full"]

    found = medians(head_epochs(backbone, a.image_size, a.batch_size), max(2, a.rounds // 2), 1)
    ratios["cached_head_speedup"] = found["head epoch, features recomputed"] / found["head epoch, features cached"]
    print(json.dumps({name: round(value, 3) for name, value in ratios.items()}))


if __name__ == "__main__":
    main()
