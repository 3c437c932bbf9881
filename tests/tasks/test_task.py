"""What a task refuses, and its step target."""

import pytest

from k4p1 import errors
from k4p1.tasks import Task


@pytest.mark.parametrize("name", ["a", "imagenet", "r224", "pacs_sketch", "v1.2-b", "0"])
def test_names_that_are_file_names(name):
    assert Task(name=name, data="embedded/digits").name == name


@pytest.mark.parametrize("name", ["", "a b", "a/b", "../a", ".hidden", "-a", "a\n", None, 3])
def test_other_names_are_refused(name):
    with pytest.raises(errors.ConfigError, match=r"task name .*: wanted letters, digits"):
        Task(name=name, data="embedded/digits")


def test_the_name_of_the_shared_parameters_is_taken():
    with pytest.raises(errors.ConfigError, match="'shared' is taken"):
        Task(name="shared", data="embedded/digits")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"image_size": 0}, "task 't': image_size=0; wanted a positive number"),
        ({"image_size": -3}, "image_size=-3; wanted a positive number"),
        ({"batch_size": 0}, "batch_size=0; wanted a positive number"),
        ({"steps": 0}, "steps=0; wanted a positive number"),
        ({"steps": -5}, "steps=-5; wanted a positive number"),
        ({"epochs": 0}, "epochs=0; wanted a positive number"),
        ({"weight": 0.0}, "weight=0.0; wanted a positive number"),
        ({"learning_rate": float("nan")}, "learning_rate=nan; wanted a positive number"),
        ({"learning_rate": -1e-3}, "learning_rate=-0.001; wanted a positive number"),
        ({"dropout": 1.0}, r"dropout=1.0; wanted a rate in \[0, 1\)"),
        ({"dropout": -0.1}, r"dropout=-0.1; wanted a rate in \[0, 1\)"),
        ({"metrics": ()}, "task 't' has no metric"),
        ({"steps": 5, "epochs": 2}, "task 't' has steps and epochs; give one of them"),
        ({"patch": "scale_bais+head"}, "unknown patch kind 'scale_bais'; did you mean 'scale_bias'"),
        ({"patch": "scale_bias(momentm=0.9)"}, "did you mean 'momentum'"),
        ({"patch": ""}, "patch spec: cannot read ''"),
    ],
)
def test_fields_that_cannot_be(fields, message):
    with pytest.raises(errors.ConfigError, match=message):
        Task(name="t", data="embedded/digits", **fields)


@pytest.mark.parametrize(
    ("fields", "run_steps", "target"),
    [
        ({"steps": 7}, 100, 7),
        ({"epochs": 3, "batch_size": 8}, 100, 30),
        ({"epochs": 0.5, "batch_size": 8}, None, 5),
        ({"epochs": 0.001}, None, 1),
        ({}, 100, 100),
        ({"weight": 0.25}, 100, 25),
        ({"weight": 3.0}, 100, 300),
    ],
)
def test_step_target(fields, run_steps, target):
    assert Task(name="t", data="embedded/digits", **fields).step_target(run_steps, examples=80) == target


def test_no_step_target():
    with pytest.raises(errors.ConfigError, match="task 't' has neither steps nor epochs, and the run has no steps"):
        Task(name="t", data="embedded/digits").step_target(None, 80)


def test_metrics_may_be_a_list():
    assert Task(name="t", data="embedded/digits", metrics=["accuracy", "top5_accuracy"]).metrics == (
        "accuracy",
        "top5_accuracy",
    )
