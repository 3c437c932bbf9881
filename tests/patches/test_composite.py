"""Costly invariants, once a kind, on one net: a convolution, a depthwise and a 1x1 convolution, batch normalisation."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from k4p1 import backbones
from k4p1.engine import OptimizerConfig, Store, plan_groups
from k4p1.engine.pure import PureTask
from k4p1.engine.step import Pace, training_step
from k4p1.patches import known_kinds
from k4p1.patches.apply import apply_patches
from k4p1.serving.saved_model import export_task
from k4p1.tasks.loss import TaskLoss
from k4p1.tasks.objectives import CLASSIFICATION
from tests.conftest import small_model
from tests.engine.conftest import batches

SPECS = {
    "head": "head",
    "scale_bias": "scale_bias+head",
    "depthwise": "depthwise+head",
    "full": "full",
    "series_adapter": "series_adapter(layers=stem,dropout=0.5,dropout_block=all)+scale_bias+head",
    "parallel_adapter": "parallel_adapter(dropout=0.5,dropout_block=all)+scale_bias+head",
    "mask": "mask+scale_bias+head",
    "lora": "lora(rank=2)+head",
    "dan": "dan(layers=stem)+head",
    "nettailor": "nettailor(k=2,blocks=*_relu,live=1.m|2.1)+head",
    "packnet": "packnet+head",
}


def task_model(spec):
    backbone = backbones.from_model(small_model(), name="small", scaling="symmetric")
    return apply_patches(backbone, spec, classes=3, image_size=16, name="task")


def steps(patched, count, devices=(None,), loss_scaled=False, rate=0.05):
    """Losses of some steps, and the parameters behind them."""
    optimizer = OptimizerConfig(learning_rate=rate, schedule="constant", rules={"mask": {"learning_rate": 1e-3}})
    groups = plan_groups({"task": patched}, optimizer.resolved())
    store = Store(groups, {"task": count}, loss_scaled, devices)
    pure = PureTask("task", patched, groups)
    step = training_step(
        pure,
        store,
        TaskLoss.of("softmax_cross_entropy", CLASSIFICATION),
        optimizer.schedule,
        Pace(count, (1.0,), 0, 0),
        loss_scaled,
    )
    function = tf.function(step)
    losses = [float(function(batch).loss) for batch in batches().take(count)]
    return losses, store.vectors(), {group.name: group.initial() for group in groups}


def test_every_kind_is_here():
    assert set(SPECS) == set(known_kinds())


@pytest.mark.parametrize("kind", SPECS)
@pytest.mark.slow
def test_it_learns_and_a_store_in_shards_learns_the_same(kind):
    losses, vectors, before = steps(task_model(SPECS[kind]), 25)
    assert np.mean(losses[-5:]) < np.mean(losses[:5])
    sharded_losses, sharded, _ = steps(task_model(SPECS[kind]), 25, devices=("CPU:0", "CPU:0", "CPU:0"))
    np.testing.assert_allclose(sharded_losses, losses, rtol=1e-3, atol=1e-4)
    moved = 0
    for name, vector in vectors.items():
        np.testing.assert_allclose(sharded[name], vector, rtol=1e-2, atol=1e-3, err_msg=name)
        moved += not np.array_equal(vector, before[name])
    assert moved


@pytest.mark.parametrize("precision", ["mixed_float16", "mixed_bfloat16"])
@pytest.mark.parametrize("kind", SPECS)
@pytest.mark.slow
def test_it_learns_in_mixed_precision(kind, precision):
    keras.config.set_dtype_policy(precision)
    patched = task_model(SPECS[kind])
    losses, vectors, _ = steps(patched, 25, loss_scaled=precision == "mixed_float16")
    assert np.all(np.isfinite(losses)) and np.mean(losses[-5:]) < np.mean(losses[:5])
    assert all(vector.dtype == np.float32 and np.isfinite(vector).all() for vector in vectors.values())


@pytest.mark.parametrize("kind", SPECS)
@pytest.mark.slow
def test_its_saved_model_computes_the_same(kind, tmp_path):
    patched = task_model(SPECS[kind])
    random = np.random.default_rng(2)
    for key, variable in patched.private().items():
        values = random.normal(0.0, 0.3, variable.shape)
        variable.assign(0.5 + np.abs(values) if key.endswith(("gamma", "variance")) else values)
    path, difference = export_task(patched.model, (16, 16), ("a", "b", "c"), tmp_path)
    assert difference < 1e-4
    images = random.integers(0, 256, (4, 16, 16, 3)).astype("uint8")
    served = tf.saved_model.load(str(path)).signatures["serving_default"](images=tf.constant(images))["logits"]
    expected = np.array(patched.model(images))
    np.testing.assert_allclose(served, expected, atol=1e-4 * max(1.0, np.abs(expected).max()))
    listed = tf.train.list_variables(str(path / "variables" / "variables"))
    stored = sum(np.prod(shape) for name, shape in listed if "VARIABLE_VALUE" in name)
    backbone = sum(np.prod(v.shape) for v in small_model().variables)
    assert stored <= backbone + 9 * 3 + 6 + 6 + 8  # a head and biases; no scores, no factors


@pytest.mark.parametrize("kind", SPECS)
@pytest.mark.slow
def test_keras_saves_and_loads_it(kind, tmp_path, images):
    patched = task_model(SPECS[kind])
    expected = np.array(patched.model(images))
    patched.model.save(tmp_path / "task.keras")
    loaded = keras.saving.load_model(tmp_path / "task.keras")
    np.testing.assert_array_equal(loaded(images), expected)
