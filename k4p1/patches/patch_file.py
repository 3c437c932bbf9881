"""Patch files: a task's private parameters, bound to a backbone by fingerprint (format: docs/patch_file.md)."""

import json
import pathlib
from collections.abc import Mapping, Sequence

import keras
import numpy as np

import k4p1
from k4p1 import checks, errors
from k4p1.backbones import structure
from k4p1.backbones.backbone import Backbone
from k4p1.files import content_hash, schema, tensor_file
from k4p1.patches import factor_file, task_head
from k4p1.patches.apply import apply_patches
from k4p1.patches.bit_packing import BitPacking
from k4p1.patches.parameter_list import name_in
from k4p1.patches.patch_info import PatchInfo, check_labels
from k4p1.patches.patched_model import PatchedModel

FORMAT = "k4p1-patch"
HEAD_FORMAT = "k4p1-head"
VERSION = 1


def save_patch(
    path: str | pathlib.Path,
    patched: PatchedModel | keras.Model,
    backbone: Backbone,
    *,
    task: str,
    labels: Sequence[str],
    dropout: float = 0.0,
    objective: str = task_head.DEFAULT_OBJECTIVE,
) -> PatchInfo:
    """Writes the private parameters of a task model.

    A head that the task shares with others is written once, beside the patch's backbone: see `save_head`.

    Args:
      path: of the file.
      patched: what `apply_patches` gave, or its `model`.
      backbone: that it was built on.
      task: its name.
      labels: class names, one per output of one that classifies.
      dropout: rate before the head.
      objective: of the task.

    Raises:
      ConfigError: a Keras model that `apply_patches` has not made, a name that no task can have, or labels that do not
      match the classes. DivergedError: a value that is not finite, or a negative variance.
    """
    checks.check_task_name(task)
    patched = patched if isinstance(patched, PatchedModel) else PatchedModel.of_model(patched)
    check_labels(patched.model.output, labels, objective)
    info = PatchInfo(
        task=task,
        spec=patched.spec,
        labels=tuple(labels),
        image_size=patched.image_size,
        dropout=dropout,
        scaling=backbone.scaling,
        backbone=backbone.name,
        fingerprint=backbone.fingerprint(),
        structure=backbone.structure_hash(),
        shared_head=head_fingerprint(patched) if patched.spec.shares_head else "",
        k4p1_version=k4p1.__version__,
        factors=factor_file.factors_fingerprint(patched),
        objective=objective,
        structure_version=structure.VERSION,
    )
    stored = patched.stored()
    tensor_file.check_before_writing(f"task '{task}'", stored)
    tensor_file.write(path, FORMAT, VERSION, stored, info.as_metadata())
    return info


def read_info(path: str | pathlib.Path) -> PatchInfo:
    """What a patch file says about itself, after checking its content hash."""
    return read_patch(path)[1]


def read_patch(path: str | pathlib.Path) -> tuple[dict[str, np.ndarray], PatchInfo]:
    """The tensors of a patch file, and what it says about itself.

    Raises:
      ArtifactError: damaged, of another version, or with values or fields that no patch has.
    """
    tensors, metadata = tensor_file.read(path, FORMAT, VERSION)
    info = PatchInfo.from_metadata(metadata, str(path))
    tensor_file.check_values(path, tensors, bits=BitPacking.name)
    return tensors, info


def load_patch(
    path: str | pathlib.Path,
    backbone: Backbone,
    heads: str | pathlib.Path | None = None,
    factors: str | pathlib.Path | Mapping[str, keras.Variable] | None = None,
) -> PatchedModel:
    """Builds the task model of a patch file on a backbone.

    Args:
      path: of the patch file.
      backbone: the one that the patch was trained on.
      heads: folder of shared heads, for a task that shares its head.
      factors: folder of factor files, for a task whose adapters were compressed with those of others; or such factors.

    Raises:
      ConfigError: arguments of other types.
      ArtifactError: damaged, of another version, for another backbone, or its tensors do not fit; says what differs. The
        backbone is not changed.
    """
    if not isinstance(path, (str, pathlib.Path)) or not isinstance(backbone, Backbone):
        raise errors.ConfigError(
            f"load_patch(path, backbone): got a {type(path).__name__} and a {type(backbone).__name__}; expected the "
            "path of a patch file and a Backbone"
        )
    tensors, info = read_patch(path)
    _check_backbone(path, info, backbone)
    head_values = load_head(path, info, heads) if info.shared_head else None
    is_trained = backbone.shared_trained
    try:
        patched = apply_patches(
            backbone,
            info.spec,
            head=task_head.of_objective(info.objective, info.labels),
            image_size=info.image_size,
            factors=_factors(info, factors),
            dropout=info.dropout,
            name=info.task,
        )
    except errors.ConfigError as e:
        raise errors.ArtifactError(f"the task of {path} cannot be built on '{backbone.name}': {e}") from e
    finally:
        if is_trained:  # by models of other tasks, which go on
            backbone.set_trainable(True)
    what = f"task '{info.task}' on backbone '{backbone.name}'"
    patched.restore(tensors, what)
    if head_values is not None:
        assign_head(patched, head_values, what)
    return patched


