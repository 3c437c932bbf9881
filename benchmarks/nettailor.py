"""What a tailored network costs: the exported model against the full one, and a student's step against a full one.

python benchmarks/nettailor.py [--model_dir DIR --task T]; the last line is JSON. Without a run it prunes a ResNet-20 to five
of nine blocks with one proxy for each of the others, 32 px, random weights: latency does not depend on them.
"""

import argparse
import json
import statistics
import time

import numpy as np
import tensorflow as tf

from k4p1 import backbones
from k4p1.engine import OptimizerConfig, plan_groups
from k4p1.engine.pure import PureTask
from k4p1.engine.schedules import Constant
from k4p1.engine.step import Pace, training_step
from k4p1.engine.store import Store
from k4p1.patches.apply import apply_patches
from k4p1.patches.fold import fold
from k4p1.runs.model_dir import ModelDir
from k4p1.tasks import attached_terms
from k4p1.tasks.distillation import Teacher
from k4p1.tasks.loss import TaskLoss, parse
from k4p1.tasks.objectives import CLASSIFICATION

LIVE = "1.m|2.1|3.m|4.m|5.4|6.m|7.m|8.7|9.8"
LOSS = "softmax_cross_entropy + 0.3*complexity + 10*block_distillation(teacher=t)"


def interleaved(functions, rounds=15):
    """Median seconds of each function, called in turn, so that other load meets all of them."""
    for function in functions:
        function()
    times = [[] for _ in functions]
    for _ in range(rounds):
        for function, taken in zip(functions, times, strict=True):
            start = time.perf_counter()
            function()
            taken.append(time.perf_counter() - start)
    return [statistics.median(taken) for taken in times]


def inference(model, batch):
    """A call of a folded model on a batch."""
    call = tf.function(lambda x: fold_of(x, training=False), reduce_retracing=True)
    fold_of = fold(model)
    return lambda: call(batch)


def step_of(patched, loss, batch):
    """A training step of a task model."""
    groups = plan_groups({"t": patched}, OptimizerConfig(learning_rate=1e-6).resolved())
    store = Store(groups, {"t": 10**6})
    step = training_step(PureTask("t", patched, groups), store, loss, Constant(), Pace(10**6, (1.0,), 0, 0))
    compiled = tf.function(step)
    return lambda: compiled(batch).loss.numpy()


def main():
    """Prints both ratios."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model_dir")
    parser.add_argument("--task")
    given = parser.parse_args()
    if given.model_dir:
        folder = ModelDir(given.model_dir)
        backbone = folder.load_backbone()
        tailored = folder.load_task(given.task, backbone)
    else:
        backbone = backbones.cifar_resnet(depth=20)
        tailored = apply_patches(backbone, f"nettailor(live={LIVE})+head", classes=43, image_size=32)
    size, classes = tailored.image_size, tailored.model.output.shape[-1]
    full = apply_patches(backbone, "head", classes=classes, image_size=size)
    batch = tf.constant(np.random.default_rng(0).integers(0, 256, (32, *size, 3)), tf.float32)
    lean, whole = interleaved([inference(tailored.model, batch), inference(full.model, batch)], rounds=40)
    facts = tailored.rewiring.facts()
    share = facts["live_multiply_adds"] / facts["backbone_multiply_adds"]

    labels = tuple(map(str, range(classes)))
    student = apply_patches(backbone, "nettailor(k=3)+head", classes=classes, image_size=size)
    private = apply_patches(backbone, "full", classes=classes, image_size=size)
    terms = parse(LOSS, CLASSIFICATION, {})
    attached = {}
    for number, term in enumerate(terms):
        if term.name in attached_terms.OPTIONS:
            teachers = {"t": Teacher("t", private, labels, "", "t")}
            how = {"task": "t", "labels": labels, "teachers": teachers, "fingerprint": ""}
            student, attached[number] = attached_terms.attach(student, term.name, term.options, number=number, **how)
    examples = {"inputs": batch, "label": tf.zeros(32, tf.int32), "weight": tf.ones(32)}
    steps = [
        step_of(student, TaskLoss(terms, CLASSIFICATION, attached), examples),
        step_of(private, TaskLoss.of("softmax_cross_entropy", CLASSIFICATION), examples),
    ]
    student_step, full_step = interleaved(steps)
    result = {
        "latency_ms": 1e3 * lean,
        "full_latency_ms": 1e3 * whole,
        "multiply_adds_share": share,
        "tailored_latency_over_macs_share": lean / whole / share,
        "student_step_over_full": student_step / full_step,
    }
    print(json.dumps({name: round(value, 4) for name, value in result.items()}))


if __name__ == "__main__":
    main()
