"""A student's patch without the paths that pruning took (NT, section 3.5)."""

import dataclasses
from collections.abc import Sequence

import keras

from k4p1.patches.patched_model import PatchedModel
from k4p1.patches.spec import PatchSpec
from k4p1.patches.tailored.paths import Path, to_text

KIND = "nettailor"


def pruned_spec(spec: PatchSpec, live: Sequence[Path]) -> PatchSpec:
    """The spec of a student with only the live paths left."""
    text = to_text(live)
    return PatchSpec(tuple(dataclasses.replace(k, live=text) if k.name == KIND else k for k in spec.kinds))


def prune_values(student: PatchedModel, pruned: PatchedModel) -> None:
    """Writes what a student has learned into its pruned copy; softmax renormalises the attention that is left."""
    values = {key: keras.ops.convert_to_numpy(variable) for key, variable in student.private().items()}
    before, after = student.rewiring, pruned.rewiring
    for key, variable in pruned.private().items():
        value = values[key]
        if key.endswith(f"/{KIND}/attention"):
            node = int(key.split("/")[0].removeprefix("block_"))
            value = value[[before.into[node].index(path) for path in after.into[node]]]
        variable.assign(value)
