"""k4p1: parameter-efficient multi-task and transfer learning with TensorFlow and Keras.

TensorFlow is imported when a name that needs it is first used, so that `import k4p1` and `k4p1 --help` are quick.
"""

import importlib

from k4p1 import keras_registration

__version__ = "0.1.0"

_PUBLIC = {
    "Backbone": "k4p1.backbones",
    "OptimizerConfig": "k4p1.engine",
    "Objective": "k4p1.tasks.objectives",
    "PatchSet": "k4p1.serving.patch_set",
    "PatchSpec": "k4p1.patches",
    "Rule": "k4p1.engine.rules",
    "Task": "k4p1.tasks",
    "apply_patches": "k4p1.patches.apply",
    "application": "k4p1.backbones",
    "backbone_from_model": "k4p1.backbones",
    "cifar_resnet": "k4p1.backbones",
    "compare": "k4p1.runs.compare",
    "compress": "k4p1.methods.compress",
    "dataset": "k4p1.runs.evaluate",
    "decathlon": "k4p1.methods.decathlon",
    "decathlon_score": "k4p1.methods.decathlon",
    "evaluate": "k4p1.runs.evaluate",
    "export_task": "k4p1.serving.saved_model",
    "finetune": "k4p1.methods.finetune",
    "fold": "k4p1.patches.fold",
    "inception_v3": "k4p1.backbones",
    "k4p1_rmsprop": "k4p1.engine",
    "load_backbone": "k4p1.backbones",
    "load_patch": "k4p1.patches.patch_file",
    "load_task": "k4p1.runs.load_task",
    "mobilenet_v2": "k4p1.backbones",
    "nettailor": "k4p1.methods.nettailor",
    "packnet": "k4p1.methods.packnet",
    "predict": "k4p1.serving.predict",
    "register_objective": "k4p1.tasks.objectives",
    "resnet26": "k4p1.backbones",
    "resnet34": "k4p1.backbones",
    "save_backbone": "k4p1.backbones",
    "save_patch": "k4p1.patches.patch_file",
    "train": "k4p1.methods.train",
    "vgg16_bn": "k4p1.backbones",
    "wide_resnet": "k4p1.backbones",
}
_RENAMED = {
    "backbone_from_model": "from_model",
    "load_backbone": "load",
    "register_objective": "register",
    "save_backbone": "save",
}

__all__ = sorted(_PUBLIC)


def __getattr__(name: str):
    if name not in _PUBLIC:
        raise AttributeError(f"module 'k4p1' has no attribute '{name}'")
    value = getattr(importlib.import_module(_PUBLIC[name]), _RENAMED.get(name, name))
    globals()[name] = value
    return value


def __dir__():
    return ["__version__", *__all__]


keras_registration.register()
