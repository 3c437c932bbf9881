"""What a user gives as a backbone."""

import keras
import pytest

from k4p1 import backbones, errors, offline
from k4p1.backbones import as_backbone
from tests.conftest import small_model


def test_backbones_models_functions_and_files(small_backbone, tmp_path):
    assert as_backbone(small_backbone) is small_backbone
    assert as_backbone(lambda: small_backbone)() is small_backbone
    model = small_model()
    fingerprint = backbones.from_model(model).fingerprint()
    assert as_backbone(model).fingerprint() == as_backbone(small_model)().fingerprint() == fingerprint
    backbones.save(small_backbone, tmp_path / "backbone" / "backbone.safetensors")
    for path in (tmp_path, tmp_path / "backbone" / "backbone.safetensors"):
        assert as_backbone(path)().fingerprint() == small_backbone.fingerprint()
        assert as_backbone(str(path))().fingerprint() == small_backbone.fingerprint()
    assert backbones.load(tmp_path).fingerprint() == small_backbone.fingerprint()


def test_a_model_that_keras_saved(tmp_path):
    model = small_model()
    model.save(tmp_path / "mine.keras")
    assert as_backbone(tmp_path / "mine.keras")().fingerprint() == backbones.from_model(model).fingerprint()


def test_names_with_options():
    assert as_backbone("cifar_resnet(depth=8)")().config == {"network": "cifar_resnet", "depth": 8}
    made = as_backbone("mobilenet_v2(weights=None, width=0.35)")()
    assert (made.name, made.config["width"]) == ("MobileNetV2", 0.35)


def test_a_network_of_keras_has_imagenet_weights_unless_told_otherwise(monkeypatch):
    asked = []
    monkeypatch.setattr(backbones.build, "application", lambda *given, **options: asked.append((given, options)))
    for text in ("MobileNetV2", "ResNet50(weights='mine.h5')"):
        as_backbone(text)()
    assert asked == [(("MobileNetV2",), {"weights": "imagenet"}), (("ResNet50",), {"weights": "mine.h5"})]


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("MobilNetV2", "did you mean 'MobileNetV2'?"),
        ("cifar_resnet(dept=8)", "unknown option of cifar_resnet 'dept'; did you mean 'depth'?"),
        ("a b", "or give the path of a file or folder"),
        ("cifar_resnet(20)", "backbone: cannot read option '20' in 'cifar_resnet(20)'; write option=value"),
        (7, "backbone is a int; expected a Backbone, a function"),
    ],
)
def test_mistakes(given, says):
    with pytest.raises(errors.ConfigError) as caught:
        as_backbone(given)
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_a_function_of_keras_is_the_network_it_makes(monkeypatch):
    monkeypatch.setenv(offline.VARIABLE, "1")
    with pytest.raises(errors.ArtifactError, match="ImageNet weights of MobileNetV2"):
        as_backbone(keras.applications.MobileNetV2)()


def test_a_function_that_makes_something_else():
    with pytest.raises(errors.ConfigError, match="returned a dict; expected a Backbone"):
        as_backbone(dict)()


def test_a_depth_in_the_place_of_weights_is_told():
    with pytest.raises(errors.ConfigError, match=r"cifar_resnet\(weights=20\).*cifar_resnet\(depth=\.\.\.\)"):
        backbones.cifar_resnet(20)


@pytest.mark.parametrize("last", ["dense", "layer"])
def test_a_classifier_at_the_end_is_warned_of(last):
    image = keras.Input((8, 8, 3))
    x = keras.layers.Flatten()(image)
    x = keras.layers.Dense(4, activation="softmax" if last == "dense" else None)(x)
    x = keras.layers.Softmax()(x) if last == "layer" else x
    with pytest.warns(errors.PatchWarning, match="ends in the classifier"):
        backbones.from_model(keras.Model(image, x))


def test_its_repr_is_short(small_backbone):
    assert len(repr(small_backbone)) < 100 and "'small'" in repr(small_backbone)
