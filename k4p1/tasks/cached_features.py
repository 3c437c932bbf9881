"""Features computed once, for tasks of which only the head trains."""

import keras
import numpy as np
import tensorflow as tf

from k4p1.data.pipeline import Pipeline
from k4p1.engine.data_errors import data_errors
from k4p1.patches.patched_layer import RANDOM
from k4p1.patches.patched_model import PRIVATE, Parameter, PatchedModel
from k4p1.patches.task_head import FEATURES


class CachedFeatures:
    """Batches like those of a pipeline, with the backbone's features (b, features) float32 in place of images.

    Order and batches are a function of (seed, epoch, step), as in `Pipeline`, but another one than with images.

    Args:
      pipeline: without augmentation.
      patched: the task model; only its head may train.
      dropout: rate before the head.
      seed: of the order.
    """

    def __init__(self, pipeline: Pipeline, patched: PatchedModel, dropout: float = 0.0, seed: int = 0):
        self._pipeline, self._seed, self.batch_size = pipeline, seed, pipeline.batch_size
        self._name = patched.model.name
        self._network = keras.Model(patched.model.input, patched.endpoints[FEATURES])
        self._splits: dict[str, dict[str, np.ndarray]] = {}
        features = keras.Input(self._network.output.shape[1:], name="features")
        hidden = keras.layers.Dropout(dropout, name="head_dropout")(features) if dropout else features
        outputs = keras.tree.map_structure(_in_float32, patched.head(hidden))
        model = keras.Model(features, outputs, name=f"{patched.model.name}_head")
        used = {id(v) for v in model.variables}
        parameters = [p for p in patched.parameters if id(p.variable) in used and p.role != RANDOM]
        seeds = [v for v in model.variables if not keras.backend.is_float_dtype(v.dtype)]
        parameters += [Parameter(v.path, v, PRIVATE, "random", RANDOM) for v in seeds]
        self.patched = PatchedModel(
            model, tuple(parameters), patched.spec, patched.head, {}, frozenset(), patched.image_size
        )

    def examples(self, split: str) -> int:
        """The number of examples of a split."""
        return self._pipeline.examples(split)

    def training(self, start_step: int = 0, worker: int = 0, *, split: str = "train") -> tf.data.Dataset:
        """Endless full batches from step `start_step` on; of one process, whose `worker` is 0."""
        arrays = {name: tf.constant(array) for name, array in self._features(split).items()}
        count = len(arrays["weight"])

        def indices(epoch):
            order = tf.random.experimental.stateless_shuffle(
                tf.range(count), seed=tf.stack([tf.constant(self._seed, tf.int64), epoch])
            )
            return tf.data.Dataset.from_tensor_slices(order)

        first_epoch, offset = divmod(start_step * self.batch_size, count)
        order = tf.data.Dataset.range(first_epoch, tf.int64.max).flat_map(indices).skip(offset)
        batches = order.batch(self.batch_size, drop_remainder=True)
        return batches.map(lambda chosen: {name: tf.gather(array, chosen) for name, array in arrays.items()}).prefetch(2)

    def sequential(self, split: str) -> tf.data.Dataset:
        """All examples of a split once."""
        return tf.data.Dataset.from_tensor_slices(self._features(split)).batch(self.batch_size)

    def _features(self, split: str) -> dict[str, np.ndarray]:
        if split not in self._splits:
            forward = tf.function(lambda images: self._network(images, training=False), reduce_retracing=True)
            columns: dict[str, list[np.ndarray]] = {}
            with data_errors(self._name):
                for batch in self._pipeline.sequential(split):
                    features = tf.cast(forward(batch["inputs"]), tf.float32)
                    for name, column in {**batch, "inputs": features}.items():
                        columns.setdefault(name, []).append(column.numpy())
            self._splits[split] = {name: np.concatenate(parts) for name, parts in columns.items()}
        return self._splits[split]


def _in_float32(output: keras.KerasTensor) -> keras.KerasTensor:
    return keras.layers.Activation("linear", dtype="float32")(output)
