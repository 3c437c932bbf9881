"""Loss terms of tailored networks: expected complexity, and the activations of a teacher's blocks (NT, section 3.4).

`softmax_cross_entropy + 0.3*complexity + 10*block_distillation(teacher='.../patch.safetensors')` is the paper's loss
(equation 12).
"""

import dataclasses
from collections.abc import Sequence

import keras
import tensorflow as tf

from k4p1 import errors
from k4p1.backbones import endpoints
from k4p1.engine.metrics import Batch, Outputs, PerExample
from k4p1.patches.patched_layer import FIXED, RANDOM
from k4p1.patches.patched_model import LOGITS, PRIVATE, Parameter, PatchedModel
from k4p1.patches.tailored import complexity
from k4p1.patches.tailored.network import TailoredNetwork
from k4p1.patches.tailored.paths import Path
from k4p1.tasks.distillation import Teacher

ATTENTION = "attention_"
"""How the names of metrics begin that say the attention of a path."""
COMPLEXITY, BLOCK_DISTILLATION = "complexity", "block_distillation"
GRADIENTS, NORMS = ("local", "end_to_end"), ("mean", "sum")


def complexity_options(*, penalty: str = "paper", cost: str = "multiply_adds") -> None:
    """The options of the loss term `complexity`; see `k4p1.patches.tailored.complexity.expected`."""


def block_distillation_options(*, teacher: str = "", gradient: str = "local", norm: str = "mean") -> None:
    """The options of the loss term `block_distillation`; see `BlockLesson`."""


@dataclasses.dataclass(frozen=True, eq=False)
class ComplexityTerm:
    """`E[C]` (NT, equations 7 to 10), the same for every example.

    Attributes:
      network: tailored.
      share: c of each live path.
      penalty: how it is read.
    """

    network: TailoredNetwork
    share: dict[Path, float]
    penalty: str

    def loss(self, batch: Batch, outputs: Outputs) -> tf.Tensor:
        """(batch,)."""
        into = list(self.network.into.values())
        attention = complexity.by_path([outputs[_attention(node)] for node in self.network.into], into)
        value = complexity.expected(attention, self.share, len(self.network.blocks), self.penalty)
        return tf.fill(tf.shape(batch["weight"]), tf.cast(value, tf.float32))

    def metrics(self) -> dict[str, PerExample]:
        """The attention of every live path, for curves: `attention_<node>_main`, `attention_<node>_<source>`."""
        return {
            attention_metric(path): PerExample(_one(_attention(node), rank), larger_is_better=False)
            for node, into in self.network.into.items()
            for rank, path in enumerate(into)
        }


@dataclasses.dataclass(frozen=True, eq=False)
class BlockLesson:
    """How far logits and nodes are from those of a teacher, by live node i.

    * norm `mean`: `(mean((l - l^t)^2) + sum_i mean((x_i - x_i^t)^2)) / L`, as released;
    * norm `sum`: `|l - l^t|^2 + sum_i |x_i - x_i^t|^2`, as printed (NT, equation 11).

    With gradient `end_to_end` the terms reach everything before a node, as printed; with `local` those of a node reach its
    own proxies and attention alone, as released. Either way every block is computed once, and statistics move once.

    Attributes:
      teacher: who teaches.
      observed: prefix of the teacher's outputs.
      student: names of the student's nodes, by node.
      blocks: L.
      norm: `mean` or `sum`.
    """

    teacher: Teacher
    observed: str
    student: dict[int, str]
    blocks: int
    norm: str

    def loss(self, batch: Batch, outputs: Outputs) -> tf.Tensor:
        """(batch,)."""
        total = self._distance(outputs[LOGITS], outputs[f"{self.observed}/{LOGITS}"])
        for node, name in self.student.items():
            total += self._distance(outputs[name], outputs[f"{self.observed}/{_node(node)}"])
        return total / self.blocks if self.norm == "mean" else total

    def _distance(self, student: tf.Tensor, teacher: tf.Tensor) -> tf.Tensor:
        squares = tf.math.squared_difference(student, teacher)
        axes = list(range(1, len(squares.shape)))
        return tf.reduce_mean(squares, axes) if self.norm == "mean" else tf.reduce_sum(squares, axes)

    def metrics(self) -> dict[str, PerExample]:
        """`agreement_<teacher>`: 1 where the largest logit is the teacher's."""

        def agreement(batch: Batch, outputs: Outputs) -> tf.Tensor:
            theirs = tf.argmax(outputs[f"{self.observed}/{LOGITS}"], axis=-1)
            return tf.cast(tf.equal(tf.argmax(outputs[LOGITS], axis=-1), theirs), tf.float32)

        return {f"agreement_{self.teacher.task}": PerExample(agreement)}


