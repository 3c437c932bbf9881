"""What a task costs at inference: ratios of medians, in one run; the last line is one JSON object.

    python benchmarks/serving.py [--rounds 30]

* exported_over_folded: an exported task over the same network built by hand with biases and without normalisation;
* normalised_over_exported: the task with its batch normalisations left as they were, over the exported one.

MobileNetV2 0.35 at 96 px, scale_bias+head, batch 32.
"""

import argparse
import json
import statistics
import tempfile
import time

import keras
import numpy as np
import tensorflow as tf

import k4p1
from k4p1.patches.fold import fold
from k4p1.serving import saved_model

BATCH, SIZE, CLASSES = 32, 96, 43


def by_hand(width: float = 0.35) -> keras.Model:
    """MobileNetV2 with biases in place of batch normalisations, of random weights; its time does not depend on them."""
    with_normalisation = keras.applications.MobileNetV2(
        (SIZE, SIZE, 3), width, include_top=False, weights=None, pooling="avg"
    )
    layers = keras.layers

    def called(layer, *args, **kwargs):
        if isinstance(layer, layers.BatchNormalization):
            return args[0]
        if isinstance(layer, (layers.Conv2D, layers.DepthwiseConv2D)):
            layer = type(layer).from_config({**layer.get_config(), "use_bias": True})
        return layer(*args, **kwargs)

    image = keras.Input((SIZE, SIZE, 3))
    scaled = layers.Rescaling(1 / 127.5, -1.0)(image)
    features = keras.models.clone_model(with_normalisation, call_function=called)(scaled)
    return keras.Model(image, layers.Dense(CLASSES)(features))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=30)
    rounds = parser.parse_args().rounds
    task = k4p1.apply_patches(k4p1.mobilenet_v2(width=0.35), "scale_bias+head", classes=CLASSES, image_size=SIZE)
    labels = [str(number) for number in range(CLASSES)]
    with tempfile.TemporaryDirectory() as folder:
        path, _ = saved_model.export_task(task.model, (SIZE, SIZE), labels, folder)
        exported = tf.saved_model.load(str(path)).signatures["serving_default"]
    images = tf.constant(np.random.default_rng(0).integers(0, 256, (BATCH, SIZE, SIZE, 3), np.uint8))
    plain, folded = by_hand(), fold(task.model)
    programs = {
        "exported": lambda: exported(images=images),
        "folded": compiled(plain, images),
        "normalised": compiled(folded, images),
    }
    times = {name: [] for name in programs}
    for number in range(rounds + 3):
        for name, program in programs.items():
            begin = time.perf_counter()
            keras.tree.map_structure(lambda t: t.numpy(), program())
            if number >= 3:
                times[name].append(time.perf_counter() - begin)
    median = {name: statistics.median(values) for name, values in times.items()}
    for name, seconds in median.items():
        print(f"{name}: {1000 * seconds:.1f} ms")
    ratios = {
        "exported_over_folded": median["exported"] / median["folded"],
        "normalised_over_exported": median["normalised"] / median["exported"],
    }
    print(json.dumps({name: round(ratio, 3) for name, ratio in ratios.items()}))


def compiled(model: keras.Model, images: tf.Tensor):
    """A call of a model as a graph, with the answers that an export gives."""

    @tf.function
    def answers(images):
        logits = model(tf.cast(images, tf.float32), training=False)
        return {"logits": logits, "probabilities": tf.nn.softmax(logits)}

    return lambda: answers(images)


if __name__ == "__main__":
    main()
