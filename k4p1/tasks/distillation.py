"""Distillation: a finished task teaches, by its logits on the images of another one.

With `head=own` the task's own logits follow the teacher's, whose classes are the task's (Hinton et al. 2015, section 2).
With `head=old` the task keeps the teacher's head beside its own, on the features that it is about to change, and that old
head follows what the unchanged network said: learning without forgetting (Li and Hoiem 2016, section 3). Both losses of a
step are of the same images.
"""

import dataclasses
from collections.abc import Sequence

import keras
import tensorflow as tf

from k4p1 import errors
from k4p1.engine.metrics import Batch, Outputs, PerExample
from k4p1.patches.patched_layer import FIXED, RANDOM, TRAINED, private_copy
from k4p1.patches.patched_model import LOGITS, PRIVATE, Parameter, PatchedModel
from k4p1.patches.task_head import DEFAULT_OBJECTIVE, FEATURES

NAME = "distillation"
HEADS = ("own", "old")


def distillation_options(*, teacher: str = "", head: str = "own", temperature: float = 2.0) -> None:
    """The options of the loss term `distillation`; what it computes is `Lesson.loss`."""


@dataclasses.dataclass(frozen=True, eq=False)
class Teacher:
    """A finished task, loaded with a backbone of its own.

    Attributes:
      task: its name.
      patched: its model; no value of it changes.
      labels: its class names.
      fingerprint: of its backbone.
      path: of its patch file.
      objective: name of its objective.
    """

    task: str
    patched: PatchedModel
    labels: tuple[str, ...]
    fingerprint: str
    path: str
    objective: str = DEFAULT_OBJECTIVE


@dataclasses.dataclass(frozen=True, eq=False)
class Lesson:
    """What one distillation term compares: `T^2 cross_entropy(softmax(teacher / T), softmax(student / T))`.

    Hinton et al. 2015, section 2; the factor keeps gradients of the size that they have at T = 1.

    Attributes:
      teacher: who teaches.
      student: name of the output that learns.
      observed: name of the teacher's output.
      temperature: T.
      old_head: the teacher's head on the student's features, where `head=old`.
    """

    teacher: Teacher
    student: str
    observed: str
    temperature: float
    old_head: keras.layers.Layer | None = None

    def metrics(self) -> dict[str, PerExample]:
        """`agreement_<teacher>`, see `agreement`."""
        return {f"agreement_{self.teacher.task}": PerExample(self.agreement)}

    def loss(self, batch: Batch, outputs: Outputs) -> tf.Tensor:
        """`-T^2 sum_c p_c log softmax(student / T)_c` with `p = softmax(teacher / T)`; (batch,)."""
        target = tf.nn.softmax(outputs[self.observed] / self.temperature)
        return self.temperature**2 * tf.nn.softmax_cross_entropy_with_logits(
            target, outputs[self.student] / self.temperature
        )

    def agreement(self, batch: Batch, outputs: Outputs) -> tf.Tensor:
        """1 where the student's largest logit is the teacher's; (batch,)."""
        same = tf.equal(tf.argmax(outputs[self.student], axis=-1), tf.argmax(outputs[self.observed], axis=-1))
        return tf.cast(same, tf.float32)


def attach(
    patched: PatchedModel,
    task: str,
    labels: Sequence[str],
    teacher: Teacher,
    *,
    number: int,
    head: str,
    temperature: float,
    fingerprint: str,
) -> tuple[PatchedModel, Lesson]:
    """A task model that a teacher watches, and the lesson.

    The teacher's variables become fixed auxiliary parameters of the task, so that workers of a cluster hold them, too.

    Args:
      patched: the task model.
      task: its name.
      labels: its class names.
      teacher: who teaches.
      number: position of the term in the loss.
      head: `own` or `old`.
      temperature: T.
      fingerprint: of the run's backbone before it is trained.

    Raises:
      ConfigError: other image sizes, labels or backbone than this distillation needs.
    """
    if patched.image_size != teacher.patched.image_size:
        size, theirs = ("x".join(map(str, one.image_size)) for one in (patched, teacher.patched))
        raise errors.ConfigError(
            f"task '{task}' has images of {size} pixels, its teacher of {theirs}; give both the same image_size"
        )
    for one, who in ((patched, f"task '{task}'"), (teacher.patched, f"teacher '{teacher.task}'")):
        if isinstance(one.model.output, dict) or len(one.model.output.shape) != 2:
            raise errors.ConfigError(f"{who} has no logits (batch, classes) to distil; its objective is another one")
    observed = f"teacher_{number}"
    fixed = [
        Parameter(f"{observed}/{p.key}", p.variable, PRIVATE, "teacher", FIXED, auxiliary=True)
        for p in teacher.patched.parameters
        if p.role != RANDOM
    ]
    changes = {
        "observers": {**patched.observers, observed: teacher.patched.model},
        "parameters": (*patched.parameters, *fixed),
    }
    if head == "own":
        if tuple(labels) != teacher.labels:
            raise errors.ConfigError(
                f"task '{task}' has {len(labels)} labels ({', '.join(labels[:3])}, ...), its teacher '{teacher.task}' "
                f"{len(teacher.labels)} ({', '.join(teacher.labels[:3])}, ...); for classes of its own give "
                "distillation(head=old)"
            )
        return dataclasses.replace(patched, **changes), Lesson(teacher, LOGITS, observed, temperature)
    if teacher.objective != DEFAULT_OBJECTIVE:
        raise errors.ConfigError(
            f"task '{task}' cannot keep the head of '{teacher.task}', whose objective is '{teacher.objective}'; head=old "
            "needs a teacher that classifies"
        )
    if str(teacher.patched.spec) != "head" or teacher.fingerprint != fingerprint:
        why = "its patch is" if str(teacher.patched.spec) != "head" else "it is for another backbone; its patch is"
        raise errors.ConfigError(
            f"task '{task}' cannot keep the head of '{teacher.task}': {why} '{teacher.patched.spec}'; head=old needs a "
            "patch 'head' on the backbone that the run starts from"
        )
    old = private_copy(teacher.patched.head)
    old.name = f"old_head_{number}"
    student = f"old_{number}"
    logits = keras.layers.Activation("linear", dtype="float32", name=student)(old(patched.endpoints[FEATURES]))
    owned = [Parameter(f"{old.name}/head/{v.name}", v, PRIVATE, "head", TRAINED, auxiliary=True) for v in old.variables]
    changes["parameters"] += tuple(owned)
    changes["extra_outputs"] = {**patched.extra_outputs, student: logits}
    return dataclasses.replace(patched, **changes), Lesson(teacher, student, observed, temperature, old)