def attach_complexity(patched: PatchedModel, task: str, *, penalty: str, cost: str) -> tuple[PatchedModel, ComplexityTerm]:
    """A task model that puts out its attention, and the term.

    Raises:
      ConfigError: the task is not tailored, an unknown penalty or cost.
    """
    network = _network(patched, task, COMPLEXITY)
    if penalty not in complexity.PENALTIES:
        raise errors.ConfigError(errors.unknown("penalty of complexity", penalty, complexity.PENALTIES))
    share = network.shares(cost)
    outputs = {_attention(node): tensor for node, tensor in network.attention.items()}
    changed = dataclasses.replace(patched, extra_outputs={**patched.extra_outputs, **outputs})
    return changed, ComplexityTerm(network, share, penalty)


def attach_blocks(
    patched: PatchedModel, task: str, labels: Sequence[str], teacher: Teacher, *, number: int, gradient: str, norm: str
) -> tuple[PatchedModel, BlockLesson]:
    """A task model whose nodes a teacher watches, and the lesson.

    Args:
      patched: the task model, tailored.
      task: its name.
      labels: its class names.
      teacher: a finished task with the same labels and image size, on a backbone of the same blocks.
      number: position of the term in the loss.
      gradient: `local` or `end_to_end`.
      norm: `mean` or `sum`.

    Raises:
      ConfigError: a teacher that does not fit, or an unknown gradient or norm.
    """
    network = _network(patched, task, BLOCK_DISTILLATION)
    for what, given, known in (("gradient", gradient, GRADIENTS), ("norm", norm, NORMS)):
        if given not in known:
            raise errors.ConfigError(errors.unknown(f"{what} of block_distillation", given, known))
    if patched.image_size != teacher.patched.image_size:
        size, theirs = ("x".join(map(str, one.image_size)) for one in (patched, teacher.patched))
        raise errors.ConfigError(
            f"task '{task}' has images of {size} pixels, its teacher of {theirs}; give both the same image_size"
        )
    if tuple(labels) != teacher.labels:
        raise errors.ConfigError(
            f"task '{task}' has {len(labels)} labels ({', '.join(labels[:3])}, ...), its teacher '{teacher.task}' "
            f"{len(teacher.labels)} ({', '.join(teacher.labels[:3])}, ...); block_distillation needs a teacher of the "
            "same task"
        )
    observed = f"teacher_{number}"
    nodes = {node: network.blocks[node - 1].node for node in network.into}
    watcher = _watched(teacher, {_node(node): name for node, name in nodes.items()}, task)
    for node in nodes:
        mine, theirs = (tuple(one.shape[1:]) for one in (network.nodes[node], watcher.output[_node(node)]))
        if mine != theirs:
            raise errors.ConfigError(
                f"task '{task}': node {node} of its network is {mine}, of its teacher's '{teacher.task}' {theirs}; the "
                "teacher must be trained on the same backbone"
            )
    tensors = {n: network.local(n) if gradient == "local" else network.nodes[n] for n in nodes}
    fixed = [
        Parameter(f"{observed}/{p.key}", p.variable, PRIVATE, "teacher", FIXED, auxiliary=True)
        for p in teacher.patched.parameters
        if p.role != RANDOM
    ]
    changed = dataclasses.replace(
        patched,
        extra_outputs={**patched.extra_outputs, **{_node(n): tensor for n, tensor in tensors.items()}},
        observers={**patched.observers, observed: watcher},
        parameters=(*patched.parameters, *fixed),
    )
    return changed, BlockLesson(teacher, observed, {n: _node(n) for n in nodes}, len(network.blocks), norm)


def attention_metric(path: Path) -> str:
    """The name under which the attention of a path is logged."""
    return f"{ATTENTION}{path.node}_{'main' if path.is_main else path.source}"


def _network(patched: PatchedModel, task: str, term: str) -> TailoredNetwork:
    if not isinstance(patched.rewiring, TailoredNetwork):
        raise errors.ConfigError(
            f"task '{task}': loss term '{term}' needs a tailored network, its patch is '{patched.spec}'; give "
            "patch = 'nettailor+head'"
        )
    return patched.rewiring


def _watched(teacher: Teacher, nodes: dict[str, str], task: str) -> keras.Model:
    """The teacher's model with its logits and nodes as outputs, by name."""
    model = teacher.patched.model
    if isinstance(model.output, dict) or len(model.output.shape) != 2:
        raise errors.ConfigError(f"teacher '{teacher.task}' has no logits (batch, classes); its objective is another one")
    seen: dict[str, keras.KerasTensor] = {}
    image = keras.Input(model.input.shape[1:], dtype=model.input.dtype, name="image")
    logits = endpoints.run_through(
        model, image, lambda operation: operation, lambda name, _, output: seen.update({name.rpartition("/")[2]: output})
    )
    for name in nodes.values():
        if name not in seen:
            raise errors.ConfigError(
                f"task '{task}': the network of its teacher '{teacher.task}' has no layer '{name}'; the teacher must be "
                "trained on the same backbone"
            )
    return keras.Model(image, {LOGITS: logits, **{node: seen[name] for node, name in nodes.items()}}, name=model.name)


def _attention(node: int) -> str:
    return f"attention_{node}"


def _node(node: int) -> str:
    return f"node_{node}"


def _one(name: str, rank: int):
    return lambda batch, outputs: tf.fill(tf.shape(batch["weight"]), outputs[name][rank])
