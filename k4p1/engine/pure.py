"""A task model as a pure function of its packed groups."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import keras
import tensorflow as tf

from k4p1.engine import fused_batch_normalization
from k4p1.engine.groups import STATISTICS, ParameterGroup, of_task
from k4p1.patches.patched_batch_normalization import normalised_by
from k4p1.patches.patched_layer import RANDOM
from k4p1.patches.patched_model import LOGITS, SHARED, PatchedModel


class Forward(NamedTuple):
    """What a forward pass gives.

    Attributes:
      outputs: of the task model by name, float32; `logits` (batch, classes) where it classifies.
      statistics: the new vectors of the statistics groups, by group name.
      penalty: the sum of losses that layers add, such as regularisers, scalar.
    """

    outputs: dict[str, tf.Tensor]
    statistics: dict[str, tf.Tensor]
    penalty: tf.Tensor


class PureTask:
    """`forward(vectors, inputs, training, seed)`: parameters and statistics in, outputs and new statistics out.

    Args:
      name: of the task.
      patched: its model.
      groups: of the run; those that the task uses are picked.

    Attributes:
      groups: that the task uses.
      statistics_momentum: of its statistics, by key.
      recalibrated: keys of the statistics that population statistics replace: private ones where the patch says so, and
        all shared ones that move.
    """

    def __init__(self, name: str, patched: PatchedModel, groups: Sequence[ParameterGroup]):
        self.name = name
        self._patched = patched
        plain = not patched.extra_outputs and not isinstance(patched.model.output, dict)
        self._model = patched.model if plain else patched.training_model
        self.groups = of_task(groups, name)
        self.statistics_momentum = patched.statistics_momentum
        shared = {p.key for p in patched.parameters if p.owner == SHARED and p.role == STATISTICS}
        fixed = {key for key, momentum in self.statistics_momentum.items() if momentum >= 1.0}  # they never move
        self.recalibrated = frozenset((patched.recalibrated | shared) - fixed)
        self._seeds = [p.variable for p in patched.parameters if p.role == RANDOM and _is_seed(p.variable)]

    def forward(
        self, vectors: Mapping[str, tf.Tensor], inputs: tf.Tensor, *, training: bool, seed: tf.Tensor | None = None
    ) -> Forward:
        """Runs the model.

        Args:
          vectors: float32 vectors by group name, for every group in `self.groups`; or the group's tensors by name.
          inputs: of the model; images (batch, height, width, 3) of 0 to 255.
          training: whether batch normalisation and dropout train.
          seed: int32 (2,), from which the seeds of dropout are drawn.
        """
        state = []
        for group in self.groups:
            given = vectors[group.name]
            unpacked = given if isinstance(given, Mapping) else group.packing.unpack(given)
            state += zip(group.variables, unpacked.values(), strict=True)
        for index, variable in enumerate(self._seeds):
            base = tf.zeros([2], tf.int32) if seed is None else seed
            drawn = tf.random.experimental.stateless_fold_in(base, index)
            state.append((variable, tf.bitcast(drawn, tf.uint32)))
        fused = normalised_by(fused_batch_normalization.normalise_batch)
        with fused, keras.StatelessScope(state_mapping=state, collect_losses=True) as scope:
            outputs = self._model(inputs, training=training)
            penalties = self._model.losses
            outputs = dict(outputs) if isinstance(outputs, dict) else {LOGITS: outputs}
            for name, observer in self._patched.observers.items():
                observed = observer(inputs, training=False)
                several = isinstance(observed, dict)
                named = {f"{name}/{key}": one for key, one in observed.items()} if several else {name: observed}
                outputs |= {key: tf.stop_gradient(one) for key, one in named.items()}
        statistics = {
            group.name: group.packing.pack([scope.get_current_value(v) for v in group.variables])
            for group in self.groups
            if group.role == STATISTICS
        }
        outputs = {name: tf.cast(output, tf.float32) for name, output in outputs.items()}
        return Forward(outputs, statistics, tf.add_n(penalties) if penalties else tf.zeros([]))


def _is_seed(variable: keras.Variable) -> bool:
    """Whether an integer variable is the state of a seed generator; others, such as the count of `Normalization`, stay."""
    return tuple(variable.shape) == (2,)
