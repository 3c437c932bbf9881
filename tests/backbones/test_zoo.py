"""Shapes of user models and families of keras.applications: trained, written, read and folded, they answer the same."""

import keras
import pytest

import k4p1
from benchmarks import networks
from k4p1 import errors
from tests.networks import trial
from tests.networks.user_models import ACCEPTED, REFUSED, SIDE

_FIT_ALL = ("head", "full", "train")
_MORE = {
    "composite layer with batch normalisation inside": trial.SPECS,
    "composite layers in composite layers, built when called": _FIT_ALL,
    "causal, dilated and strided Conv1D": ("scale_bias+head", "lora(rank=1)+head"),
    "channels first": ("scale_bias+head", "parallel_adapter+head"),
    "depthwise, separable, grouped, transposed convolutions and PReLU": ("mask+head", "full"),
}
CASES = [
    (name, spec) for number, name in enumerate(ACCEPTED) for spec in _MORE.get(name, (_FIT_ALL[number % len(_FIT_ALL)],))
]


def backbone_of(name):
    return k4p1.backbone_from_model(ACCEPTED[name](), scaling="unit")


@pytest.mark.filterwarnings("ignore::k4p1.errors.PatchWarning")
@pytest.mark.parametrize(("name", "spec"), CASES)
@pytest.mark.slow
def test_a_users_network(name, spec, tmp_path):
    trial.train_step(backbone_of(name), spec, SIDE, tmp_path)
    trial.check_step(tmp_path, SIDE)


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_is_refused_before_training(name):
    make, says = REFUSED[name]
    with pytest.raises(errors.ConfigError) as caught:
        k4p1.apply_patches(k4p1.backbone_from_model(make(), scaling="unit"), "head", classes=2, image_size=SIDE)
    assert says in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize("name", networks.SMALL)
def test_a_network_of_each_family(name, tmp_path):
    make, side = networks.network(name)
    trial.train_step(make(), "scale_bias+head" if name != "VGG16" else "head", side, tmp_path)
    trial.check_step(tmp_path, side)
    keras.backend.clear_session()


@pytest.mark.slow
@pytest.mark.processes
def test_another_process_exports_what_a_run_left():
    found = networks.tried("Bidirectional LSTM")
    outcomes = {spec: found[spec] for spec in (*trial.SPECS, networks.RUN)}
    assert {spec for spec, what in outcomes.items() if what == trial.WORKS} >= {"head", "full", "train", networks.RUN}
    assert not any(what.startswith(trial.FAILS) for what in outcomes.values())


def test_a_second_backbone_of_the_same_layers_changes_neither_the_first_nor_the_users_model():
    model = ACCEPTED["layer called twice"]()
    names = [layer.name for layer in model.layers]
    first = k4p1.backbone_from_model(model, scaling="unit")
    fingerprint = first.fingerprint()
    part = keras.Model(model.input, model.layers[2].output)
    k4p1.backbone_from_model(part, scaling="unit")
    assert first.fingerprint() == fingerprint == k4p1.backbone_from_model(model, scaling="unit").fingerprint()
    assert [layer.name for layer in model.layers] == names
    variables = {id(variable) for variable in model.variables}
    assert {id(variable) for variable in first.variables().values()} <= variables


def test_an_error_of_keras_is_shown_by_what_it_says():
    with pytest.raises(errors.ConfigError, match=r"at image size 2x2: .*zero or negative") as caught:
        k4p1.apply_patches(backbone_of("inner Sequential, twice nested, of open size"), "head", classes=2, image_size=(2, 2))
    assert str(caught.value).isprintable()
