"""What a task refuses, and its step target."""

import pytest

from k4p1 import errors
from k4p1.tasks import Task


@pytest.mark.parametrize("name", ["a", "imagenet", "r224", "pacs_sketch", "v1.2-b", "0"])
def test_names_that_are_file_names(name):
    assert Task(name=name, data="embedded/digits").name == name


@pytest.mark.parametrize("name", ["", "a b", "a/b", "../a", ".hidden", "-a", "a\n", 3])
def test_other_names_are_refused(name):
    with pytest.raises(errors.ConfigError, match=r"task name .*: expected ASCII letters, digits"):
        Task(name=name, data="embedded/digits")


def test_the_name_of_the_shared_parameters_is_taken():
    with pytest.raises(errors.ConfigError, match="'shared' is taken"):
        Task(name="shared", data="embedded/digits")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"image_size": 0}, "task 't': image_size=0; expected a positive whole number"),
        ({"image_size": -3}, "image_size=-3; expected a positive whole number"),
        ({"batch_size": 0}, "batch_size=0; expected a positive whole number"),
        ({"steps": 0}, "steps=0; expected a positive whole number"),
        ({"steps": -5}, "steps=-5; expected a positive whole number"),
        ({"epochs": 0}, "epochs=0; expected a positive number"),
        ({"turn_weight": 0.0}, "turn_weight=0.0; expected a positive number"),
        ({"learning_rate": float("nan")}, "learning_rate=nan; expected a positive number"),
        ({"learning_rate": -1e-3}, "learning_rate=-0.001; expected a positive number"),
        ({"image_size": "32"}, "image_size='32'; expected a positive whole number"),
        ({"image_size": True}, "image_size=True; expected a positive whole number"),
        ({"batch_size": 2.5}, "batch_size=2.5; expected a positive whole number"),
        ({"epochs": "3"}, "epochs='3'; expected a positive number"),
        ({"turn_weight": float("inf")}, "turn_weight=inf; expected a positive number"),
        ({"label_smoothing": "much"}, r"label_smoothing='much'; expected a number in \[0, 1\)"),
        ({"metrics": "accuracy"}, r"metrics='accuracy'; expected names such as \('accuracy',\)"),
        ({"schedule": 3}, "task 't': schedule=3; expected a name or a Schedule"),
        ({"cache": "no"}, "cache='no'; expected True or False"),
        ({"dropout": 1.0}, r"dropout=1.0; expected a number in \[0, 1\)"),
        ({"dropout": -0.1}, r"dropout=-0.1; expected a number in \[0, 1\)"),
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
        ({"turn_weight": 0.25}, 100, 25),
        ({"turn_weight": 3.0}, 100, 300),
    ],
)
def test_step_target(fields, run_steps, target):
    assert Task(name="t", data="embedded/digits", **fields).step_target(run_steps, examples=80) == target


def test_no_step_target():
    with pytest.raises(errors.ConfigError, match="task 't' has neither steps nor epochs, and the run has none"):
        Task(name="t", data="embedded/digits").step_target(None, 80)


def test_metrics_may_be_a_list():
    assert Task(name="t", data="embedded/digits", metrics=["accuracy", "top5_accuracy"]).metrics == (
        "accuracy",
        "top5_accuracy",
    )


@pytest.mark.parametrize("name", ["né", "animals/dogs", "", "-x", 3])
def test_names_that_no_file_could_have(name):
    with pytest.raises(errors.ConfigError, match="expected ASCII letters"):
        Task(name=name, data="embedded/digits")
