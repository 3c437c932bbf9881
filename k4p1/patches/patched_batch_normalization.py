"""Batch normalisation with private scale and bias, private statistics, or both."""

import contextlib
import contextvars
from collections.abc import Callable, Iterator

import keras
from keras import ops

from k4p1.patches import patched_layer
from k4p1.patches.patched_layer import STATISTICS, TRAINED, PrivateVariable


def normalise_batch(x, gamma, beta, axis: int, epsilon: float):
    """`y = gamma * (x - mean) / sqrt(variance + epsilon) + beta` with the statistics of the batch.

    Args:
      x: (batch, ..., channels), or channels on another axis.
      gamma, beta: (channels,), or None for 1 and 0.
      axis: of the channels.
      epsilon: added to the variance.

    Returns:
      (y, mean, variance), the last two (channels,), the variance without Bessel's correction.
    """
    axes = [a for a in range(len(x.shape)) if a != axis % len(x.shape)]
    mean, variance = ops.moments(x, axes=axes)
    y = ops.batch_normalization(x, mean, variance, axis=axis, offset=beta, scale=gamma, epsilon=epsilon)
    return y, mean, variance


_NORMALISE: contextvars.ContextVar[Callable] = contextvars.ContextVar("normalise", default=normalise_batch)


def normalise(x, gamma, beta, axis: int, epsilon: float):
    """`normalise_batch`, or the function that `normalised_by` puts in its place."""
    return _NORMALISE.get()(x, gamma, beta, axis, epsilon)


@contextlib.contextmanager
def normalised_by(function: Callable) -> Iterator[None]:
    """Within it, patched layers normalise batches by `function`, an equal of `normalise_batch` that is faster somewhere."""
    token = _NORMALISE.set(function)
    try:
        yield
    finally:
        _NORMALISE.reset(token)


@keras.saving.register_keras_serializable("k4p1")
class PatchedBatchNormalization(patched_layer.PatchedLayer):
    """`y = gamma * (x - mu) / sqrt(var + epsilon) + beta` with variables of the task (K4P1, section 2).

    With private statistics, mu and var are those of the batch while `training` is true, and the moving averages
    `m <- momentum * m + (1 - momentum) * batch` otherwise. With frozen statistics they are the backbone's, always.

    Args:
      layer: a built `keras.layers.BatchNormalization`; it stays shared. One without scale or centre gains them, at 1 and 0.
      statistics: `private` or `frozen`.
      affine: `both` (gamma and beta are the task's), `scale` (gamma alone), `bias` (beta alone) or `frozen` (they are the
        backbone's). `private`, for `both`, is what older files say.
      momentum: of the private moving averages.
      kind: the patch kind that owns the variables.

    Inputs: (batch, ..., channels) with channels on the layer's axis. Variables: one value per channel.
    """

    def __init__(self, layer, statistics="private", affine="both", momentum=0.99, kind="scale_bias", **kwargs):
        super().__init__(layer, **kwargs)
        self.affine = "both" if affine == "private" else affine
        self.statistics, self.momentum, self.kind = statistics, momentum, kind

    def bind(self):
        layer = self.layer
        shape = tuple(layer.moving_mean.shape)

        def private(name, shared, default, trainable):
            start = patched_layer.copy_of(shared) if shared is not None else default
            return self.add_weight(
                name=name, shape=shape, initializer=start, trainable=trainable, dtype=layer.moving_mean.dtype, autocast=False
            )

        gamma, beta = getattr(layer, "gamma", None), getattr(layer, "beta", None)
        self.gamma = private("gamma", gamma, "ones", True) if self.affine in ("both", "scale") else gamma
        self.beta = private("beta", beta, "zeros", True) if self.affine in ("both", "bias") else beta
        if self.statistics == "private":
            self.moving_mean = private("moving_mean", layer.moving_mean, None, False)
            self.moving_variance = private("moving_variance", layer.moving_variance, None, False)
        else:
            self.moving_mean, self.moving_variance = layer.moving_mean, layer.moving_variance

    def call(self, inputs, training=None, mask=None):
        del mask  # images are not masked; Keras passes one to the layer that this one stands for
        x = ops.cast(inputs, keras.backend.result_type(inputs.dtype, "float32"))
        axis = self.layer.axis if isinstance(self.layer.axis, int) else self.layer.axis[0]
        if training and self.statistics == "private":
            outputs, mean, variance = normalise(x, self.gamma, self.beta, axis, self.layer.epsilon)
            for moving, batch in ((self.moving_mean, mean), (self.moving_variance, variance)):
                moving.assign(moving * self.momentum + batch * (1.0 - self.momentum))
        else:
            outputs = ops.batch_normalization(
                x,
                self.moving_mean,
                self.moving_variance,
                axis=axis,
                offset=self.beta,
                scale=self.gamma,
                epsilon=self.layer.epsilon,
            )
        return ops.cast(outputs, self.compute_dtype)

    def private_variables(self):
        owned = []
        if self.affine in ("both", "scale"):
            owned.append(("gamma", self.gamma, TRAINED))
        if self.affine in ("both", "bias"):
            owned.append(("beta", self.beta, TRAINED))
        if self.statistics == "private":
            owned += [("moving_mean", self.moving_mean, STATISTICS), ("moving_variance", self.moving_variance, STATISTICS)]
        return [PrivateVariable(self.kind, *variable) for variable in owned]

    def folded_values(self):
        names = ("gamma", "beta", "moving_mean", "moving_variance")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def folded(self):
        config = self.layer.get_config()
        config.update(scale=self.gamma is not None, center=self.beta is not None)
        plain = type(self.layer).from_config(config)
        plain.build_from_config(self.layer.get_build_config())
        for variable in plain.variables:
            variable.assign(getattr(self, variable.name))
        return plain

    def get_config(self):
        options = {n: getattr(self, n) for n in ("statistics", "affine", "momentum", "kind")}
        return {**super().get_config(), **options}
