"""Metrics over a split, and population statistics."""

import numpy as np
import pytest
import tensorflow as tf

from k4p1 import errors
from k4p1.engine.evaluation import Evaluator
from k4p1.engine.population import PopulationStatistics
from k4p1.engine.pure import PureTask
from k4p1.patches.apply import apply_patches
from k4p1.tasks.objectives import CLASSIFICATION
from tests.engine.conftest import LOSS, batches, moved

METRICS = {**CLASSIFICATION.measured(("accuracy",)), **LOSS.metrics()}


def forward_statistics(patched, run, data):
    population = PopulationStatistics([PureTask("a", patched, run.groups)], {"a": lambda: data})
    (group,) = [g for g in run.groups if g.role == "statistics"]
    return group.packing.unpack_numpy(population(run.store.vectors(), 100)[group.name])


def test_recalibration_gives_the_statistics_of_the_whole_population(make_run):
    """Of the first layer, whose input does not depend on batches: mean and variance over all images at once."""
    run = make_run({"a": "scale_bias+head"})
    data = list(batches().take(5))
    found = forward_statistics(run.patched["a"], run, data)
    everything = tf.concat([b["inputs"] for b in data], 0)
    stem = run.backbone.model.get_layer("stem")
    activations = stem(everything / 127.5 - 1.0).numpy()
    np.testing.assert_allclose(found["stem_bn/scale_bias/moving_mean"], activations.mean((0, 1, 2)), atol=1e-5)
    np.testing.assert_allclose(found["stem_bn/scale_bias/moving_variance"], activations.var((0, 1, 2)), rtol=1e-4, atol=1e-6)


def test_variance_contains_the_part_between_batches(make_run):
    """Batches of black and of white images: within each the variance of the first layer's output is almost 0."""
    run = make_run({"a": "scale_bias+head"})
    flat = [{"inputs": tf.fill([8, 16, 16, 3], value)} for value in (0.0, 255.0)]
    found = forward_statistics(run.patched["a"], run, flat)
    single = forward_statistics(run.patched["a"], run, flat[:1])
    assert np.all(found["stem_bn/scale_bias/moving_variance"] > single["stem_bn/scale_bias/moving_variance"])
    assert found["stem_bn/scale_bias/moving_variance"].max() > 0.01


@pytest.mark.parametrize("spec", ["scale_bias(statistics=frozen)+head", "scale_bias(recalibrate=false)+head", "head"])
def test_frozen_statistics_are_never_recalibrated(make_run, spec):
    run = make_run({"a": spec}, shared_trained=False)
    population = PopulationStatistics([PureTask("a", run.patched["a"], run.groups)], {"a": lambda: batches().take(2)})
    before = run.store.vectors()
    assert not moved(before, population(before, 2))


def test_statistics_that_tasks_share_are_those_of_all_their_images(make_run):
    """Task a sees black images, task b white ones: the shared variance of the first layer is that of both together."""
    run = make_run({"a": "head", "b": "head"})
    data = {name: [{"inputs": tf.fill([8, 16, 16, 3], value)}] for name, value in (("a", 0.0), ("b", 255.0))}
    tasks = [PureTask(name, run.patched[name], run.groups) for name in data]
    found = PopulationStatistics(tasks, {name: lambda b=b: b for name, b in data.items()})(run.store.vectors(), 1)
    (group,) = [g for g in run.groups if g.role == "statistics"]
    statistics = group.packing.unpack_numpy(found[group.name])
    everything = tf.concat([b[0]["inputs"] for b in data.values()], 0)
    activations = run.backbone.model.get_layer("stem")(everything / 127.5 - 1.0).numpy()
    np.testing.assert_allclose(statistics["stem_bn/moving_mean"], activations.mean((0, 1, 2)), atol=1e-4)
    np.testing.assert_allclose(statistics["stem_bn/moving_variance"], activations.var((0, 1, 2)), rtol=1e-3)


def test_corrupt_images_do_not_count(make_run):
    run = make_run({"a": "head"})
    evaluator = Evaluator(PureTask("a", run.patched["a"], run.groups), METRICS)
    batch = next(iter(batches()))
    half = {**batch, "weight": tf.constant([1.0] * 4 + [0.0] * 4)}
    first = {name: value[:4] for name, value in batch.items()}
    vectors = run.store.vectors()
    assert evaluator(vectors, [half]) == pytest.approx(evaluator(vectors, [first]))
    with pytest.raises(errors.DataError, match="no image"):
        evaluator(vectors, [{**batch, "weight": tf.zeros(8)}])


def test_evaluation_uses_the_vectors_that_it_is_given(make_run):
    run = make_run({"a": "scale_bias+head"})
    evaluator = Evaluator(PureTask("a", run.patched["a"], run.groups), METRICS)
    data = list(batches().take(2))
    before = evaluator(run.store.vectors(), data)
    run.trainer().run()
    assert evaluator(run.store.vectors(), data)["loss"] != before["loss"]
    fresh = apply_patches(run.backbone, "head", classes=3, image_size=16)
    assert fresh.recalibrated == frozenset()


@pytest.mark.parametrize("of_shared", ["mean", "moving"])
def test_shared_statistics_without_the_variance_between_tasks(make_run, of_shared):
    """The mean of what the tasks measure, or the moving averages as they are."""
    run = make_run({"a": "head", "b": "head"})
    data = {name: [{"inputs": tf.fill([8, 16, 16, 3], value)}] for name, value in (("a", 0.0), ("b", 255.0))}
    tasks = {name: PureTask(name, run.patched[name], run.groups) for name in data}
    by_task = {name: lambda b=b: b for name, b in data.items()}
    before = run.store.vectors()
    (group,) = [g for g in run.groups if g.role == "statistics"]
    alone = [PopulationStatistics([task], by_task)(before, 1)[group.name] for task in tasks.values()]
    found = PopulationStatistics(list(tasks.values()), by_task)(before, 1, of_shared)[group.name]
    np.testing.assert_allclose(found, np.mean(alone, axis=0) if of_shared == "mean" else before[group.name], rtol=1e-6)
    pooled = PopulationStatistics(list(tasks.values()), by_task)(before, 1)[group.name]
    variances = [group.packing.unpack_numpy(v)["stem_bn/moving_variance"] for v in (pooled, found)]
    assert (variances[0] != variances[1]).all()
