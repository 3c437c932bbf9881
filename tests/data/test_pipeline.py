"""Order, resuming, corrupt images and operations of input pipelines."""

import itertools

import numpy as np
import pytest
import tensorflow as tf

from k4p1 import errors
from k4p1.data import Arrays, Pipeline, Source, Splits

EXAMPLES = 20
BATCH = 6
CORRUPT = (3, 11)


class EncodedSource(Source):
    """PNG files in memory, image i of the value 10 i everywhere; some of them cut off."""

    def __init__(self, corrupt=(), labels=None):
        self.name, self.labels = "encoded", ("a", "b", "c")
        self._encoded = [tf.io.encode_png(np.full((8, 8, 3), 10 * i, np.uint8)).numpy() for i in range(EXAMPLES)]
        for i in corrupt:
            self._encoded[i] = self._encoded[i][:20]
        self._labels = [i % 3 for i in range(EXAMPLES)] if labels is None else labels

    def sizes(self):
        return {"train": EXAMPLES, "test": 2}

    def examples(self, split):
        count = self.sizes()[split]
        labels = tf.constant(self._labels[:count], tf.int64)
        return tf.data.Dataset.from_tensor_slices({"image": self._encoded[:count], "label": labels})


class PythonSource(EncodedSource):
    """Reads its images in Python, which no source of k4p1 may do."""

    def examples(self, split):
        def read(example):
            return {**example, "image": tf.numpy_function(lambda image: image, [example["image"]], tf.string)}

        return super().examples(split).map(read)


def pixel_source():
    images = np.stack([np.full((8, 8, 3), 10 * i, np.uint8) for i in range(EXAMPLES)])
    labels = np.arange(EXAMPLES) % 3
    return Arrays({"train": (images, labels), "test": (images[:2], labels[:2])}, ("a", "b", "c"))


SOURCES = {"pixels": pixel_source, "encoded": EncodedSource}
"""The two forms in which sources give images."""


def make(source="encoded", **options):
    """A pipeline over all 20 training images."""
    source = SOURCES[source]() if isinstance(source, str) else source
    size = options.pop("image_size", (8, 8))
    return Pipeline(source, Splits(source, validation_fraction=0), size, BATCH, len(source.labels), **options)


def take(data, count):
    """The next batches, on the host."""
    return [{key: value.numpy() for key, value in batch.items()} for batch in data.take(count)]


