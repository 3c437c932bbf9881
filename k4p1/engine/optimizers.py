"""Optimizers as fused, locked updates of one flat vector.

Each is the update rule of Keras' optimizer of the same name, run by TensorFlow's fused kernel on the device that holds the
vector: atomic, so that asynchronous workers lose nothing (Keras' own optimizers do: they read, then write).

Weight decay d differs from Keras' in SGD and RMSProp, on purpose: it is added to the gradient, `g <- g + d w`, as the papers
and PyTorch mean it, so that momentum multiplies it like the rest of the gradient. In Adam and AdamW it is decoupled,
`w <- w - r d w`, as in Keras, where `Adam(weight_decay=d)` and `AdamW(weight_decay=d)` are the same: added to the gradient,
Adam would divide it by the gradient's own size.
"""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import tensorflow as tf

from k4p1 import errors


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optimizer:
    """An update rule for a vector w with gradient g, learning rate r and weight decay d.

    First `g <- g + d w`, or where the decay is decoupled `w <- w - r d w`. An update rule may keep state vectors (`slots`),
    each of w's shape and zero at the start.

    Class attributes:
      decoupled: whether the decay shrinks the vector itself, and not by way of the gradient.
    """

    decoupled: ClassVar[bool] = False

    @property
    def slots(self) -> tuple[str, ...]:
        """The names of the state vectors."""
        return ()

    def update(
        self,
        vector: tf.Variable,
        slots: Mapping[str, tf.Variable],
        gradient: tf.Tensor,
        learning_rate: tf.Tensor,
        updates: tf.Tensor,
        weight_decay: float,
    ) -> None:
        """Applies one update.

        Args:
          vector: w, float32 (n,).
          slots: the state vectors by name.
          gradient: g, float32 (n,).
          learning_rate: r, scalar.
          updates: how many updates the vector has had, this one included (Adam's t), int64 scalar.
          weight_decay: d; 0 for none.
        """
        with tf.device(vector.device):
            if weight_decay and self.decoupled:
                vector.assign_sub(learning_rate * weight_decay * vector)
            elif weight_decay:
                gradient = gradient + weight_decay * vector
            self._apply(vector, slots, gradient, learning_rate, updates)

    def _apply(self, vector, slots, gradient, learning_rate, updates):
        raise TypeError(f"{type(self).__name__} must update the vector")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SGD(Optimizer):
    """`a <- momentum a - r g`, `w <- w + a`; Nesterov: `w <- w + momentum a - r g`. Without momentum `w <- w - r g`.

    Attributes:
      momentum: share of the last step that the next one keeps, in [0, 1).
      nesterov: look ahead by the momentum.
    """

    momentum: float = 0.0
    nesterov: bool = False

    @property
    def slots(self):
        return ("momentum",) if self.momentum else ()

    def _apply(self, vector, slots, gradient, learning_rate, updates):
        if not self.momentum:
            tf.raw_ops.ResourceApplyGradientDescent(var=vector.handle, alpha=learning_rate, delta=gradient, use_locking=True)
            return
        tf.raw_ops.ResourceApplyKerasMomentum(
            var=vector.handle,
            accum=slots["momentum"].handle,
            lr=learning_rate,
            grad=gradient,
            momentum=self.momentum,
            use_nesterov=self.nesterov,
            use_locking=True,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class RMSProp(Optimizer):
    """`s <- rho s + (1 - rho) g^2`, `a <- momentum a + r g / sqrt(s + epsilon)`, `w <- w - a`.

    Attributes:
      rho: decay of the mean squared gradient s.
      momentum: share of the last step that the next one keeps, in [0, 1).
      epsilon: added to s.
    """

    rho: float = 0.9
    momentum: float = 0.0
    epsilon: float = 1e-7

    @property
    def slots(self):
        return ("square", "momentum")

    def _apply(self, vector, slots, gradient, learning_rate, updates):
        tf.raw_ops.ResourceApplyRMSProp(
            var=vector.handle,
            ms=slots["square"].handle,
            mom=slots["momentum"].handle,
            lr=learning_rate,
            rho=self.rho,
            momentum=self.momentum,
            epsilon=self.epsilon,
            grad=gradient,
            use_locking=True,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adam(Optimizer):
    """`m <- b1 m + (1 - b1) g`, `v <- b2 v + (1 - b2) g^2`, `w <- w - r sqrt(1 - b2^t) / (1 - b1^t) m / (sqrt(v) + eps)`.

    t is the number of updates of this vector, not of the run. With a weight decay this is AdamW.

    Attributes:
      beta_1: b1, decay of the mean gradient m.
      beta_2: b2, decay of the mean squared gradient v.
      epsilon: eps.
    """

    decoupled: ClassVar[bool] = True

    beta_1: float = 0.9
    beta_2: float = 0.999
    epsilon: float = 1e-7

    @property
    def slots(self):
        return ("mean", "square")

    def _apply(self, vector, slots, gradient, learning_rate, updates):
        t = tf.cast(updates, tf.float32)
        tf.raw_ops.ResourceApplyAdam(
            var=vector.handle,
            m=slots["mean"].handle,
            v=slots["square"].handle,
            beta1_power=tf.pow(self.beta_1, t),
            beta2_power=tf.pow(self.beta_2, t),
            lr=learning_rate,
            beta1=self.beta_1,
            beta2=self.beta_2,
            epsilon=self.epsilon,
            grad=gradient,
            use_locking=True,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdamW(Adam):
    """Adam with decoupled weight decay 0.004 for every group that names no other (`OptimizerConfig.weight_decay`)."""

    default_weight_decay: ClassVar[float] = 0.004


OPTIMIZERS = {"sgd": SGD, "rmsprop": RMSProp, "adam": Adam, "adamw": AdamW}


def find(optimizer: "Optimizer | str") -> Optimizer:
    """The optimizer itself, or the one of that name with its defaults.

    Raises:
      ConfigError: unknown name, or neither.
    """
    if isinstance(optimizer, str):
        return make(optimizer if optimizer in OPTIMIZERS else optimizer.lower())  # `Adam`, as Keras calls it
    if not isinstance(optimizer, Optimizer):
        raise errors.ConfigError(f"optimizer={optimizer!r}; expected a name or an Optimizer")
    return optimizer


def make(name: str, **settings: float | bool) -> Optimizer:
    """The optimizer `name` with settings.

    Raises:
      ConfigError: unknown name or setting; the message has the nearest known one.
    """
    if name not in OPTIMIZERS:
        raise errors.ConfigError(errors.unknown("optimizer", name, OPTIMIZERS))
    fields = {field.name for field in dataclasses.fields(OPTIMIZERS[name])}
    for setting in settings:
        if setting not in fields:
            raise errors.ConfigError(errors.unknown(f"setting of optimizer '{name}'", setting, fields))
    return OPTIMIZERS[name](**settings)
