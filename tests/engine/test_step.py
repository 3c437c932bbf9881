"""One step: which parameters move, at which rate, by which gradient."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from k4p1.engine import OptimizerConfig, fused_batch_normalization
from k4p1.engine.pure import PureTask
from k4p1.patches.patched_batch_normalization import normalise_batch
from tests.engine.conftest import batches, moved


def test_a_step_moves_only_its_own_groups(make_run):
    run = make_run()
    before = run.store.vectors()
    run.trainer().run(stop_after=1)  # task a
    changed = moved(before, run.store.vectors())
    expected = {g.name for g in run.groups if "a" in g.users}
    assert changed == expected
    assert run.store.done() == {"a": 1, "b": 0}


def test_transfer_learning_moves_private_parameters_only(make_run):
    run = make_run({"a": "scale_bias+depthwise+head"}, shared_trained=False)
    before = run.store.vectors()
    run.trainer().run()
    assert moved(before, run.store.vectors()) == {g.name for g in run.groups if g.owner == "a"}


def test_random_head_stays(make_run):
    run = make_run({"a": "scale_bias+head(mode=random)"}, shared_trained=False)
    before = run.store.vectors()
    run.trainer().run()
    head = {g.name for g in run.groups if g.kind == "head"}
    assert head and not head & moved(before, run.store.vectors())


def test_multipliers_scale_the_rate(make_run):
    updates, run = {}, None
    for factor in (1.0, 0.1):
        optimizer = OptimizerConfig(
            learning_rate=0.1, optimizer="sgd", schedule="constant", rate_factors={"head": factor, "shared": 0.0}
        )
        run = make_run({"a": "scale_bias+head"}, optimizer=optimizer, backbone=run and run.backbone)
        before = run.store.vectors()
        run.trainer().run(stop_after=1)
        after = run.store.vectors()
        head = next(g.name for g in run.groups if g.kind == "head")
        shared = next(g.name for g in run.groups if g.owner == "shared" and g.role == "trained")
        updates[factor] = after[head] - before[head]
        assert np.array_equal(before[shared], after[shared])
    np.testing.assert_allclose(updates[0.1], 0.1 * updates[1.0], rtol=1e-4, atol=1e-7)


def test_one_sgd_step_is_the_gradient_of_keras(make_run):
    """The engine's update equals tape, loss and SGD on the plain model."""
    optimizer = OptimizerConfig(learning_rate=0.5, optimizer="sgd", schedule="constant")
    run = make_run({"a": "scale_bias+head"}, optimizer=optimizer)
    model = run.patched["a"].model
    batch = next(iter(batches(0, 0)))
    loss_function = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    start = [v.numpy() for v in model.trainable_variables]
    with tf.GradientTape() as tape:
        loss = loss_function(batch["label"], model(batch["inputs"], training=True))
    gradients = tape.gradient(loss, model.trainable_variables)
    expected = {id(v): s - 0.5 * g.numpy() for v, s, g in zip(model.trainable_variables, start, gradients, strict=True)}
    run.trainer().run(stop_after=1)
    vectors = run.store.vectors()
    for group in run.groups:
        if group.role == "trained":
            values = group.packing.unpack_numpy(vectors[group.name]).values()
            for variable, value in zip(group.variables, values, strict=True):
                np.testing.assert_allclose(value, expected[id(variable)], atol=2e-5)


def test_adam_counts_the_updates_of_each_group(make_run):
    run = make_run(steps={"a": 4, "b": 2})
    run.trainer().run()
    counts = {g.name: int(run.store._updates[g.name].numpy()) for g in run.groups if g.role == "trained"}
    for group in run.groups:
        if group.role == "trained":
            assert counts[group.name] == sum(run.steps[user] for user in group.users)


def test_dropout_follows_the_ticket_and_is_not_stored(make_run):
    run = make_run({"a": "head"}, dropout=0.5)
    pure = PureTask("a", run.patched["a"], run.groups)
    vectors = {name: tf.constant(v) for name, v in run.store.vectors().items()}
    inputs = next(iter(batches()))["inputs"]
    seeds_before = [p.variable.numpy() for p in run.patched["a"].parameters if p.role == "random"]

    def logits(seed):
        return pure.forward(vectors, inputs, training=True, seed=tf.constant([7, seed])).outputs["logits"].numpy()

    assert np.array_equal(logits(1), logits(1))
    assert not np.array_equal(logits(1), logits(2))
    assert len(seeds_before) == 1
    np.testing.assert_array_equal(
        seeds_before[0], next(p.variable.numpy() for p in run.patched["a"].parameters if p.role == "random")
    )


@pytest.mark.parametrize("shape", [(4, 5, 5, 6), (2, 1, 1, 3)])
def test_fused_normalisation_is_the_plain_one(shape):
    random = np.random.default_rng(0)
    x = tf.constant(random.normal(2.0, 3.0, shape), tf.float32)
    gamma, beta = (tf.constant(random.normal(size=shape[-1]), tf.float32) for _ in range(2))
    weights = tf.constant(random.normal(size=shape), tf.float32)
    found = []
    for function in (normalise_batch, fused_batch_normalization.normalise_batch):
        with tf.GradientTape() as tape:
            tape.watch([x, gamma, beta])
            y, mean, variance = function(x, gamma, beta, -1, 1e-3)
            loss = tf.reduce_sum(weights * tf.sin(y))
        found.append([y, mean, variance, *tape.gradient(loss, [x, gamma, beta])])
    for plain, fused in zip(*found, strict=True):
        np.testing.assert_allclose(plain.numpy(), fused.numpy(), atol=2e-4)


def test_model_and_gradients_are_pinned_to_no_device(make_run):
    """Where there is a GPU they run on it; only tickets, int64 counters without a GPU kernel, are the CPU's."""
    run = make_run({"a": "scale_bias+head"})
    step = run.trainer()._steps["a"].get_concrete_function(iter(batches()))
    operations = step.graph.get_operations()
    pinned = {op.type for op in operations if op.device}
    model = {op.type for op in operations if "Conv2D" in op.type or "BatchNorm" in op.type or "Relu" in op.type}
    assert {"Conv2D", "Conv2DBackpropInput", "FusedBatchNormV3", "FusedBatchNormGradV3"} <= model
    assert not model & pinned
    assert "ResourceCountUpTo" in pinned


def test_a_step_without_a_ticket_changes_nothing(make_run):
    """Its other operations run beside the one that fails; none of them may update."""
    run = make_run({"a": "scale_bias+head"}, steps={"a": 2})
    trainer = run.trainer()
    trainer.run()
    before = run.store.snapshot()
    iterator = iter(batches())
    for _ in range(5):
        # The ticket fails; the data, cancelled by that, may be faster to report.
        with pytest.raises((tf.errors.OutOfRangeError, tf.errors.CancelledError)):
            trainer._steps["a"](iterator)
    after = run.store.snapshot()
    for name in before:
        np.testing.assert_array_equal(before[name], after[name], err_msg=name)