def save_head(folder: str | pathlib.Path, patched: PatchedModel, labels: Sequence[str]) -> pathlib.Path:
    """Writes the head that tasks share, named by its fingerprint."""
    path, values = pathlib.Path(folder) / f"{head_fingerprint(patched)[:16]}.safetensors", _head_values(patched)
    tensor_file.check_before_writing("the shared head", values)
    tensor_file.write(path, HEAD_FORMAT, VERSION, values, {"labels": json.dumps(list(labels))})
    return path


def head_fingerprint(patched: PatchedModel) -> str:
    """Hash of the values of a task's head."""
    return content_hash.digest(_head_values(patched))


def _check_backbone(path, info: PatchInfo, backbone: Backbone) -> None:
    found = backbone.structure_hash(info.structure_version)
    if info.structure != found:
        raise errors.ArtifactError(
            f"{path} is for backbone '{info.backbone}' of another structure ({info.structure[:12]}) than "
            f"'{backbone.name}' ({found[:12]})"
        )
    found = backbone.fingerprint(info.structure_version)
    if info.fingerprint != found:
        raise errors.ArtifactError(
            f"{path} is for a '{info.backbone}' with other weights: its fingerprint is {info.fingerprint[:12]}, that of the "
            f"backbone given {found[:12]}"
        )


def _factors(info: PatchInfo, given) -> Mapping[str, keras.Variable] | None:
    if not info.factors or isinstance(given, Mapping):
        return given if info.factors else None
    return factor_file.load_factors(given, info.factors, info.fingerprint)


def load_head(path: str | pathlib.Path, info: PatchInfo, heads: str | pathlib.Path | None) -> dict[str, np.ndarray]:
    """The values of the head that the patch file `path` shares with others, from the folder `heads`; see `assign_head`.

    Raises:
      ArtifactError: no folder or file, damaged, or another head.
    """
    if heads is None:
        raise errors.ArtifactError(f"{path} shares its head with other tasks; give the folder of shared heads")
    head_path = pathlib.Path(heads) / f"{info.shared_head[:16]}.safetensors"
    tensors = read_head(head_path)[0]
    if content_hash.digest(tensors) != info.shared_head:
        raise errors.ArtifactError(f"{head_path} is not the head that {path} was trained with")
    return tensors


def read_head(path: str | pathlib.Path) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    """Values and class names of a file of a shared head.

    Raises:
      ArtifactError: damaged, of another version, or with values or fields that no head has.
    """
    tensors, metadata = tensor_file.read(path, HEAD_FORMAT, VERSION)
    labels = schema.check(str(path), metadata, {"labels": schema.TEXT})["labels"]
    named = schema.check(str(path), {"labels": schema.parse(str(path), labels)}, {"labels": schema.list_of(schema.TEXT)})
    tensor_file.check_values(path, tensors)
    return tensors, tuple(named["labels"])


def assign_head(patched: PatchedModel, values: Mapping[str, np.ndarray], what: str) -> None:
    """Writes values into the head of a task model.

    Raises:
      ArtifactError: names or shapes that do not fit `what`; nothing is written then.
    """
    variables = _head_variables(patched)
    tensor_file.check_fit(what, {name: tuple(v.shape) for name, v in variables.items()}, values)
    for name, variable in variables.items():
        variable.assign(values[name])


def _head_values(patched: PatchedModel) -> dict[str, np.ndarray]:
    return {name: keras.ops.convert_to_numpy(variable) for name, variable in _head_variables(patched).items()}


def _head_variables(patched: PatchedModel) -> dict[str, keras.Variable]:
    """The variables of the head by their names in it, seeds left out."""
    floats = [v for v in patched.head.variables if keras.backend.is_float_dtype(v.dtype)]
    return {name_in(patched.head, variable): variable for variable in floats}
