"""What a run could only find out after training, it finds out before, and nothing is written then."""

import keras
import pytest

import k4p1
from k4p1 import errors
from k4p1.patches import costs
from k4p1.runs import preflight
from tests.networks import trial

layers = keras.layers


@keras.saving.register_keras_serializable("tests")
class OnlyTrains(layers.Layer):
    """Has no inference."""

    def call(self, x, training=None):
        if training is False:
            raise RuntimeError("there is no inference")
        return x


@keras.saving.register_keras_serializable("tests")
class OnlyOnce(layers.Layer):
    """Cannot be built again with its variables, once `later` is set."""

    later = False

    def __init__(self, units=3, **kwargs):
        super().__init__(**kwargs)
        self.units = units

    def build(self, shape):
        self.scale = self.add_weight(name="scale", shape=(self.units + self.later,))

    def call(self, x):
        return x * keras.ops.mean(self.scale)

    def get_config(self):
        return {**super().get_config(), "units": self.units}


def backbone_around(layer):
    image = keras.Input((8, 8, 3))
    return k4p1.backbone_from_model(keras.Model(image, layers.GlobalAveragePooling2D()(layer(image))), scaling="unit")


def finetuned(backbone, folder, **how):
    task = k4p1.Task(
        name="t", data=trial.source(8), patch="head", image_size=8, batch_size=2, steps=1, validation_fraction=0.0
    )
    return k4p1.finetune(backbone=backbone, task=task, model_dir=folder, quiet=True, **how)


@pytest.mark.parametrize("dry_run", [False, True])
def test_a_model_that_cannot_be_exported(dry_run, tmp_path):
    with pytest.raises(errors.ConfigError, match=r"task 't': .* not be exported afterwards: there is no inference"):
        finetuned(backbone_around(OnlyTrains()), tmp_path / "run", dry_run=dry_run)
    assert not (tmp_path / "run").exists()


def test_a_model_that_cannot_be_folded(tmp_path, monkeypatch):
    backbone = backbone_around(OnlyOnce())
    monkeypatch.setattr(OnlyOnce, "later", True)
    with pytest.raises(errors.PatchError, match=r"OnlyOnce 'only_once_0' cannot be copied"):
        finetuned(backbone, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_backbone_that_cannot_be_built_again(small_backbone, tmp_path):
    small_backbone.config, small_backbone.rebuilds = {"network": "MobileNetV2", "width": 0.35}, False
    with pytest.raises(errors.ConfigError, match=r"layer 'stem' .* is not the same once it was written and read"):
        finetuned(small_backbone, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_what_cannot_be_counted_is_null_and_a_warning(monkeypatch, tmp_path):
    def fails(*_, **__):
        raise ZeroDivisionError("no positions")

    monkeypatch.setattr(costs, "multiply_adds", fails)
    with pytest.warns(errors.PatchWarning, match=r"task 't': its multiply-adds cannot be counted \(no positions\)"):
        result = finetuned(backbone_around(layers.Conv2D(4, 3)), tmp_path)
    entry = result.summary["tasks"]["t"]
    assert entry["multiply_adds"] is None and entry["multiply_adds_added_folded"] is None
    assert k4p1.load_task(tmp_path, "t") is not None


def test_tasks_that_are_alike_are_tried_once(monkeypatch):
    tried = []
    original = preflight._tried
    monkeypatch.setattr(preflight, "_tried", lambda name, *rest: tried.append(name) or original(name, *rest))
    data, how = trial.source(8), {"image_size": 8, "batch_size": 2, "steps": 1, "validation_fraction": 0.0}
    tasks = [k4p1.Task(name=n, data=data, patch=p, **how) for n, p in (("a", "head"), ("b", "head"), ("c", "full"))]
    k4p1.finetune(backbone=backbone_around(layers.Conv2D(4, 3)), tasks=tasks, quiet=True)
    assert tried == ["a", "c"]
