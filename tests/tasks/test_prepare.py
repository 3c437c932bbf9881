"""Preparing the tasks of a run: names, heads, step targets, seeds."""

import keras
import numpy as np
import pytest

from k4p1 import errors
from k4p1.data import Arrays
from k4p1.tasks import Task, prepare_tasks


def arrays(labels=("a", "b"), train=40):
    images = np.random.default_rng(0).integers(0, 256, (train, 16, 16, 3))
    numbers = np.arange(train) % len(labels)
    return Arrays({"train": (images, numbers), "test": (images[:8], numbers[:8])}, labels)


def make_task(name="t", **fields):
    return Task(**{"name": name, "data": arrays(), "image_size": 16, "batch_size": 8, "patch": "head", **fields})


def prepare(backbone, *tasks, **options):
    return prepare_tasks(backbone, tasks, **{"shared_trained": False, "steps": 5, **options})


def head_values(prepared):
    return keras.ops.convert_to_numpy(prepared.patched.head.kernel)


def test_a_name_used_twice(small_backbone):
    with pytest.raises(errors.ConfigError, match="task name 'twin' is used twice"):
        prepare(small_backbone, make_task("twin"), make_task("other"), make_task("twin"))


def test_no_task(small_backbone):
    with pytest.raises(errors.ConfigError, match="a run needs at least one task"):
        prepare(small_backbone)


def test_what_a_prepared_task_knows(small_backbone):
    (task,) = prepare(small_backbone, make_task(data=arrays(("x", "y", "z"))))
    assert task.name == "t"
    assert task.labels == ("x", "y", "z")
    assert task.patched.model.output.shape == (None, 3)
    assert task.patched.image_size == (16, 16)
    assert {split: task.splits.size(split) for split in ("train", "validation", "test")} == {
        "train": 36,
        "validation": 4,
        "test": 8,
    }
    assert task.steps == 5


def test_step_targets_differ_by_weight_steps_and_epochs(small_backbone):
    tasks = (make_task("a"), make_task("b", turn_weight=2.0), make_task("c", steps=3), make_task("d", epochs=2))
    assert [task.steps for task in prepare(small_backbone, *tasks)] == [5, 10, 3, 9]


class TestSharedHead:
    spec = "scale_bias+head(mode=shared)"

    def test_tasks_with_the_same_labels_share_one_head(self, small_backbone):
        tasks = [make_task("a", patch=self.spec), make_task("b", patch=self.spec, image_size=24)]
        first, second = prepare(small_backbone, *tasks, shared_trained=True)
        assert first.patched.head.kernel is second.patched.head.kernel
        assert not any(p.owner == "private" and "head" in p.key for p in second.patched.parameters)

    def test_tasks_with_other_labels_have_another(self, small_backbone):
        tasks = [make_task("a", patch=self.spec), make_task("b", patch=self.spec, data=arrays(("c", "d")))]
        first, second = prepare(small_backbone, *tasks, shared_trained=True)
        assert first.patched.head.kernel is not second.patched.head.kernel

    def test_a_task_with_its_own_head_keeps_it(self, small_backbone):
        tasks = [make_task("a", patch=self.spec), make_task("b"), make_task("c", patch="none")]
        shared, own, none = prepare(small_backbone, *tasks, shared_trained=True)
        assert own.patched.head.kernel is not shared.patched.head.kernel
        assert none.patched.head.kernel is shared.patched.head.kernel


class TestSeeds:
    def test_heads_and_order_follow_seed_and_name(self, small_backbone):
        def prepared(seed, name):
            (task,) = prepare(small_backbone, make_task(name), seed=seed)
            return head_values(task).tobytes(), next(iter(task.pipeline.training()))["inputs"].numpy().tobytes()

        head, order = prepared(0, "t")
        assert prepared(0, "t") == (head, order)
        for other in (prepared(1, "t"), prepared(0, "u")):
            assert other[0] != head
            assert other[1] != order

    def test_tasks_on_the_same_data_hold_out_the_same_images(self, small_backbone):
        first, second = prepare(small_backbone, make_task("a"), make_task("b"), seed=3)
        for split in ("train", "validation", "test"):
            (one,), (other,) = first.splits.parts(split), second.splits.parts(split)
            np.testing.assert_array_equal(one.keep, other.keep)


class TestOnlyHeadTrains:
    @pytest.mark.parametrize(
        ("fields", "shared_trained", "expected"),
        [
            ({"patch": "head"}, False, True),
            ({"patch": "head", "augment": "flip"}, False, False),
            ({"patch": "scale_bias+head"}, False, False),
            ({"patch": "head"}, True, False),
            ({"patch": "head(mode=random)"}, False, False),
            ({"patch": "scale_bias(affine=frozen)+head"}, False, False),
        ],
    )
    def test_is_known(self, small_backbone, fields, shared_trained, expected):
        (task,) = prepare(small_backbone, make_task(**fields), shared_trained=shared_trained)
        assert task.only_head_trains() is expected


class TestRefusals:
    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            (
                {"loss": "softmax_crossentropy"},
                r"unknown loss term .* 'softmax_crossentropy'; did you mean 'softmax_cross_entropy'",
            ),
            ({"metrics": ("acuracy",)}, r"unknown metric .* 'acuracy'; did you mean 'accuracy'"),
            ({"label_smoothing": 1.0}, r"label_smoothing=1.0; expected a number in \[0, 1\)"),
            ({"augment": "flop"}, "unknown augmentation 'flop'; did you mean 'flip'"),
            ({"validation_fraction": 1.5}, r"validation_fraction=1.5; expected a number in \[0, 1\)"),
        ],
    )
    def test_settings(self, small_backbone, fields, message):
        with pytest.raises(errors.ConfigError, match=message):
            prepare(small_backbone, make_task(**fields))

    def test_data_that_does_not_exist(self, small_backbone):
        with pytest.raises(errors.DataError, match="unknown embedded data set 'digit'; did you mean 'digits'"):
            prepare(small_backbone, make_task(data="embedded/digit"))

    def test_an_image_too_small_for_the_network(self, inception):
        with pytest.raises(errors.ConfigError, match="image size 16x16 is too small for InceptionV3: at least 75 pixels"):
            prepare(inception, make_task())
