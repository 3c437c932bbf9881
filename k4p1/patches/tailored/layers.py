"""The layers that a tailored task owns: pooling and convolution of a proxy, and the sum of paths by attention."""

from collections.abc import Callable

import keras
import numpy as np
from keras import ops

from k4p1.patches import own_layer
from k4p1.patches.patched_batch_normalization import normalise

KIND = "nettailor"
_EPSILON = 1e-5
_START = 2.0  # of w: +2 for the main path, -2 for proxies (NT, section 4.1)


@keras.saving.register_keras_serializable("k4p1")
class ProxyPooling(keras.layers.Layer):
    """The largest value of each `ratio + 1` square at steps of `ratio`, with `ratio // 2` of border on every side.

    Inputs (batch, height, width, channels); outputs (batch, ceil(height / ratio), ceil(width / ratio), channels). The border
    is never the largest, so that it also holds before activations.
    """

    def __init__(self, ratio: int, **kwargs):
        super().__init__(**kwargs)
        self.ratio = ratio

    def call(self, inputs):
        border = (self.ratio // 2, self.ratio // 2)
        padded = ops.pad(inputs, [(0, 0), border, border, (0, 0)], constant_values=-float("inf"))
        return ops.max_pool(padded, self.ratio + 1, strides=self.ratio, padding="valid")

    def get_config(self):
        return {**super().get_config(), "ratio": self.ratio}


@keras.saving.register_keras_serializable("k4p1")
class ProxyConvolution(own_layer.OwnLayer):
    """`BN(x * f)` with a 1x1 convolution f without bias, and a ReLU behind it where asked (NT, section 3.3).

    `A(x) = BN(Conv1x1(Pool(x)))` is a basic proxy; the bottleneck form has two of these, the first of few channels and with
    a ReLU. f starts at N(0, 0.01), gamma at 1, beta at 0. In training the statistics are those of the batch.

    Attributes:
      attention_of_path: gives a of the path that it ends, which its folded layer holds; set where the paths meet.

    Args:
      filters: channels put out.
      relu: whether a ReLU follows.
      momentum: of the moving statistics.
      recalibrated: whether population statistics replace them after training.
      seed: of f.

    Inputs: (batch, height, width, channels).
    """

    kind = KIND

    def __init__(self, filters, relu=False, momentum=0.9, recalibrated=True, seed=0, **kwargs):
        super().__init__(**kwargs)
        self.filters, self.relu, self.momentum, self.recalibrated, self.seed = filters, relu, momentum, recalibrated, seed
        self.attention_of_path: Callable[[], float] = lambda: 1.0

    def build(self, input_shape):
        start = keras.initializers.RandomNormal(stddev=0.01, seed=self.seed)
        self.kernel = self.add_weight(name="kernel", shape=(1, 1, input_shape[-1], self.filters), initializer=start)

        def channel(name, value, trainable):
            return self.add_weight(
                name=name, shape=(self.filters,), initializer=value, trainable=trainable, dtype="float32", autocast=False
            )

        self.gamma, self.beta = channel("gamma", "ones", True), channel("beta", "zeros", True)
        self.moving_mean = channel("moving_mean", "zeros", False)
        self.moving_variance = channel("moving_variance", "ones", False)

    def call(self, inputs, training=None, moves=True):
        """`moves` False leaves the moving statistics: the layer is called once more on the same values."""
        x = ops.conv(inputs, self.kernel, strides=1, padding="valid", data_format="channels_last")
        x = ops.cast(x, keras.backend.result_type(x.dtype, "float32"))
        if training:
            x, mean, variance = normalise(x, self.gamma, self.beta, -1, _EPSILON)
            if moves:
                for moving, batch in ((self.moving_mean, mean), (self.moving_variance, variance)):
                    moving.assign(moving * self.momentum + batch * (1.0 - self.momentum))
        else:
            x = ops.batch_normalization(
                x,
                self.moving_mean,
                self.moving_variance,
                axis=-1,
                offset=self.beta,
                scale=self.gamma,
                epsilon=_EPSILON,
            )
        x = ops.relu(x) if self.relu else x
        return ops.cast(x, self.compute_dtype)

    def compute_output_shape(self, input_shape):
        return (*input_shape[:-1], self.filters)

    def multiply_adds(self, positions):
        return positions * self.filters * (self.kernel.shape[2] + 1)

    def folded(self):
        """`W' = a gamma / sd W`, `b' = a (beta - gamma mean / sd)`, a the attention of the path, 1 before a ReLU."""
        attention = self.attention_of_path()
        gamma, beta, mean, variance = (
            np.asarray(ops.convert_to_numpy(v), np.float64)
            for v in (self.gamma, self.beta, self.moving_mean, self.moving_variance)
        )
        factor = gamma / np.sqrt(variance + _EPSILON)
        plain = keras.layers.Conv2D(
            self.filters, 1, activation="relu" if self.relu else None, name=self.name, dtype=self.dtype_policy
        )
        plain.build((None, None, None, self.kernel.shape[2]))
        plain.kernel.assign(attention * factor * ops.convert_to_numpy(self.kernel))
        plain.bias.assign(attention * (beta - factor * mean))
        return plain

    def get_config(self):
        names = ("filters", "relu", "momentum", "recalibrated", "seed")
        return {**super().get_config(), **{name: getattr(self, name) for name in names}}


@keras.saving.register_keras_serializable("k4p1")
class Mixing(own_layer.OwnLayer):
    """`z = sum_j a_j x_j`, `a = softmax(w)`: the paths into a node, weighted by attention (NT, equations 3 and 4).

    w starts at 2 for the main path and -2 for proxies. Puts out z and a, (number of paths,), float32.

    Args:
      has_main: whether the first path is the backbone's block.
      paths: number of paths.
    """

    kind = KIND

    def __init__(self, has_main, paths, **kwargs):
        super().__init__(**kwargs)
        self.has_main, self.paths = has_main, paths
        starts = np.full(self.paths, -_START, np.float32)
        starts[:1] = _START if self.has_main else -_START
        self.attention = self.add_weight(
            name="attention",
            shape=(self.paths,),
            initializer=lambda shape, dtype=None: ops.convert_to_tensor(starts, dtype),
            dtype="float32",
            autocast=False,
        )
        self.built = True

    def build(self, input_shape):
        pass

    def call(self, inputs):
        w = ops.convert_to_tensor(self.attention)
        exponents = ops.exp(w - ops.max(w))
        a = exponents / ops.sum(exponents)
        weights = ops.unstack(ops.cast(a, self.compute_dtype), self.paths)
        z = weights[0] * inputs[0]
        for weight, x in zip(weights[1:], inputs[1:], strict=True):
            z = z + weight * x
        return z, a

    def compute_output_spec(self, inputs):
        z = keras.KerasTensor(inputs[0].shape, dtype=self.compute_dtype)
        return z, keras.KerasTensor((self.paths,), dtype="float32")

    def weights_now(self) -> np.ndarray:
        """The attention of each path, (paths,) float64."""
        w = np.asarray(ops.convert_to_numpy(self.attention), np.float64)
        exponents = np.exp(w - w.max())
        return exponents / exponents.sum()

    def multiply_adds(self, positions):
        return 0

    def folded(self):
        """`a_0 G + sum of the proxies`, whose own convolutions hold their attention."""
        shapes = [one.shape[1:] for one in keras.tree.flatten(self._inbound_nodes[0].input_tensors)]
        dtype = self.dtype_policy
        inputs = [keras.Input(shape, dtype=self.compute_dtype, name=f"path_{n}") for n, shape in enumerate(shapes)]
        ways = list(inputs)
        if self.has_main and self.paths > 1:
            ways[0] = keras.layers.Rescaling(float(self.weights_now()[0]), name="kept", dtype=dtype)(ways[0])
        if len(ways) > 1:
            z = keras.layers.Add(name="sum", dtype=dtype)(ways)
        else:
            z = keras.layers.Activation("linear", name="kept", dtype=dtype)(ways[0])
        return keras.Model(inputs, z, name=self.name)

    def get_config(self):
        return {**super().get_config(), "has_main": self.has_main, "paths": self.paths}
