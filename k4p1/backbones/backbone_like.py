"""What a user gives as a backbone: one, a function that makes one, a Keras model, a name, or a path."""

import ast
import inspect
import pathlib
from collections.abc import Callable
from typing import Any

import keras

from k4p1 import errors, spec_grammar
from k4p1.backbones import build, files, networks
from k4p1.backbones.backbone import Backbone

BackboneLike = Backbone | Callable[[], Backbone] | keras.Model | str | pathlib.Path


def as_backbone(given: BackboneLike) -> Backbone | Callable[[], Backbone]:
    """The backbone, or the function that makes it.

    Args:
      given: a `Backbone`; a function without arguments, or one of keras.applications; a functional `keras.Model`, see
        `from_model`; the path of a backbone file, of a run's folder, or of a `.keras` file of such a model; or a name with
        options, `"MobileNetV2"`, `"cifar_resnet(depth=20, weights='r20.npz')"`. A network of keras.applications has
        ImageNet weights unless `weights` says otherwise, as in Keras.

    Raises:
      ConfigError: nothing of this sort, an unknown network or a bad option.
    """
    if isinstance(given, Backbone):
        return given
    if isinstance(given, keras.Model):
        return build.from_model(given)
    if isinstance(given, (str, pathlib.Path)):
        return _named(str(given))
    if given in build.applications().values():  # the function itself, keras.applications.MobileNetV2
        return _named(given.__name__)
    if callable(given):
        return lambda: _made(given)
    raise errors.ConfigError(
        f"backbone is a {type(given).__name__}; expected a Backbone, a function that makes one, a keras.Model, or a name or "
        "path"
    )


def _made(function: Callable[[], Any]) -> Backbone:
    made = function()
    if isinstance(made, keras.Model):
        return build.from_model(made)
    if not isinstance(made, Backbone):
        raise errors.ConfigError(f"the function given as backbone returned a {type(made).__name__}; expected a Backbone")
    return made


def _named(text: str) -> Callable[[], Backbone]:
    if not text.strip():
        raise errors.ConfigError("backbone is an empty text; give a name or a path")
    path = pathlib.Path(text).expanduser()
    if path.suffix == ".keras" and path.is_file():
        return lambda: build.from_model(keras.models.load_model(path))
    if path.suffix in (".h5", ".npz"):
        raise errors.ConfigError(
            f"backbone {text} is a file of weights alone; name the network, such as "
            f"\"MobileNetV2(width=0.35, weights='{text}')\""
        )
    if path.exists() or text.endswith(".safetensors"):
        return lambda: files.load(path)
    try:
        ((name, options),) = spec_grammar.parse(text)
    except ValueError as e:
        if "(" in text:
            raise errors.ConfigError(f"backbone: {e}") from e
        known = [*networks.NETWORKS, *build.applications()]
        raise errors.ConfigError(f"{errors.unknown('backbone', text, known)} (or give the path of a file or folder)") from e
    values = {option: _value(value) for option, value in options.items()}
    if name in networks.NETWORKS:
        function = getattr(networks, name)
        accepted = inspect.signature(function).parameters
        for option in values:
            if option not in accepted:
                raise errors.ConfigError(errors.unknown(f"option of {name}", option, accepted))
        return lambda: function(**values)
    plain = {one.lower(): one for one in build.applications()}
    network = plain.get(name.replace("_", "").lower())
    if network is None:
        raise errors.ConfigError(errors.unknown("backbone", name, [*networks.NETWORKS, *plain.values()]))
    return lambda: build.application(network, **{"weights": "imagenet", **values})


def _value(text: str) -> Any:
    """A number, truth value or None where the text reads like one, else the text."""
    try:
        return ast.literal_eval({"true": "True", "false": "False", "none": "None"}.get(text.lower(), text))
    except (SyntaxError, ValueError):
        return text
