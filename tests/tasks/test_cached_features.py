"""Features computed once, for tasks of which only the head trains."""

import numpy as np
import pytest
import tensorflow as tf

from k4p1.data import Arrays
from k4p1.tasks import Task, prepare_tasks
from k4p1.tasks.cached_features import CachedFeatures

EXAMPLES = 20
BATCH = 6


@pytest.fixture
def prepared(small_backbone):
    """A head-only task on 20 training images."""
    images = np.random.default_rng(0).integers(0, 256, (EXAMPLES, 16, 16, 3))
    numbers = np.arange(EXAMPLES) % 3
    data = Arrays({"train": (images, numbers), "test": (images[:4], numbers[:4])}, ("a", "b", "c"))
    task = Task(name="t", data=data, image_size=16, batch_size=BATCH, patch="head", validation_fraction=0)
    return prepare_tasks(small_backbone, [task], shared_trained=False, steps=4)[0]


def cached(prepared, **options):
    return CachedFeatures(prepared.pipeline, prepared.patched, **options)


def take(data, count):
    return [{key: value.numpy() for key, value in batch.items()} for batch in data.take(count)]


def test_the_head_on_features_is_the_full_model_on_images(prepared):
    features = cached(prepared)
    batches = zip(features.sequential("train"), prepared.pipeline.sequential("train"), strict=True)
    for batch, images in batches:
        np.testing.assert_array_equal(batch["label"], images["label"])
        np.testing.assert_allclose(
            features.patched.model(batch["inputs"]),
            prepared.patched.model(images["inputs"], training=False),
            rtol=1e-5,
            atol=1e-5,
        )


def test_the_head_trained_on_features_is_that_of_the_task(prepared):
    features = cached(prepared)
    trained = {p.key: p.variable for p in features.patched.parameters}
    assert set(trained) == {"head/head/kernel", "head/head/bias"}
    whole = prepared.patched.private()
    assert all(variable is whole[key] for key, variable in trained.items())
    trained["head/head/bias"].assign([5.0, 0.0, -5.0])
    image = np.zeros((1, 16, 16, 3), np.float32)
    assert int(np.argmax(prepared.patched.model(image)[0])) == 0


def test_every_example_comes_exactly_once_an_epoch(prepared):
    features = cached(prepared)
    rows = {row.tobytes() for batch in features.sequential("train") for row in batch["inputs"].numpy()}
    assert len(rows) == EXAMPLES
    shown = [row.tobytes() for batch in take(features.training(), 10) for row in batch["inputs"]]
    epochs = [shown[i : i + EXAMPLES] for i in (0, EXAMPLES, 2 * EXAMPLES)]
    assert all(set(epoch) == rows for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_resuming_at_a_step_equals_the_unbroken_run(prepared):
    unbroken = take(cached(prepared, seed=3).training(), 8)
    for step in (1, 3, 7):
        resumed = take(cached(prepared, seed=3).training(step), 8 - step)
        for before, after in zip(unbroken[step:], resumed, strict=True):
            np.testing.assert_array_equal(before["inputs"], after["inputs"])
            np.testing.assert_array_equal(before["label"], after["label"])


def test_the_seed_alone_gives_the_order(prepared):
    def order(seed):
        tf.random.set_seed(seed + 17)
        return take(cached(prepared, seed=seed).training(), 1)[0]["inputs"].tobytes()

    tf.random.set_seed(99)
    assert take(cached(prepared, seed=0).training(), 1)[0]["inputs"].tobytes() == order(0) != order(1)


def test_features_are_computed_once(prepared, monkeypatch):
    read = []
    whole = prepared.pipeline.sequential
    monkeypatch.setattr(prepared.pipeline, "sequential", lambda split: read.append(split) or whole(split))
    features = cached(prepared)
    for _ in range(2):
        take(features.training(), 1)
        take(features.sequential("train"), 1)
    assert read == ["train"]


def test_dropout_comes_before_the_head(prepared):
    features = cached(prepared, dropout=0.5)
    batch = take(features.sequential("train"), 1)[0]["inputs"]
    model = features.patched.model
    assert np.abs(model(batch, training=True) - model(batch, training=False)).max() > 1e-3
    np.testing.assert_array_equal(model(batch, training=False), cached(prepared).patched.model(batch))


def test_weights_of_corrupt_images_stay_zero(prepared, monkeypatch):
    def with_hole(split):
        for number, batch in enumerate(whole(split)):
            yield {**batch, "weight": batch["weight"] * tf.cast(tf.range(len(batch["label"])) != number, tf.float32)}

    whole = prepared.pipeline.sequential
    monkeypatch.setattr(prepared.pipeline, "sequential", with_hole)
    weights = np.concatenate([batch["weight"] for batch in take(cached(prepared).sequential("train"), 9)])
    assert list(np.flatnonzero(weights == 0)) == [0, 7, 14]