def images_of(batches):
    """Which image each example is, from its pixels."""
    return [int(image[0, 0, 0]) // 10 for batch in batches for image in batch["inputs"]]


def assert_same(batches, others):
    assert len(batches) == len(others) > 0
    for batch, other in zip(batches, others, strict=True):
        for key in batch:
            np.testing.assert_array_equal(batch[key], other[key], err_msg=key)


cached_or_not = pytest.mark.parametrize("cache", [True, False], ids=["cached", "uncached"])


class TestOrder:
    @pytest.mark.parametrize(("source", "cache"), [("pixels", True), ("encoded", True), ("encoded", False)])
    def test_every_example_comes_exactly_once_an_epoch(self, source, cache):
        shown = images_of(take(make(source, cache=cache).training(), 10))  # 60 examples: three epochs
        epochs = [shown[i : i + EXAMPLES] for i in (0, EXAMPLES, 2 * EXAMPLES)]
        assert all(sorted(epoch) == list(range(EXAMPLES)) for epoch in epochs)
        assert epochs[0] != epochs[1] != epochs[2]

    def test_labels_and_pixels_stay_together(self):
        batches = take(make().training(), 5)
        assert [i % 3 for i in images_of(batches)] == [label for batch in batches for label in batch["label"]]

    def test_equal_pipelines_give_equal_batches(self):
        options = {"augment": "shift(pixels=2)+brightness", "seed": 4}
        assert_same(take(make(**options).training(), 8), take(make(**options).training(), 8))

    def test_a_cache_changes_nothing(self):
        assert_same(take(make(cache=True).training(), 8), take(make(cache=False).training(), 8))

    def test_encoded_images_come_in_the_order_of_pixels(self):
        assert_same(take(make("pixels").training(), 8), take(make("encoded").training(), 8))

    def test_another_seed_gives_another_order(self):
        orders = [tuple(images_of(take(make(seed=seed).training(), 3))) for seed in range(4)]
        assert len(set(orders)) == 4

    @cached_or_not
    def test_the_global_seed_has_no_say(self, cache):
        pipelines = []
        for seed in (1, 2):
            tf.random.set_seed(seed)
            pipelines.append(take(make(cache=cache, augment="flip+brightness").training(), 5))
        assert_same(*pipelines)

    def test_a_pipeline_can_be_read_twice(self):
        pipeline = make(cache=True)
        assert_same(take(pipeline.training(), 5), take(pipeline.training(), 5))

    def test_sequential_gives_all_examples_in_the_order_of_the_source(self):
        batches = take(make().sequential("train"), 99)
        assert images_of(batches) == list(range(EXAMPLES))
        assert [len(batch["label"]) for batch in batches] == [6, 6, 6, 2]

    def test_batches_have_the_documented_types(self):
        for data in (make().training(), make().sequential("train")):
            spec = data.element_spec
            assert {key: value.dtype for key, value in spec.items()} == {
                "inputs": tf.uint8,
                "label": tf.int64,
                "weight": tf.float32,
            }
            assert spec["inputs"].shape[1:] == (8, 8, 3)


class TestResuming:
    @pytest.mark.parametrize(
        ("cache", "augment"), [(True, ""), (False, ""), (True, "shift(pixels=2)+brightness"), (False, "crop+flip")]
    )
    def test_from_step_k_equals_the_unbroken_run(self, cache, augment):
        unbroken = take(make(cache=cache, augment=augment, seed=7).training(), 9)
        for step in (3, 7):  # step 3 holds the border of two epochs, step 7 lies in the third
            resumed = take(make(cache=cache, augment=augment, seed=7).training(step), 9 - step)
            assert_same(resumed, unbroken[step:])

    def test_resuming_late_skips_whole_epochs(self):
        step = 10_000_019
        pipeline = make()
        assert_same(take(pipeline.training(step), 3)[1:], take(pipeline.training(step + 1), 2))


class TestAugmentation:
    def test_another_seed_augments_otherwise(self):
        def shown(seed):
            found = take(make("pixels", augment="brightness(delta=0.5)", seed=seed).training(), 1)
            return found[0]["inputs"].tobytes()

        assert shown(1) == shown(1) != shown(2)

    @pytest.mark.parametrize("augment", ["brightness(delta=0.5)", "crop(area=0.2)+brightness(delta=0.5)"])
    def test_an_image_looks_different_in_the_next_epoch(self, augment):
        values = np.arange(8, dtype=np.uint8)[:, None, None] * 20 + np.zeros((4, 8, 8, 3), np.uint8)
        source = Arrays({"train": (values, np.zeros(4)), "test": (values, np.zeros(4))}, ("a", "b"))
        pipeline = Pipeline(source, Splits(source, validation_fraction=0), (8, 8), 4, 2, augment=augment)
        first, second = take(pipeline.training(), 2)
        originals = {value.tobytes() for value in values}
        shown = [{image.tobytes() for image in batch["inputs"]} for batch in (first, second)]
        assert shown[0].isdisjoint(shown[1])
        assert shown[0].isdisjoint(originals)

    @cached_or_not
    @pytest.mark.parametrize("augment", ["brightness(delta=0.5)", "crop(area=0.1)"])
    def test_calibration_and_evaluation_are_not_augmented(self, augment, cache):
        column = np.arange(0, 240, 30, dtype=np.uint8)[None, :, None, None]
        images = np.broadcast_to(column + np.arange(EXAMPLES, dtype=np.uint8)[:, None, None, None], (EXAMPLES, 8, 8, 3))
        source = Arrays({"train": (images, np.zeros(EXAMPLES)), "test": (images[:2], np.zeros(2))}, ("a", "b"))
        pipeline = make(source, augment=augment, cache=cache)
        originals = {image.tobytes() for image in images}

        def changed(data):
            return {image.tobytes() for batch in take(data, 3) for image in batch["inputs"]} - originals

        assert changed(pipeline.training())
        assert not changed(pipeline.calibration())
        assert not changed(pipeline.sequential("train"))

    def test_calibration_is_shuffled(self):
        shown = images_of(take(make(augment="flip").calibration(), 3))
        assert len(set(shown)) == 18
        assert shown != sorted(shown)

    @pytest.mark.parametrize(("augment", "expected"), [("", False), ("flip", True), ("crop", True)])
    def test_says_whether_it_augments(self, augment, expected):
        assert make(augment=augment).augmented is expected


class TestCorruptImages:
    @cached_or_not
    def test_stay_in_place_with_weight_zero(self, cache):
        (batch,) = take(make(EncodedSource(CORRUPT), cache=cache).sequential("train").unbatch().batch(EXAMPLES), 1)
        assert tuple(np.flatnonzero(batch["weight"] == 0)) == CORRUPT
        assert not batch["inputs"][list(CORRUPT)].any()
        np.testing.assert_array_equal(batch["label"], np.arange(EXAMPLES) % 3)

    @pytest.mark.parametrize("augment", ["shift(pixels=1)", "crop"])
    def test_move_no_other_image_to_another_batch(self, augment):
        whole = take(make(EncodedSource(), augment=augment).training(), 7)
        holed = take(make(EncodedSource(CORRUPT), augment=augment).training(), 7)
        met = 0
        for before, after in zip(whole, holed, strict=True):
            good = after["weight"] == 1
            met += int((~good).sum())
            np.testing.assert_array_equal(after["inputs"][good], before["inputs"][good])
            np.testing.assert_array_equal(after["label"], before["label"])
        assert met >= 4  # two in each of two whole epochs

    def test_are_counted(self):
        assert make(EncodedSource(CORRUPT)).skipped("train") == len(CORRUPT)
        assert make(EncodedSource()).skipped("train") == 0

    def test_nothing_but_corrupt_images_is_an_error(self):
        with pytest.raises(errors.DataError, match=r"none of the 20 images of 'train' can be read"):
            make(EncodedSource(range(EXAMPLES))).skipped("train")


class TestRefusals:
    @pytest.mark.parametrize(("label", "cache"), [(3, True), (-1, False)])
    @pytest.mark.parametrize("reading", [Pipeline.training, lambda p: p.sequential("train")], ids=["training", "sequential"])
    def test_label_out_of_range(self, label, cache, reading):
        pipeline = make(EncodedSource(labels=[0, 1, label, *[2] * 17]), cache=cache)
        with pytest.raises(tf.errors.InvalidArgumentError, match=rf"allowed are 0 to 2, got:.*{label}"):
            take(reading(pipeline), 4)

    @pytest.mark.parametrize("batch_size", [0, -3])
    def test_batch_size_must_be_positive(self, batch_size):
        source = pixel_source()
        with pytest.raises(errors.ConfigError, match=f"batch_size={batch_size}; expected a positive whole number"):
            Pipeline(source, Splits(source), (8, 8), batch_size, 3)

    def test_unknown_split(self):
        with pytest.raises(errors.ConfigError, match="did you mean 'test'"):
            make().sequential("tests")


def operations(data):
    """The names of all operations of a data set, those of its functions and inner data sets included."""
    ignore_external_state = 1
    graph = tf.raw_ops.DatasetToGraphV2(input_dataset=data._variant_tensor, external_state_policy=ignore_external_state)
    definition = tf.compat.v1.GraphDef.FromString(graph.numpy())
    functions = itertools.chain.from_iterable(function.node_def for function in definition.library.function)
    return {node.op for node in itertools.chain(definition.node, functions)}


class TestOperations:
    @pytest.mark.parametrize(
        ("source", "cache", "augment"),
        [
            ("pixels", True, ""),
            ("encoded", True, "flip+shift+brightness"),
            ("encoded", False, "flip+shift+brightness"),
            ("encoded", True, "crop+flip"),
        ],
    )
    def test_no_python_runs_in_a_pipeline(self, source, cache, augment):
        pipeline = make(source, cache=cache, augment=augment, image_size=(10, 10))
        for data in (pipeline.training(), pipeline.calibration(), pipeline.sequential("train")):
            found = operations(data)
            assert any(name.startswith("Batch") for name in found)
            assert ("DecodeImage" in found) == (source == "encoded")
            assert not {name for name in found if "PyFunc" in name}

    @cached_or_not
    def test_python_in_a_source_would_be_seen(self, cache):
        pipeline = make(PythonSource(), cache=cache)
        for data in (pipeline.training(), pipeline.sequential("train")):
            assert {name for name in operations(data) if "PyFunc" in name}


@pytest.mark.parametrize("size", [(4, 4), (12, 16)])
def test_images_are_resized_to_the_task(size):
    batches = take(make(image_size=size).training(), 4)
    assert batches[0]["inputs"].shape == (BATCH, *size, 3)
    assert len(set(images_of(batches))) == EXAMPLES  # a flat image keeps its value
