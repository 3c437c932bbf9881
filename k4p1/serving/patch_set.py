"""Many tasks on one loaded backbone: add, switch, combine, merge, delete."""

import html
import numbers
import pathlib
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from k4p1 import errors
from k4p1.backbones.backbone import Backbone
from k4p1.patches import factor_file, patch_file, task_head
from k4p1.patches.apply import apply_patches
from k4p1.patches.inference import inference_model
from k4p1.patches.patched_model import FACTORS, LOGITS, PatchedModel
from k4p1.runs.model_dir import ModelDir
from k4p1.serving.mixed import MixedModel
from k4p1.serving.predict import read_image, summaries
from k4p1.tasks.objectives import CLASSIFICATION


class PatchSet(Mapping):
    """The tasks of one backbone, for a program that answers for many of them: a mapping from names to Keras models.

    There is no active task: each call names its own, so threads do not disturb one another. A task costs the memory of its
    patch; the backbone's values are there once, and never written.

    Args:
      backbone: shared by all.
      heads: folder of shared heads, for tasks that share theirs.
      factors: folder of factor files, for tasks that were compressed together; equal factors are loaded once.
    """

    def __init__(
        self, backbone: Backbone, heads: str | pathlib.Path | None = None, factors: str | pathlib.Path | None = None
    ):
        if not isinstance(backbone, Backbone):
            raise errors.ConfigError(
                f"PatchSet: backbone is a {type(backbone).__name__}; give a Backbone, or PatchSet.of_run(MODEL_DIR)"
            )
        self.backbone = backbone
        self._heads, self._factors_folder = heads, factors
        self._tasks: dict[str, PatchedModel] = {}
        self._labels: dict[str, tuple[str, ...]] = {}
        self._objectives: dict[str, str] = {}
        self._merged: dict[str, keras.Model] = {}
        self._mixed: dict[tuple[int, int], MixedModel] = {}
        self._factors: dict[str, Mapping[str, keras.Variable]] = {}
        self._lock = threading.Lock()

    @classmethod
    def of_run(cls, model_dir: str | pathlib.Path) -> "PatchSet":
        """The finished tasks of a run, on its backbone."""
        folder = ModelDir(model_dir)
        found = cls(folder.load_backbone(), folder.heads, folder.factors)
        for task in folder.tasks():
            found.add(folder.patch(task))
        return found

    __hash__ = object.__hash__
    __eq__ = object.__eq__

    def __len__(self) -> int:
        with self._lock:
            return len(self._tasks)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __contains__(self, name: object) -> bool:
        with self._lock:
            return name in self._tasks

    def __getitem__(self, name: str) -> keras.Model:
        return self.model(name)

    def __delitem__(self, name: str) -> None:
        self.delete(name)

    def __repr__(self) -> str:
        names = self.names
        shown = ", ".join(names[:6]) + (", ..." if len(names) > 6 else "")
        return f"PatchSet({len(names)} tasks on '{self.backbone.name}': {shown})" if names else "PatchSet(no task)"

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><td>{html.escape(name)}</td><td>{html.escape(str(self._get(name).spec))}</td>"
            f"<td>{len(self.labels(name))}</td><td>{sum(p.size for p in self._get(name).owned()):,}</td></tr>"
            for name in self.names
        )
        columns = "".join(f"<th>{column}</th>" for column in ("task", "patch", "classes", "private values"))
        return f"<table><caption>{html.escape(repr(self))}</caption><tr>{columns}</tr>{rows}</table>"

    def add(self, path: str | pathlib.Path, name: str | None = None) -> str:
        """Adds the task of a patch file and returns its name.

        Args:
          path: of the patch file.
          name: by default, the one in the file.

        Raises:
          ConfigError: the name is taken.
          ArtifactError: damaged, or for another backbone; the set stays as it was.
        """
        if pathlib.Path(path).is_dir():
            raise errors.ArtifactError(
                f"{path} is a folder; give tasks/NAME/patch.safetensors of a run, or PatchSet.of_run(MODEL_DIR) for all "
                "its tasks"
            )
        info = patch_file.read_info(path)
        name = name or info.task
        self._check_free(name)
        factors = self._shared_factors(info) if info.factors else None
        self._put(name, patch_file.load_patch(path, self.backbone, self._heads, factors), info.labels, info.objective)
        return name

    def _shared_factors(self, info: patch_file.PatchInfo) -> Mapping[str, keras.Variable]:
        with self._lock:
            known = self._factors.get(info.factors)
        if known is not None:
            return known
        loaded = factor_file.load_factors(self._factors_folder, info.factors, info.fingerprint)
        with self._lock:
            return self._factors.setdefault(info.factors, loaded)

    def delete(self, name: str) -> None:
        """Removes a task, and frees its patch once its model is no longer used; factors that it shared stay."""
        self._get(name)
        with self._lock:
            for held in (self._tasks, self._labels, self._objectives, self._merged):
                held.pop(name, None)
            mixed = [model for model in self._mixed.values() if name in model.tasks]
        for model in mixed:
            model.delete(name)

    @property
    def names(self) -> list[str]:
        """The tasks, in the order in which they came."""
        with self._lock:
            return list(self._tasks)

    def labels(self, name: str) -> tuple[str, ...]:
        """Class names of a task."""
        with self._lock:
            if name in self._labels:
                return self._labels[name]
        raise errors.ConfigError(errors.unknown("task of this set", name, self.names))

    def model(self, name: str) -> keras.Model:
        """The `keras.Model` of a task, merged if it was: images (batch, height, width, 3) of 0 to 255 to logits."""
        patched = self._get(name)
        with self._lock:
            return self._merged.get(name, patched.model)

    def __call__(self, name: str, images: Any) -> np.ndarray | dict[str, np.ndarray]:
        """What the head of a task puts out for images (batch, height, width, 3) of 0 to 255: logits (batch, classes) of one
        that classifies; arrays by name where a head has several outputs."""
        if not isinstance(name, str):
            raise errors.ConfigError(
                f"the task is a {type(name).__name__}; expected (name, images), or predict([(name, image), ...]) for several"
            )
        outputs = self.model(name)(images, training=False)
        return keras.tree.map_structure(keras.ops.convert_to_numpy, outputs)

    def predict(self, images: Sequence[tuple[str, Any]], top: int = 3) -> list[list[tuple[str, float]]]:
        """What tasks answer for images, each image for its own task: the `top` most probable labels with probabilities.

        Images of one size whose tasks a mixed batch can hold are answered together, others task by task.

        Args:
          images: (task, path or array (height, width, 3) of 0 to 255) of each; images are resized to the task's size.
          top: how many labels per image.

        Raises:
          ConfigError: an unknown task, or one that does not classify.
          DataError: an image that cannot be read.
        """
        pairs = _pairs(images)
        pixels = [
            np.asarray(read_image(image, self._get(name).image_size, place)) for place, (name, image) in enumerate(pairs)
        ]
        names = [name for name, _ in pairs]
        for name in names:
            if self._objectives[name] != task_head.DEFAULT_OBJECTIVE:
                raise errors.ConfigError(f"task '{name}' does not classify; ask model('{name}')")
        logits: list = [None] * len(names)
        mixable = [place for place, name in enumerate(names) if self._can_mix(name)]
        for place, row in zip(mixable, self.mixed([pixels[i] for i in mixable], [names[i] for i in mixable]), strict=True):
            logits[place] = row
        rest: dict[str, list[int]] = {}
        for place, name in enumerate(names):
            if logits[place] is None:
                rest.setdefault(name, []).append(place)
        for name, places in rest.items():
            for place, row in zip(places, self(name, np.stack([pixels[i] for i in places])), strict=True):
                logits[place] = row
        return [
            summaries(CLASSIFICATION, {LOGITS: tf.constant(row)[None]}, self.labels(name), top)[0]
            for name, row in zip(names, logits, strict=True)
        ]

    def _can_mix(self, name: str) -> bool:
        try:
            self._mixed_model(self._get(name).image_size, [name])
        except errors.ConfigError:
            return False
        return True

    def mixed(self, images: Sequence, tasks: Sequence[str]) -> list[np.ndarray]:
        """Logits (classes of its task,) of each image for its own task, computed together; see `k4p1.serving.mixed`.

        Tasks of one image size are answered in one batch, whatever their patches.

        Args:
          images: of 0 to 255, (height, width, 3), each of the size of its task.
          tasks: one name per image.

        Raises:
          ConfigError: an unknown task, another number of names than images, an image of another size, or a task that a mixed
            batch cannot hold.
        """
        if len(images) != len(tasks):
            raise errors.ConfigError(f"mixed: {len(images)} images and {len(tasks)} task names; expected one name per image")
        groups: dict[tuple[int, int], list[int]] = {}
        for place, name in enumerate(tasks):
            size, shape = self._get(name).image_size, tuple(np.shape(images[place]))
            if shape != (*size, 3):
                raise errors.ConfigError(f"image {place} is {shape}; task '{name}' expects {(*size, 3)}")
            groups.setdefault(size, []).append(place)
        logits: list = [None] * len(tasks)
        for size, places in groups.items():
            names = [tasks[place] for place in places]
            batch = np.stack([np.asarray(images[place], np.float32) for place in places])
            rows = self._mixed_model(size, names)(batch, names)
            for place, name, row in zip(places, names, rows, strict=True):
                logits[place] = row[: len(self.labels(name))]
        return logits

    def _mixed_model(self, size: tuple[int, int], tasks: Sequence[str]) -> MixedModel:
        with self._lock:
            model = self._mixed.get(size)
        if model is None:
            made = MixedModel(self.backbone, size)
            with self._lock:
                model = self._mixed.setdefault(size, made)
        for name in set(tasks) - set(model.tasks):
            model.put(name, self._get(name))
        return model

    def merge(self, name: str) -> keras.Model:
        """A plain Keras model of the task, its patch folded into a copy of the weights; `model` gives it from now on."""
        patched = self._get(name)
        merged = inference_model(patched.model).model
        with self._lock:
            if self._tasks.get(name) is patched:  # not deleted meanwhile
                self._merged[name] = merged
        return merged

    def unmerge(self, name: str) -> None:
        """Drops the merged copy: the task computes bit for bit what it did before `merge`."""
        self._get(name)
        with self._lock:
            self._merged.pop(name, None)

    def combine(self, name: str, weights: Mapping[str, float]) -> None:
        """Adds a task whose private values are `sum_t w_t P_t`, a weighted sum over tasks of one spec and the same labels.

        Args:
          name: of the new task.
          weights: w_t by task; they need not add up to 1.

        Raises:
          ConfigError: an unknown task, or a name that is taken.
          PatchError: tasks of different specs, labels or factors; masks, whose bits have no weighted sum; or weights that
            are not finite numbers, or give negative variances.
        """
        self._check_free(name)
        if not weights:
            raise errors.PatchError("combine needs at least one task with its weight")
        for task, weight in weights.items():
            if isinstance(weight, bool) or not isinstance(weight, numbers.Real) or not np.isfinite(weight):
                raise errors.PatchError(f"combine: the weight of '{task}' is {weight!r}; expected a finite number")
        parts, labels, objectives = self._snapshot(weights)
        first_name, first = next(iter(parts.items()))
        fingerprint = patch_file.head_fingerprint
        for task, patched in parts.items():
            differs = [
                what
                for what, same in {
                    "patch specs": patched.spec == first.spec,
                    "labels": labels[task] == labels[first_name],
                    "objectives": objectives[task] == objectives[first_name],
                    "shared factors": set(map(id, patched.factors().values())) == set(map(id, first.factors().values())),
                    "shared heads": not first.spec.shares_head or fingerprint(patched) == fingerprint(first),
                    "image sizes": patched.image_size == first.image_size,
                }.items()
                if not same
            ]
            if differs:
                raise errors.PatchError(f"tasks '{first_name}' and '{task}' cannot be combined: different {differs[0]}")
        if any(p.storage is not None for p in first.owned()):
            raise errors.PatchError(f"'{first.spec}' has masks: bits have no weighted sum; combine other patches")
        combined = apply_patches(
            self.backbone,
            first.spec,
            head=task_head.of_objective(objectives[first_name], labels[first_name]),
            image_size=first.image_size,
            shared_head=first.head if first.spec.shares_head else None,
            factors={p.key: p.variable for p in first.parameters if p.kind == FACTORS},
            name=name,
        )
        stored = {task: patched.stored() for task, patched in parts.items()}
        with np.errstate(over="ignore", invalid="ignore"):  # refused below
            sums = {
                key: np.asarray(sum(w * stored[task][key] for task, w in weights.items()), value.dtype)
                for key, value in stored[first_name].items()
            }
        for key, value in sums.items():
            if key.endswith("moving_variance") and value.size and np.min(value) < 0:
                raise errors.PatchError(f"combine: '{key}' would hold a negative variance; give other weights")
            if not np.all(np.isfinite(value)):
                raise errors.PatchError(f"combine: '{key}' would hold values that are not finite; give smaller weights")
        combined.restore(sums, f"combined task '{name}'")
        self._put(name, combined, labels[first_name], objectives[first_name])

    def _snapshot(self, tasks: Iterable[str]) -> tuple[dict[str, PatchedModel], dict[str, tuple[str, ...]], dict[str, str]]:
        """Models, labels and objectives of tasks at one moment: another thread may delete one."""
        with self._lock:
            for name in tasks:
                if name not in self._tasks:
                    raise errors.ConfigError(errors.unknown("task of this set", name, self._tasks))
            held = (self._tasks, self._labels, self._objectives)
            return tuple({name: one[name] for name in tasks} for one in held)

    def _get(self, name: str) -> PatchedModel:
        with self._lock:
            if name not in self._tasks:
                raise errors.UnknownTask(errors.unknown("task of this set", name, self._tasks))
            return self._tasks[name]

    def _check_free(self, name: str) -> None:
        with self._lock:
            if name in self._tasks:
                raise errors.ConfigError(f"this set has a task '{name}'; delete it first, or give another name")

    def _put(self, name: str, patched: PatchedModel, labels: tuple[str, ...], objective: str) -> None:
        with self._lock:
            if name in self._tasks:
                raise errors.ConfigError(f"this set has a task '{name}'; delete it first, or give another name")
            self._tasks[name], self._labels[name], self._objectives[name] = patched, labels, objective


def _pairs(images: Any) -> list[tuple[str, Any]]:
    """The pairs (task, image) that were given.

    Raises:
      ConfigError: anything else.
    """
    expected = "predict: expected pairs (task, path or image), [('digits', image), ...]"
    if isinstance(images, (str, Mapping)) or not isinstance(images, Iterable):
        raise errors.ConfigError(f"{expected}; got a {type(images).__name__}")
    pairs = list(images)
    for place, pair in enumerate(pairs):
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise errors.ConfigError(f"{expected}; number {place} is a {type(pair).__name__}")
        if not isinstance(pair[0], str):
            raise errors.ConfigError(f"{expected}; the task of number {place} is a {type(pair[0]).__name__}")
    return pairs
