"""Several steps of a task in one function that runs on a worker: one message to the coordinator instead of many."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from k4p1.cluster.store import ServerStore

_TAKEN, _NO_STEP, _NO_DATA = 0.0, 1.0, 2.0
_COLUMNS = 5


class Results(NamedTuple):
    """What the steps of one dispatch returned.

    Attributes:
      rows: (steps, 5 + terms) float64: loss, examples, skipped, ticket, staleness, terms of the loss.
      out_of_data: whether the worker's input pipeline has ended.
    """

    rows: np.ndarray
    out_of_data: bool

    @classmethod
    def of(cls, packed: np.ndarray) -> "Results":
        """From what the function of `several_steps` returns."""
        return cls(packed[: int(packed[-1, 0])], packed[-1, 1] == _NO_DATA)


def several_steps(
    step: Callable, store: ServerStore, task: str, terms: Sequence[str] = (), *, most: int, seconds: float
) -> Callable[[Any], tf.Tensor]:
    """A function of an iterator that takes steps one after another, until

    * there were `most` of them, or the time is up;
    * the store permits no more (`ServerStore.allow`), or the task has reached its target;
    * the data end: such a step takes no ticket.

    Each step begins when the one before it has updated everything, so that a worker that dies loses one update at most.

    Args:
      step: see `k4p1.engine.step.training_step`.
      store: of its parameters.
      task: its name.
      terms: of the loss, whose values come last; those of a loss of one term say nothing new.
      most: steps.
      seconds: after so much time no further step begins.

    Returns:
      A function whose result `Results.of` reads: one tensor, one message.
    """
    width = _COLUMNS + len(terms)

    def packed(ticket: tf.Tensor, batch: Any) -> tf.Tensor:
        *values, by_name = step(batch, ticket)
        return tf.stack([tf.cast(value, tf.float64) for value in (*values, *(by_name[name] for name in terms))])

    def nothing(reason: float) -> tuple[tf.Tensor, tf.Tensor]:
        return tf.zeros([width], tf.float64), tf.constant(reason, tf.float64)

    def with_data(batch: Any) -> tuple[tf.Tensor, tf.Tensor]:
        with tf.control_dependencies(tf.nest.flatten(batch, expand_composites=True)):
            ticket = store.next_ticket(task)
        return tf.cond(
            ticket < store.steps[task],
            lambda: (packed(ticket, batch), tf.constant(_TAKEN, tf.float64)),
            lambda: nothing(_NO_STEP),
        )

    def function(iterator: Any) -> tf.Tensor:
        began = tf.timestamp()

        def body(count, goes_on, outcome, rows):
            del goes_on, outcome
            found = iterator.get_next_as_optional()
            row, outcome = tf.cond(found.has_value(), lambda: with_data(found.get_value()), lambda: nothing(_NO_DATA))
            rows = rows.write(count, row)
            count += tf.cast(outcome == _TAKEN, tf.int32)
            with tf.control_dependencies([row]):  # after the step
                in_time = tf.timestamp() - began < seconds
                goes_on = (outcome == _TAKEN) & (count < most) & in_time & store.may_step(task)
            return count, goes_on, outcome, rows

        rows = tf.TensorArray(tf.float64, size=most, element_shape=[width])
        start = (tf.constant(0), store.may_step(task), tf.constant(_NO_STEP, tf.float64), rows)
        count, _, outcome, rows = tf.while_loop(
            lambda count, goes_on, outcome, rows: goes_on, body, start, parallel_iterations=1
        )
        last = tf.concat([[tf.cast(count, tf.float64), outcome], tf.zeros([width - 2], tf.float64)], axis=0)
        return tf.concat([rows.stack(), [last]], axis=0)

    return function
