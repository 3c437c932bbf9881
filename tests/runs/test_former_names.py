"""Files of version 0.1 name task fields and patch options otherwise; they stay readable."""

import json

import pytest

from k4p1 import errors
from k4p1.patches import PatchSpec
from k4p1.patches.patch_file import PatchInfo
from k4p1.runs.model_dir import ModelDir

TASK = {
    "name": "digits",
    "data": "embedded/digits",
    "patch": "mask(values=ternary,initial=0.02)+head",
    "weight": 2.0,
    "validation": 0.25,
    "start": "somewhere/patch.safetensors",
    "loss": "softmax_cross_entropy",
    "teacher": "",
    "temperature": 2.0,
    "metrics": ["accuracy"],
    "seed": 3,
}


def test_the_task_of_a_finished_run(tmp_path):
    folder = ModelDir(tmp_path)
    folder.task_folder("digits").mkdir(parents=True)
    (folder.task_folder("digits") / "task.json").write_text(json.dumps(TASK))
    task, seed = folder.read_task("digits")
    assert (task.turn_weight, task.validation_fraction, task.init_from, seed) == (
        2.0,
        0.25,
        "somewhere/patch.safetensors",
        3,
    )
    assert str(task.patch) == "mask(mask_type=ternary,init_score=0.02)+head"
    assert task.objective == "classification" and [term.name for term in task.terms] == ["softmax_cross_entropy"]


@pytest.mark.parametrize(
    ("stored", "today"),
    [
        ("mask(values=ternary,initial=0.02)", "mask(mask_type=ternary,init_score=0.02)"),
        ("series_adapter(std=0.1)+parallel_adapter(std=0.2)", "series_adapter(init_std=0.1)+parallel_adapter(init_std=0.2)"),
    ],
)
def test_options_of_stored_specs(stored, today):
    assert str(PatchSpec.parse(stored, stored=True)) == today
    with pytest.raises(errors.PatchError, match="unknown option of patch kind"):
        PatchSpec.parse(stored)  # who writes a spec today uses today's names


def test_the_description_of_a_patch_file():
    described = {
        **{"task": "t", "spec": "mask(initial=0.02)+head", "labels": ["a", "b"], "image_size": [8, 8], "dropout": 0.0},
        **{
            "scaling": "none",
            "backbone": "b",
            "fingerprint": 64 * "f",
            "structure": 64 * "5",
            "shared_head": "",
            "k4p1_version": "0.1.0",
        },
        "options": {"mask": {"initial": 0.02}},
    }
    info = PatchInfo.from_metadata({"patch": json.dumps(described)})
    assert str(info.spec) == "mask(init_score=0.02)+head" and info.objective == "classification"
    again = json.loads(info.as_metadata()["patch"])
    assert again["spec"] == "mask(init_score=0.02)+head" and "objective" not in again and again["labels"] == ["a", "b"]
