"""Every shipped gin file builds and takes a step a task, on embedded data and small networks."""

import keras
import pytest

import gin
from k4p1 import backbones
from k4p1.cli import gin_files, main
from k4p1.methods.decathlon import FINETUNING


def two_layers():
    """A backbone that is built at once; only fine-tuning takes the MobileNetV2 of its file here."""
    image = keras.Input((None, None, 3))
    hidden = keras.layers.Conv2D(8, 3, strides=4, use_bias=False, name="stem")(image)
    features = keras.layers.BatchNormalization(name="stem_bn")(hidden)
    return backbones.from_model(keras.Model(image, features), name="two_layers", scaling="symmetric")


gin.external_configurable(two_layers, module="tests.gin_files")

DECATHLON = (
    *("imagenet", "aircraft", "cifar100", "daimlerpedcls", "dtd"),
    *("gtsrb", "vgg_flowers", "omniglot", "svhn", "ucf101"),
)

TEN_TASKS = [
    "backbone = @two_layers",
    "weights = None",
    *(f"{name}/Task.data = 'embedded/digits'" for name in DECATHLON),
    "image_size = 36",
    "crop = 32",
    "whole_size = 32",
    "batch_size = 4",
]

LEFT_OUT = [name for name in DECATHLON if name not in ("imagenet", "dtd", "gtsrb")]

SMALLER = {
    "quickstart": ["train.backbone = @two_layers", "batch_size = 8"],
    "finetune": ["data = 'embedded/digits'", "weights = None", "width = 0.35", "image_size = 32", "batch_size = 8"],
    "k4p1_table4": [
        "data_a = 'embedded/digits'",
        "data_b = 'embedded/parity'",
        "train.backbone = @two_layers",
        "image_size = 32",
        "image_size_b = 32",
        "batch_size = 8",
    ],
    "decathlon_small": ["depth = 8", "batch_size = 8"],
    "packnet": ["depth = 8", "batch_size = 8"],
    "nettailor": ["depth = 8", "remove = [1]"],
    "nettailor_svhn": [
        "data = 'embedded/digits'",
        "weights = None",
        "image_size = 32",
        "remove = [1]",
        "nettailor.backbone = @cifar_resnet",
        "cifar_resnet.depth = 8",
    ],
    "decathlon": TEN_TASKS,
    "decathlon_adapters": [
        *TEN_TASKS,
        "patch = 'parallel_adapter+head'",
        "decathlon.tasks = [@imagenet/Task(), @dtd/Task(), @gtsrb/Task()]",  # one of each kind; decathlon takes all ten
    ],
    "pb_table5": ["depth = 8", "batch_size = 8"],
    "ra_series_pretraining": ["depth = 8", "batch_size = 8"],
    "k4p1_table5": [
        "data = 'embedded/digits'",
        "train.backbone = @two_layers",
        "batch_size = 4",
    ],
}
"""Bindings that make a file run in seconds and without a download."""

TASKS = {
    "quickstart": ["digits", "parity"],
    "finetune": ["digits"],
    "decathlon_small": ["digits", "parity"],
    "packnet": ["digits", "parity"],
    "nettailor": ["digits"],
    "nettailor_svhn": ["svhn"],
    "decathlon": list(FINETUNING),
    "decathlon_adapters": ["imagenet12", "dtd", "gtsrb"],
    "pb_table5": ["digits"],
    "ra_series_pretraining": ["digits"],
    "k4p1_table4": ["imagenet", "places365"],
    "k4p1_table5": ["r96", "r128", "r160", "r192", "r224"],
}


@pytest.fixture(autouse=True)
def clean_gin():
    yield
    gin.clear_config()


COMMANDS = {
    "finetune": "finetune",
    "decathlon": "decathlon",
    "decathlon_small": "decathlon",
    "decathlon_adapters": "decathlon",
    "pb_table5": "finetune",
    "packnet": "packnet",
    "nettailor": "nettailor",
    "nettailor_svhn": "nettailor",
}
"""What runs a file, where it is not `train`."""

UNREAD = {
    "quickstart": ["mobilenet_v2.width"],
    "k4p1_table4": ["mobilenet_v2.width"],
    "k4p1_table5": ["mobilenet_v2.width"],
    "decathlon": ["wide_resnet.crop", "wide_resnet.weights"],
    "decathlon_adapters": sorted(
        [
            *("resnet26.crop", "resnet26.weights"),
            *(f"{n}/Task.{field}" for n in LEFT_OUT for field in ("name", "data")),
            *(f"{n}/Task.{field}" for n in ("omniglot", "svhn") for field in ("image_size", "augment")),
        ]
    ),
    "nettailor_svhn": ["resnet34.weights"],
}
"""Bindings of the backbone that a smaller one stands for."""

NEEDS_A_RUN = ["lwf"]
"""Files that go on from a finished run; `tests/methods/test_baselines.py` runs them."""


@pytest.mark.parametrize("name", [name for name in gin_files.shipped() if name not in NEEDS_A_RUN])
@pytest.mark.slow
def test_takes_a_step_a_task_and_reads_every_binding(name, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bindings = [part for binding in SMALLER[name] for part in ("--gin_bindings", binding)]
    command = COMMANDS.get(name, "train")
    assert main.main([command, "--gin_file", name, "--dry_run", *bindings]) == 0
    captured = capsys.readouterr()
    parameters, rules = captured.out.split("Update rules")
    rows = [line.split("│")[1].strip() for line in parameters.splitlines() if line.startswith("│")]
    assert rows == TASKS[name]
    assert ".trained" in rules and "OptimizerConfig" in rules
    assert "dry run: every task took one step; nothing was written" in captured.out
    unread = [line.split("'")[1] for line in captured.err.splitlines() if "unused binding" in line]
    assert sorted(unread) == UNREAD.get(name, [])
    assert not list(tmp_path.iterdir())
