"""Names of tasks that were given none."""

import numpy as np
import pytest

from k4p1 import errors
from k4p1.data import Arrays
from k4p1.tasks import Task
from k4p1.tasks.task_name import name_of_data


@pytest.mark.parametrize(
    ("data", "name"),
    [
        ("embedded/digits", "digits"),
        ("oxford_flowers102", "oxford_flowers102"),
        ("oxford_flowers102:2.1.1", "oxford_flowers102"),
        ("visual_domain_decathlon/aircraft", "visual_domain_decathlon_aircraft"),
        ("/nowhere/oxford_flowers102/2.1.1", "oxford_flowers102"),
        ("/nowhere/my pets (new)/", "my_pets_new"),
        ("/nowhere/Zürich-né", "Zurich-ne"),
        ("/x/100%real", "100_real"),
        ("/x/shared", "shared_data"),
        ("/x/猫", "task"),
        ("/1.0.0", "task"),
    ],
)
def test_the_name_is_that_of_the_data(data, name):
    assert name_of_data(data) == name
    assert Task(data=data).name == name


def test_a_relative_folder(tmp_path, monkeypatch):
    (tmp_path / "pets" / "cat").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert name_of_data("pets") == name_of_data("./pets") == name_of_data("pets/cat/..") == "pets"


def test_arrays_have_a_name_too():
    images = np.zeros((2, 4, 4, 3), np.uint8)
    assert Task(data=Arrays({"train": (images, [0, 1])}, "ab", name="two shades")).name == "two_shades"


@pytest.mark.parametrize("data", ["", None, 3])
def test_without_data_there_is_no_name(data):
    with pytest.raises(errors.DataError, match="a name, a folder"):
        Task(data=data)


@pytest.mark.parametrize("name", ["né", "a/b", "", "-x", "x y", "名"])
def test_names_are_ascii(name):
    with pytest.raises(errors.ConfigError, match="expected ASCII letters"):
        Task(name=name, data="embedded/digits")
