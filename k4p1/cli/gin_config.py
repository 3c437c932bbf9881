"""gin configuration: what gin files can name, where they are found, and mistakes that gin itself lets pass."""

import contextlib
import inspect
import io
import itertools
import logging
import pathlib
import re
import tokenize
from collections.abc import Iterator, Sequence

import gin
from k4p1 import backbones, engine, errors
from k4p1.cli import gin_files, gin_names, gin_reference, gin_types
from k4p1.engine import optimizers, schedules
from k4p1.methods import decathlon, finetune, nettailor, packnet, train
from k4p1.runs import stages
from k4p1.tasks import Task

_MACRO = re.compile(r"^(\w+) =", re.MULTILINE)
_BINDING = re.compile(r"^((?:[\w.-]+/)*)([\w.]+)\.(\w+) =", re.MULTILINE)

_CONFIGURABLES = {
    "train": train.train,
    "finetune": finetune.finetune,
    "decathlon": decathlon.decathlon,
    "packnet": packnet.packnet,
    "nettailor": nettailor.nettailor,
    "Phase": stages.Phase,
    "Task": Task,
    "mobilenet_v2": backbones.mobilenet_v2,
    "inception_v3": backbones.inception_v3,
    "application": backbones.application,
    "load_backbone": backbones.load,
    "resnet26": backbones.resnet26,
    "resnet34": backbones.resnet34,
    "cifar_resnet": backbones.cifar_resnet,
    "wide_resnet": backbones.wide_resnet,
    "vgg16_bn": backbones.vgg16_bn,
    "with_series_adapters": backbones.with_series_adapters,
    "OptimizerConfig": engine.OptimizerConfig,
    "k4p1_rmsprop": engine.k4p1_rmsprop,
    "SGD": optimizers.SGD,
    "RMSProp": optimizers.RMSProp,
    "Adam": optimizers.Adam,
    "AdamW": optimizers.AdamW,
    "Constant": schedules.Constant,
    "Cosine": schedules.Cosine,
    "Exponential": schedules.Exponential,
    "Steps": schedules.Steps,
}
CONFIGURABLES = {name: gin.external_configurable(f, name=name, module="k4p1") for name, f in _CONFIGURABLES.items()}
"""What a gin file can set, by name: run functions, tasks, backbones, optimization, schedules."""


@contextlib.contextmanager
def _without_log_lines() -> Iterator[None]:
    """gin logs as an error each place where a file that it includes is not, before it looks where it is."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(before)


def load(files: Sequence[str], bindings: Sequence[str] = ()) -> str:
    """Reads gin files and bindings into gin's configuration, in this order, and returns it as text.

    Raises:
      ConfigError: bad syntax, an unknown name or parameter, a macro that is unused or has no value, a value of a wrong type.
    """
    gin.clear_config()
    gin.add_config_file_search_path(str(gin_files.folder()))
    paths = [str(gin_files.find(name)) for name in files]
    try:
        with _without_log_lines():
            gin.parse_config_files_and_bindings(paths, list(bindings), finalize_config=False)
    except SyntaxError as e:
        where = (e.text or "").strip() or e.filename or "; ".join(bindings)
        reason = (
            "a value is number, quoted text, list, @configurable or %macro"
            if "malformed" in e.msg
            else e.msg.splitlines()[0]
        )
        raise errors.ConfigError(f"gin cannot read {where!r}: {reason}") from e
    except tokenize.TokenError as e:
        raise errors.ConfigError(f"gin cannot read {'; '.join([*files, *bindings])!r}: {e.args[0]}") from e
    except (ValueError, TypeError, OSError) as e:
        raise errors.ConfigError(_explain(str(e))) from e
    gin_types.check_types(list(map(pathlib.Path, paths)), bindings, _CONFIGURABLES)
    text = gin.config_str()
    macros, used = set(_MACRO.findall(text)), _references(text)
    for name in sorted(used - macros):
        raise errors.ConfigError(
            f"macro '%{name}' has no value; {errors.nearest(name, macros)}give one: --gin_bindings '{name} = ...'"
        )
    gin_names.check_names(list(map(pathlib.Path, paths)), bindings, _CONFIGURABLES)
    for name in sorted(macros - used):
        raise errors.ConfigError(f"unused macro '{name}'; {errors.nearest(name, used)}Used: {', '.join(sorted(used))}")
    return text


def _references(text: str) -> set[str]:
    """The macros that a configuration refers to; a percent sign in quotes is none."""
    tokens = list(tokenize.generate_tokens(io.StringIO(text).readline))
    return {name.string for sign, name in itertools.pairwise(tokens) if sign.string == "%" and name.type == tokenize.NAME}


def reference() -> str:
    """All configurables with their parameters, as Markdown."""
    return gin_reference.page(_CONFIGURABLES)


def operative() -> str:
    """What has been asked of gin so far, defaults included."""
    return gin.operative_config_str()


def unused() -> list[str]:
    """Bindings that have not been read so far."""
    read = [(scopes, name.rsplit(".", 1)[-1], option) for scopes, name, option in _BINDING.findall(operative())]
    return [
        f"{scopes}{name}.{option}"
        for scopes, name, option in _BINDING.findall(gin.config_str())
        if not any(r[1:] == (name.rsplit(".", 1)[-1], option) and (not scopes or r[0] == scopes) for r in read)
    ]


def _explain(message: str) -> str:
    """gin's message as one line, with the nearest name."""
    message = message.strip().splitlines()[0]
    if match := re.search(r"No configurable matching (?:reference )?'?@?(?:[\w.-]+/)*([\w.]+)", message):
        return errors.unknown("configurable", match[1], CONFIGURABLES)
    if match := re.search(r"Configurable '(\w+)' doesn't have a parameter named '(\w+)'", message):
        target = _CONFIGURABLES.get(match[1])
        return errors.unknown(f"parameter of {match[1]}", match[2], inspect.signature(target).parameters if target else ())
    return f"gin: {message}"
