"""Input pipelines: `tf.data` with TensorFlow ops only, the order a function of (seed, epoch, step).

Corrupt images do not stop a run and do not move later images to other batches: they stay in their place with weight 0, so
that loss and metrics skip them and a resumed run sees the batches that an unbroken one would have seen.
"""

from collections.abc import Callable

import tensorflow as tf

from k4p1 import checks, errors
from k4p1.data import augment as augmentations
from k4p1.data import preprocessing
from k4p1.data.source import Source
from k4p1.data.splits import Splits
from k4p1.data.targets import ClassLabel, Targets

_CACHE_BYTES = 1 << 30
_SHUFFLE_BUFFER = 16_384
_WORKER_SEED = 998_244_353
_WORKER_POSITIONS = 1 << 40  # positions of different workers, from which augmentations are drawn, do not meet


class Pipeline:
    """Batches `{"inputs": (b, height, width, 3) uint8, **targets, "weight": (b,) float32}` of a source.

    Args:
      source: the data.
      splits: its parts.
      image_size: (height, width).
      batch_size: images per batch.
      targets: what is learned of each image; a number stands for the label of so many classes: `label`, (b,) int64.
      augment: spec of augmentations for training, such as `"shift(pixels=8)+flip"`.
      seed: of order and augmentation.
      cache: keep decoded images in memory; None: when they take less than 1 GiB.

    Raises:
      ConfigError: a batch size that is not positive, or a bad augmentation.
      DataError: a field that the targets need and the source does not have, or images that are neither bytes nor pixels.
    """

    def __init__(
        self,
        source: Source,
        splits: Splits,
        image_size: tuple[int, int],
        batch_size: int,
        targets: Targets | int,
        augment: str | Callable = "",
        seed: int = 0,
        cache: bool | None = None,
    ):
        checks.check_number("batch_size", batch_size, checks.POSITIVE_WHOLE)
        self._source, self._splits, self._size, self.batch_size = source, splits, image_size, batch_size
        self._targets = ClassLabel(targets) if isinstance(targets, int) else targets
        for field in self._targets.fields:
            if field not in source.fields:
                raise errors.DataError(
                    f"{source.name} has no field '{field}', which the objective of the task needs; it has: "
                    f"{', '.join(('image', *source.fields))}"
                )
        self._check_image(source)
        self._seed = seed
        self._before, self._after = augmentations.parse(augment)
        if callable(augment):
            augmentations.check(augment, self._after[0], image_size)
        self.augmented = bool(self._before or self._after)
        self._cache = cache
        self._decoded: dict[tuple, tf.data.Dataset] = {}

    def _check_image(self, source: Source) -> None:
        """Floats of 0 to 1 would become black images."""
        spec = source.examples(self._splits.parts("train")[0].split).element_spec["image"]
        if spec.dtype not in (tf.string, tf.uint8):
            raise errors.DataError(
                f"{source.name} has images of {spec.dtype.name}; expected encoded bytes, or pixels (height, width, 3) "
                "uint8 of 0 to 255"
            )
        if spec.dtype == tf.uint8 and not tf.TensorShape([None, None, 3]).is_compatible_with(spec.shape):
            raise errors.DataError(f"{source.name} has images of shape {spec.shape}; expected pixels (height, width, 3)")

    def examples(self, split: str) -> int:
        """The number of examples of a split, corrupt ones included."""
        return self._splits.size(split)

    def training(
        self,
        start_step: int | tf.Tensor = 0,
        worker: int | tf.Tensor = 0,
        *,
        split: str = "train",
        augmented: bool = True,
    ) -> tf.data.Dataset:
        """Endless full batches from step `start_step` on; epochs follow one another without a gap.

        The batch of a step depends on seed, worker and step alone. Images are shuffled within a window of 16,384.
        """
        count = self.examples(split)
        worker = tf.cast(worker, tf.int64)
        start = tf.cast(start_step, tf.int64) * self.batch_size
        first_epoch, offset = start // count, start % count
        before, after = (self._before, self._after) if augmented else ([], [])
        decoded = None if before else self._decode(split, count)
        base = self._encoded(split) if decoded is None else decoded

        def epoch(number: tf.Tensor) -> tf.data.Dataset:
            tf.random.set_seed(1)  # of this function's graph alone: the order must not follow the global seed
            shuffled = base.shuffle(
                min(count, _SHUFFLE_BUFFER),
                seed=self._seed + 1_000_003 * number + _WORKER_SEED * worker,
                reshuffle_each_iteration=False,
            )
            skipped = tf.where(number == first_epoch, offset, 0)
            return tf.data.Dataset.zip(tf.data.Dataset.range(number * count, (number + 1) * count), shuffled).skip(skipped)

        stream = tf.data.Dataset.range(first_epoch, tf.int64.max).flat_map(epoch)
        own = worker * _WORKER_POSITIONS
        if decoded is None:
            stream = _interleaved(stream, lambda position, example: self._to_pixels(position + own, example, before))
        if after:
            stream = stream.map(
                lambda position, example: (position, self._augment(example, position + own, after)),
                num_parallel_calls=tf.data.AUTOTUNE,
                deterministic=True,
            )
        batches = stream.map(lambda position, example: example).batch(self.batch_size, drop_remainder=True)
        return batches.prefetch(tf.data.AUTOTUNE)

    def sequential(self, split: str) -> tf.data.Dataset:
        """All examples of a split once, in the order of the source; the last batch may be smaller."""
        count = self.examples(split)
        base = self._decode(split, count)
        if base is None:
            base = self._all_pixels(split)
        return base.batch(self.batch_size).prefetch(tf.data.AUTOTUNE)

    def calibration(self) -> tf.data.Dataset:
        """Full, shuffled batches of the training split without augmentation."""
        return self.training(augmented=False)

    def skipped(self, split: str) -> int:
        """How many images of a split cannot be read; reads them all.

        Raises:
          DataError: none can be read.
        """
        bad = sum(int(tf.reduce_sum(1.0 - batch["weight"])) for batch in self.sequential(split))
        if bad == self.examples(split):
            raise errors.DataError(f"{self._source.name}: none of the {bad} images of '{split}' can be read")
        return bad

    def corrupt_files(self, split: str, limit: int) -> list[str]:
        """The first corrupt files behind a split, where the source has files; reads them all."""
        names = {part.split for part in self._splits.parts(split)}
        return [path for name in sorted(names) for path in self._source.corrupt(name)][:limit]

    def _encoded(self, split: str) -> tf.data.Dataset:
        parts = []
        for part in self._splits.parts(split):
            examples = self._source.examples(part.split)
            if not part.keep.all():
                keep = tf.constant(part.keep)
                examples = examples.enumerate().filter(lambda i, _, keep=keep: keep[i]).map(lambda _, example: example)
            parts.append(examples)
        whole = parts[0]
        for part in parts[1:]:
            whole = whole.concatenate(part)
        return whole.map(self._checked)

    def _checked(self, example):
        """Image and checked fields; fields that no target needs are left out."""
        fields = {name: example[name] for name in self._targets.fields}
        return {"image": example["image"], **self._targets.check(fields, self._source.name)}

    def _decode(self, split: str, count: int) -> tf.data.Dataset | None:
        """Decoded examples of a split, cached in memory; None where they would not fit."""
        fits = count * self._size[0] * self._size[1] * (3 + len(self._targets.maps)) <= _CACHE_BYTES
        if not (fits if self._cache is None else self._cache):
            return None
        if not tf.executing_eagerly():  # within the data function of a worker: of its graph alone
            return self._all_pixels(split).cache()
        if split not in self._decoded:
            self._decoded[split] = self._all_pixels(split).cache()
        return self._decoded[split]

    def _all_pixels(self, split: str) -> tf.data.Dataset:
        numbered = self._encoded(split).enumerate()
        return _interleaved(numbered, self._to_pixels).map(lambda _, example: example)

    def _to_pixels(self, position, example, before=()) -> tf.data.Dataset:
        """A data set of one (position, example): decoded, or a black image of weight 0 where the bytes cannot be read."""

        def read(position, example):
            image, targets = example["image"], self._targets.read(_fields(example))
            image = preprocessing.decode(image) if image.dtype == tf.string else image
            maps = {name: preprocessing.resize_map(targets[name], tf.shape(image)[:2]) for name in self._targets.maps}
            for number, augmentation in enumerate(before):
                seed = self._seed_of(position, number)
                maps = {name: augmentation(one, seed) for name, one in maps.items()} if augmentation.moves else maps
                image = augmentation(image, seed)
            maps = {name: preprocessing.resize_map(one, self._size) for name, one in maps.items()}
            return position, _example(preprocessing.resize(image, self._size), {**targets, **maps}, 1.0)

        blank = _example(tf.zeros([*self._size, 3], tf.uint8), self._targets.blank(_fields(example), self._size), 0.0)
        good = tf.data.Dataset.from_tensors((position, example)).map(read).ignore_errors()
        return good.concatenate(tf.data.Dataset.from_tensors((position, blank))).take(1)

    def _augment(self, example, position, augmentations):
        moved = {name: example[name] for name in ("inputs", *self._targets.maps)}
        shapes = {name: one.shape for name, one in moved.items()}
        for number, augmentation in enumerate(augmentations):
            seed = self._seed_of(position, 100 + number)
            moved = {
                name: augmentation(one, seed) if name == "inputs" or augmentation.moves else one
                for name, one in moved.items()
            }
        return {**example, **{name: tf.ensure_shape(one, shapes[name]) for name, one in moved.items()}}

    def _seed_of(self, position, number: int) -> tf.Tensor:
        return tf.stack([tf.constant(self._seed * 1009 + number, tf.int64), tf.cast(position, tf.int64)])


def _interleaved(examples: tf.data.Dataset, function) -> tf.data.Dataset:
    """Maps each example to a data set of one, in parallel and in order."""
    return examples.interleave(function, cycle_length=16, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)


def _fields(example) -> dict[str, tf.Tensor]:
    return {name: value for name, value in example.items() if name != "image"}


def _example(image, targets, weight):
    return {"inputs": image, **targets, "weight": tf.constant(weight)}
