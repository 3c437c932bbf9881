"""One training step of one task: read its groups, differentiate, update its groups."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import NamedTuple

import tensorflow as tf

from k4p1.engine.groups import STATISTICS, TRAINED
from k4p1.engine.pure import PureTask
from k4p1.engine.schedules import Schedule
from k4p1.engine.store import Store

Batch = Mapping[str, tf.Tensor]


class Term(NamedTuple):
    """A term of a loss: its mean over the batch, and the weight that it has in the sum."""

    value: tf.Tensor
    weight: float


Loss = Callable[[Batch, Mapping[str, tf.Tensor]], Mapping[str, Term]]
"""The terms of a loss by name, of (batch, outputs of the task model)."""


def total(terms: Mapping[str, Term]) -> tf.Tensor:
    """The weighted sum of terms, a scalar."""
    weighted = [term.value if term.weight == 1.0 else term.weight * term.value for term in terms.values()]
    return weighted[0] if len(weighted) == 1 else tf.add_n(weighted)


class StepResult(NamedTuple):
    """What a step reports: scalars on the device.

    Attributes:
      loss: of the batch.
      examples: sum of the example weights, so corrupt images do not count.
      skipped: corrupt images in the batch.
      ticket: number of the step.
      staleness: updates of the task's largest trained vector between the step's read and its own update, or its drop.
      terms: of the loss by name, before they are weighted; empty where the loss is one term.
    """

    loss: tf.Tensor
    examples: tf.Tensor
    skipped: tf.Tensor
    ticket: tf.Tensor
    staleness: tf.Tensor
    terms: dict[str, tf.Tensor]


@dataclasses.dataclass(frozen=True)
class Pace:
    """What a step must know of the run to set its learning rate.

    Attributes:
      steps: step target of the task.
      epochs: passes over its data of each task of the run; see `k4p1.engine.schedules`.
      seed: of the run.
      index: the task's rank in the run.
    """

    steps: int
    epochs: tuple[float, ...]
    seed: int
    index: int


def training_step(
    task: PureTask,
    store: Store,
    loss: Loss,
    schedule: Schedule,
    pace: Pace,
    loss_scaled: bool = False,
) -> Callable[[Batch], StepResult]:
    """A function of one batch that takes a ticket, computes loss and gradients, and updates the groups that it used.

    It may be given its ticket as a second argument. The one that it takes depends on the batch: without data there is none.
    An update that comes too late for the store (`Store.max_staleness`) is dropped, and counted there.

    Args:
      task: the task as a pure function.
      store: holds the groups; see `Store`.
      loss: the terms of the loss of (batch, outputs); see `Loss`.
      schedule: of the learning rates of the task's groups.
      pace: step target and seed.
      loss_scaled: True under mixed_float16: gradients that are not finite are then dropped, and the loss scale adapts.
    """
    trained = [group for group in task.groups if group.role == TRAINED]
    moved = [group for group in task.groups if group.role == STATISTICS]
    largest = max(trained, key=lambda group: group.packing.size) if trained else None

    def step(batch: Batch, ticket: tf.Tensor | None = None) -> StepResult:
        if ticket is None:
            with tf.control_dependencies(tf.nest.flatten(batch, expand_composites=True)):
                ticket = store.take_ticket(task.name)
        progress = tf.cast(ticket, tf.float32) / float(pace.steps)
        factor = schedule.factor(progress, pace.epochs)
        seed = tf.random.experimental.stateless_fold_in(
            tf.constant([pace.seed, pace.index], tf.int32), tf.cast(ticket, tf.int32)
        )
        seen = store.updates(largest) if largest else tf.zeros([], tf.int64)
        vectors = {group.name: store.read(group) for group in task.groups}
        watched = [vectors[group.name] for group in trained]
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(watched)
            forward = task.forward(vectors, batch["inputs"], training=True, seed=seed)
            terms = loss(batch, forward.outputs)
            value = total(terms)
            scale = store.loss_scale(task.name) if loss_scaled else None
            target = (value + forward.penalty) * (1.0 if scale is None else scale)
        gradients = tape.gradient(target, watched, unconnected_gradients=tf.UnconnectedGradients.ZERO)
        with tf.control_dependencies([ticket]):  # a step that got no ticket changes nothing
            gradients = [tf.identity(gradient) for gradient in gradients]
            statistics = {group.name: tf.identity(forward.statistics[group.name]) for group in moved}
        lag = None
        if store.max_staleness is not None and largest is not None:
            with tf.control_dependencies(gradients):  # as late as possible: just before the update
                lag = store.updates(largest) - seen
        slower = 1.0 / (1.0 + tf.cast(lag, tf.float32)) if lag is not None and store.damp_stale_updates else None

        def update() -> tf.Tensor:
            """Returns how many updates came between the read and this one."""
            others = tf.zeros([], tf.int64)
            for group, gradient in zip(trained, gradients, strict=True):
                rate = factor * group.updates[task.name].rate
                rate = rate if slower is None else rate * slower
                count = store.apply_gradient(group, gradient if scale is None else gradient / scale, rate)
                others = count - 1 - seen if group is largest else others
            for group in moved:
                store.move_statistics(group, statistics[group.name], vectors[group.name], task.statistics_momentum)
            return others

        finite = None
        if scale is not None:
            finite = tf.reduce_all([tf.reduce_all(tf.math.is_finite(g)) for g in gradients])
        late = None if lag is None else lag > store.max_staleness
        if finite is None and late is None:
            staleness = update()
        else:
            accepted = tf.logical_not(late) if finite is None else finite if late is None else finite & ~late
            staleness = tf.cond(accepted, update, lambda: store.count_dropped(task.name, late, lag))
        if finite is not None:
            store.report_gradients(task.name, finite)
        weights = batch["weight"]
        skipped = tf.reduce_sum(1.0 - weights)
        named = {name: term.value for name, term in terms.items()} if len(terms) > 1 else {}
        return StepResult(value, tf.reduce_sum(weights), skipped, ticket, staleness, named)

    return step
