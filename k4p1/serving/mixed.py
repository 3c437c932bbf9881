"""One network that answers for many tasks in one batch.

What tasks share is computed once for the whole batch. Where they differ by vectors (scales and biases, folded with the batch
normalisation), each image takes the rows of its own task, and the batch is never split; where they differ by kernels (masks,
adapters, private kernels), the images of a task go together through these layers. Heads are as wide as the widest.
"""

import threading
from collections.abc import Callable, Sequence

import keras
import numpy as np
import tensorflow as tf

from k4p1 import errors
from k4p1.backbones.backbone import Backbone
from k4p1.patches.apply import apply_patches
from k4p1.patches.inference import FlatModel, per_output_channel, scale_and_shift
from k4p1.patches.patched_convolution import linear_output
from k4p1.patches.patched_layer import PatchedLayer
from k4p1.patches.patched_model import PatchedModel
from k4p1.serving.task_tables import LayerTable, Table, widened

NO_CLASS = -1e9
"""The logit of a class that a task does not have."""
_SCALED = (keras.layers.Conv2D, keras.layers.DepthwiseConv2D, keras.layers.Dense)


class MixedModel:
    """Answers for batches whose images belong to different tasks of one backbone and one image size.

    Adding and deleting tasks changes the values of tables, not the graph, until they are full; then they double.

    Args:
      backbone: shared by all tasks.
      image_size: (height, width) in pixels.
    """

    def __init__(self, backbone: Backbone, image_size: tuple[int, int]):
        self.image_size = image_size
        unpatched = apply_patches(backbone, "none", classes=1, image_size=image_size, name="mixed")
        self._flat = FlatModel.of(unpatched.model)
        self._head = self._flat.model.get_layer("head")
        self._layers: dict[str, LayerTable] = {}
        self._normalisations: dict[str, tuple[Table, Table]] = {}
        absorbed = {id(layer) for layer in self._flat.absorbed.values()}
        for layer in self._flat.model.layers:
            if layer is self._head or id(layer) in absorbed:
                continue
            if type(layer) in _SCALED:
                self._layers[layer.name] = LayerTable(layer)
            elif isinstance(layer, keras.layers.BatchNormalization):
                shape = tuple(layer.moving_mean.shape)
                self._normalisations[layer.name] = (Table(shape, f"{layer.name}_a"), Table(shape, f"{layer.name}_c"))
        features = self._head.kernel.shape[0]
        self._head_kernel, self._head_bias = Table((features, 1), "head_kernel"), Table((1,), "head_bias")
        self._rows: dict[str, int] = {}
        self._capacity, self._free = 1, [0]
        self._lock = threading.RLock()
        self._function: Callable | None = None

    @property
    def tasks(self) -> list[str]:
        """The tasks, in the order in which they came."""
        with self._lock:
            return list(self._rows)

    @property
    def classes(self) -> int:
        """The number of logits: those of the widest task so far."""
        return self._head_bias.variable.shape[-1]

    @property
    def variables(self) -> list:
        """Everything that `logits` reads: the tables, and the shared weights."""
        tables = [*self._vectors(), *(t.kernels for t in self._layers.values() if t.kernels is not None)]
        for layer in self._layers.values():
            tables += [layer.scale, layer.bias]
        slots = [layer.slots for layer in self._layers.values()]
        return [*(table.variable for table in tables), *slots, *(v.value for v in self._flat.model.variables)]

    @property
    def resident_bytes(self) -> int:
        """Bytes of all tables: what the tasks take beside the backbone."""
        shared = {id(v.value) for v in self._flat.model.variables}
        return sum(v.dtype.size * int(np.prod(v.shape)) for v in self.variables if id(v) not in shared)

    def put(self, name: str, patched: PatchedModel) -> None:
        """Adds a task, or replaces it.

        Raises:
          ConfigError: a task of another image size or with another head than one of logits, or whose patch changes a layer
            that tasks of one batch cannot differ in; nothing changes.
        """
        values, kernel, bias = self._read(name, patched)
        with self._lock:
            self._make_room(name, kernel.shape[-1])
            row = self._rows.get(name)
            row = self._free.pop(0) if row is None else row
            graph = self._graph()
            for layer_name, table in self._layers.items():
                table.write(row, values[layer_name])
            for layer_name, (a, c) in self._normalisations.items():
                scale, shift = values[layer_name]
                a.write(row, scale)
                c.write(row, shift)
            self._head_kernel.write(row, widened(kernel, self.classes))
            self._head_bias.write(row, widened(bias, self.classes, NO_CLASS))
            self._rows[name] = row
            if self._graph() != graph:
                self._function = None

    def delete(self, name: str) -> None:
        """Removes a task; its rows are free for the next one."""
        with self._lock:
            row = self._row(name)
            for table in self._layers.values():
                table.clear(row)
            del self._rows[name]
            self._free.append(row)

    def rows(self, tasks: Sequence[str]) -> np.ndarray:
        """The numbers of tasks in the tables.

        Raises:
          ConfigError: no such task; the nearest name is shown.
        """
        with self._lock:
            return np.array([self._row(task) for task in tasks], np.int32)

    def __call__(self, images, tasks: Sequence[str]) -> np.ndarray:
        """Logits (batch, classes of the widest task) of images (batch, height, width, 3) of 0 to 255, one task per image.

        Classes that a task does not have get `NO_CLASS`.
        """
        rows = self.rows(tasks)
        with self._lock:
            if self._function is None:
                spec = [tf.TensorSpec([None, *self.image_size, 3]), tf.TensorSpec([None], tf.int32)]
                self._function = tf.function(self.logits, input_signature=spec)
            function = self._function
        return function(tf.cast(images, tf.float32), tf.constant(rows)).numpy()

    def logits(self, images: tf.Tensor, rows: tf.Tensor) -> tf.Tensor:
        """The same as operations of a graph, tasks given by `rows`: (batch,), or one number for the whole batch."""

        def function_of(operation: keras.Operation) -> Callable:
            if operation is self._head:
                return lambda x: self._answers(x, rows)
            if operation.name in self._layers:
                return lambda x: self._mixed(self._layers[operation.name], x, rows)
            if operation.name in self._normalisations:
                return lambda x, **_: self._normalised(operation, x, rows)
            return operation

        return self._flat.run(images, function_of)

    def _answers(self, features: tf.Tensor, rows: tf.Tensor) -> tf.Tensor:
        kernel, bias = self._head_kernel.rows(rows), self._head_bias.rows(rows)
        if rows.shape.rank == 0:
            return tf.matmul(features, kernel) + bias
        return tf.linalg.matvec(kernel, features, transpose_a=True) + bias

    def _normalised(self, layer: keras.layers.Layer, x: tf.Tensor, rows: tf.Tensor) -> tf.Tensor:
        a, c = (_over_positions(layer, table.rows(rows), x) for table in self._normalisations[layer.name])
        return x * a + c

    def _mixed(self, table: LayerTable, x: tf.Tensor, rows: tf.Tensor) -> tf.Tensor:
        layer = table.layer
        scale, bias = table.scale.rows(rows), table.bias.rows(rows)
        if rows.shape.rank == 0:
            return layer.activation(
                linear_output(layer, x, _kernel_of(table, scale, rows)) + _over_positions(layer, bias, x)
            )
        if _is_pointwise(layer) and x.shape[1] * x.shape[2] >= layer.kernel.shape[-2]:
            kernels = tf.reshape(layer.kernel, layer.kernel.shape[-2:])[None] * scale[:, None, :]
            flat = tf.matmul(tf.reshape(x, [-1, x.shape[1] * x.shape[2], x.shape[3]]), kernels)
            y = tf.reshape(flat, [-1, *x.shape[1:3], layer.kernel.shape[-1]])
        else:
            y = linear_output(layer, x, layer.kernel)
            y = y * _over_positions(layer, scale, y)
        if table.kernels is not None:
            y = _by_task(table, x, y, tf.gather(table.slots, rows))
        return layer.activation(y + _over_positions(layer, bias, y))

    def _read(self, name: str, patched: PatchedModel):
        """Folded values of a task by layer, and the kernel and bias of its head."""
        if patched.image_size != self.image_size:
            raise errors.ConfigError(f"task '{name}' has images of {patched.image_size}; this model has {self.image_size}")
        if not isinstance(patched.head, keras.layers.Dense) or patched.head.activation is not keras.activations.linear:
            raise errors.ConfigError(
                f"task '{name}' has a head of class {type(patched.head).__name__}; batches of mixed tasks need a Dense head"
            )
        flat = FlatModel.of(patched.model)
        values: dict = {}
        for layer in flat.model.layers:
            if layer.name in self._layers:
                values[layer.name] = flat.values_of(layer)
            elif layer.name in self._normalisations:
                plain = layer.layer if isinstance(layer, PatchedLayer) else layer
                values[layer.name] = scale_and_shift(flat.values_of(layer), plain.epsilon)
            elif isinstance(layer, PatchedLayer) and layer.name not in {one.name for one in flat.absorbed.values()}:
                raise errors.ConfigError(
                    f"task '{name}' patches {type(layer.layer).__name__} '{layer.name}', in which the tasks of a mixed "
                    "batch cannot differ; export it alone"
                )
        self._check_the_rest(name, flat)
        head = flat.values_of(flat.model.get_layer("head"))
        return values, head["kernel"], head.get("bias", np.zeros(head["kernel"].shape[-1]))

    def _check_the_rest(self, name: str, flat: FlatModel) -> None:
        """Every layer must be there, and everything outside of the tables be shared."""
        absent = {*self._layers, *self._normalisations} - {layer.name for layer in flat.model.layers}
        if absent:
            raise errors.ConfigError(
                f"task '{name}' does without '{min(absent)}': its network has a graph of its own; export it alone"
            )
        mine = {layer.name: layer for layer in self._flat.model.layers}
        tables = {*self._layers, *self._normalisations, self._head.name, *(one.name for one in flat.absorbed.values())}
        for layer in flat.model.layers:
            if layer.name in tables or not layer.weights:
                continue
            shared = mine.get(layer.name)
            if shared is None or any(a is not b for a, b in zip(layer.weights, shared.weights, strict=False)):
                raise errors.ConfigError(
                    f"task '{name}' has values of its own in '{layer.name}', in which the tasks of a mixed batch cannot "
                    "differ; export it alone"
                )

    def _graph(self) -> tuple:
        """What the traced graph depends on."""
        kernels = tuple(t.kernels.capacity if t.kernels is not None else 0 for t in self._layers.values())
        return self._capacity, self.classes, kernels

    def _make_room(self, name: str, classes: int) -> None:
        if name not in self._rows and not self._free:
            self._free = list(range(self._capacity, 2 * self._capacity))
            self._capacity *= 2
        if classes > self.classes:
            width = 1 << (classes - 1).bit_length()
            kernel, bias = self._head_kernel.variable.numpy(), self._head_bias.variable.numpy()
            self._head_kernel = Table((kernel.shape[1], width), "head_kernel")
            self._head_bias = Table((width,), "head_bias")
            for table, values, fill in ((self._head_kernel, kernel, 0.0), (self._head_bias, bias, NO_CLASS)):
                table.variable = tf.Variable(widened(values, width, fill), trainable=False, dtype=tf.float32)
            self._function = None
        tables = self._vectors()
        if any(table.capacity < self._capacity for table in tables):
            self._function = None
        for table in (*tables, *self._layers.values()):
            table.grow(self._capacity)

    def _vectors(self) -> list[Table]:
        """The tables of kept normalisations and of the head."""
        return [*(t for pair in self._normalisations.values() for t in pair), self._head_kernel, self._head_bias]

    def _row(self, name: str) -> int:
        if name not in self._rows:
            raise errors.ConfigError(errors.unknown("task of this model", name, self._rows))
        return self._rows[name]


