"""A run of small tasks, built in milliseconds."""

import dataclasses

import numpy as np
import pytest
import tensorflow as tf

from k4p1.engine import OptimizerConfig, Store, plan_groups
from k4p1.engine.bookkeeping import TrainingTask
from k4p1.engine.pure import PureTask
from k4p1.engine.reporting import Reporter
from k4p1.engine.training import Trainer
from k4p1.patches.apply import apply_patches
from k4p1.tasks.loss import TaskLoss
from k4p1.tasks.objectives import CLASSIFICATION

CLASSES, SIZE, BATCH = 3, 16, 8

LOSS = TaskLoss.of("softmax_cross_entropy", CLASSIFICATION)


def batches(start_step=0, seed=0, bad_from=None):
    """Endless batches, each a function of (seed, step): the label is the brightest channel."""

    def make(step):
        drawn = tf.random.stateless_uniform([BATCH, SIZE, SIZE, 3], tf.stack([seed, tf.cast(step, tf.int32)]), 0, 200)
        label = tf.cast(step, tf.int64) + tf.range(BATCH, dtype=tf.int64)
        inputs = drawn + 55.0 * tf.one_hot(label % 3, 3)[:, None, None, :]
        if bad_from is not None:
            inputs = tf.where(step >= bad_from, float("nan"), inputs)
        return {"inputs": inputs, "label": label % CLASSES, "weight": tf.ones([BATCH])}

    return tf.data.Dataset.range(start_step, 10**9).map(make)


@dataclasses.dataclass
class SmallRun:
    """Tasks `a` and `b` on one backbone."""

    backbone: object
    patched: dict
    groups: list
    store: Store
    optimizer: OptimizerConfig
    steps: dict

    def trainer(self, checkpoints=None, bad_from=None, evaluate_every=10**6, checkpoint_every=10**6, loss_scaled=False):
        tasks = [
            TrainingTask(
                pure=PureTask(name, self.patched[name], self.groups),
                steps=self.steps[name],
                epochs=1.0,
                batches=lambda start, seed=index: batches(start, seed, bad_from),
                loss=LOSS,
                loss_terms=LOSS.names,
                metrics={**CLASSIFICATION.measured(("accuracy",)), **LOSS.metrics()},
                selecting="accuracy",
                validation=lambda: batches(0, 99).take(2),
                calibration=lambda: batches(0, 7),
                schedule=self.optimizer.schedule,
            )
            for index, name in enumerate(self.steps)
        ]
        return Trainer(
            tasks,
            self.store,
            Reporter(self.steps, quiet=True),
            checkpoints,
            evaluate_every=evaluate_every,
            checkpoint_every=checkpoint_every,
            loss_scaled=loss_scaled,
        )


@pytest.fixture
def make_run(small_backbone):
    def make(specs=None, steps=None, optimizer=None, shared_trained=True, backbone=None, loss_scaled=False, dropout=0.0):
        backbone = backbone or small_backbone
        specs = specs or {"a": "scale_bias+head", "b": "scale_bias+head"}
        optimizer = optimizer or OptimizerConfig(learning_rate=1e-2)
        patched = {
            name: apply_patches(
                backbone,
                spec,
                classes=CLASSES,
                image_size=SIZE,
                shared_trained=shared_trained,
                seed=index,
                dropout=dropout,
                name=name,
            )
            for index, (name, spec) in enumerate(specs.items())
        }
        groups = plan_groups(patched, optimizer.resolved())
        steps = steps or dict.fromkeys(specs, 6)
        store = Store(groups, steps, loss_scaled)
        return SmallRun(backbone, patched, groups, store, optimizer, steps)

    return make


def moved(before, after):
    """Names of the vectors that changed."""
    return {name for name in before if not np.array_equal(before[name], after[name])}
