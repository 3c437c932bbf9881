"""What a run would find out after training, found out before: files that do not load, models that do not export."""

from collections.abc import Sequence

import keras
import tensorflow as tf

from k4p1 import errors
from k4p1.backbones import build
from k4p1.backbones.backbone import Backbone
from k4p1.data import preprocessing
from k4p1.patches import costs
from k4p1.patches.costs import TaskCosts
from k4p1.patches.fold import fold
from k4p1.patches.inference import inference_model
from k4p1.patches.patched_model import LOGITS, PatchedModel
from k4p1.tasks import objectives
from k4p1.tasks.objectives import Objective
from k4p1.tasks.prepare import PreparedTask


def preflight(backbone: Backbone, prepared: Sequence[PreparedTask]) -> dict[str, TaskCosts]:
    """Tries, before the first step, what follows the last one, and returns the costs of the tasks by name.

    The backbone must be built again from its description; the model of each task must fold, and the graph of its export be
    traced. Costs depend on no value, so that they are counted here once; where they cannot be counted, they are None. Tasks
    that are alike are tried once.

    Raises:
      ConfigError: something that cannot be done after training; names the layer or task.
    """
    build.check_round_trip(backbone)
    known: dict[tuple, TaskCosts] = {}
    found = {}
    for task in prepared:
        objective = objectives.find(task.task.objective)
        alike = (str(task.patched.spec), task.patched.image_size, objective.name, len(task.labels), *task.patched.factors())
        if alike not in known:
            known[alike] = _tried(task.name, task.patched, objective)
        found[task.name] = known[alike]
    return found


def counted(patched: PatchedModel, folded: keras.Model | None = None) -> TaskCosts:
    """The costs of a task model; None, and a warning, for what cannot be counted: that is no reason to stop a run."""
    try:
        return costs.task_costs(patched, folded)
    except Exception as e:
        errors.warn(f"task '{patched.model.name}': its multiply-adds cannot be counted ({errors.reason(e)})")
        return TaskCosts(costs.private_bits(patched), None, None, None)


def _tried(name: str, patched: PatchedModel, objective: Objective) -> TaskCosts:
    try:
        folded = fold(patched.model)
        _trace(inference_model(patched.model).model, patched.image_size, objective)
    except errors.K4p1Error:
        raise
    except Exception as e:  # TensorFlow and Keras raise many kinds
        raise errors.ConfigError(
            f"task '{name}': its model could be trained, but not be exported afterwards: {errors.reason(e)}"
        ) from e
    return counted(patched, folded)


def _trace(model: keras.Model, image_size: tuple[int, int], objective: Objective) -> None:
    """Traces the graph that a SavedModel holds."""

    def answers(images):
        outputs = model(preprocessing.resize(images, image_size), training=False)
        outputs = outputs if isinstance(outputs, dict) else {LOGITS: outputs}
        return objective.answers({n: tf.cast(output, tf.float32) for n, output in outputs.items()})

    tf.function(answers).get_concrete_function(tf.TensorSpec([None, None, None, 3], tf.uint8))