def _is_pointwise(layer: keras.layers.Layer) -> bool:
    return (
        isinstance(layer, keras.layers.Conv2D)
        and layer.kernel_size == (1, 1)
        and layer.strides == (1, 1)
        and layer.groups == 1
        and layer.data_format == "channels_last"
    )


def _over_positions(layer: keras.layers.Layer, vectors: tf.Tensor, x: tf.Tensor) -> tf.Tensor:
    """Vectors (batch, channels), or (channels,) for all, in a shape that broadcasts over the positions of x."""
    first = getattr(layer, "data_format", "channels_last") == "channels_first"
    ones = [1] * (len(x.shape) - 2)
    batch = [] if vectors.shape.rank == 1 else [-1]
    return tf.reshape(vectors, [*batch, vectors.shape[-1], *ones] if first else [*batch, *ones, vectors.shape[-1]])


def _kernel_of(table: LayerTable, scale: tf.Tensor, row: tf.Tensor) -> tf.Tensor:
    """The kernel of one task."""
    shared = tf.convert_to_tensor(table.layer.kernel)
    scaled = shared * per_output_channel(table.layer, scale, shared)
    if table.kernels is None:
        return scaled
    slot = table.slots[row]
    return tf.cond(slot < 0, lambda: scaled, lambda: tf.gather(table.kernels.variable, tf.maximum(slot, 0)))


def _by_task(table: LayerTable, x: tf.Tensor, y: tf.Tensor, slots: tf.Tensor) -> tf.Tensor:
    """`y` with the outputs of a private kernel for the images whose task has one (slot of at least 0), task by task."""
    present = tf.unique(tf.boolean_mask(slots, slots >= 0)).y

    def step(number: tf.Tensor, y: tf.Tensor):
        chosen = tf.where(slots == present[number])
        outputs = linear_output(table.layer, tf.gather(x, chosen[:, 0]), table.kernels.variable[present[number]])
        return number + 1, tf.tensor_scatter_nd_update(y, chosen, outputs)

    shapes = [tf.TensorShape([]), tf.TensorShape([None, *y.shape[1:]])]
    return tf.while_loop(lambda number, _: number < tf.size(present), step, [tf.constant(0), y], shape_invariants=shapes)[1]
