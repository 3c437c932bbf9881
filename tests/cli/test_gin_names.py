"""Names in gin files that gin lets pass: one line with the place, the setting and the nearest name."""

import pytest

import gin
from k4p1 import errors
from k4p1.cli import gin_config, main

TWO = """
train.backbone = @mobilenet_v2
train.tasks = [@flowers/Task(), @digits/Task()]
train.steps = 3
flowers/Task.name = 'flowers'
flowers/Task.data = 'embedded/parity'
digits/Task.name = 'digits'
digits/Task.data = 'embedded/digits'
"""


@pytest.fixture(autouse=True)
def clean_gin():
    """gin's configuration is global."""
    gin.clear_config()
    yield
    gin.clear_config()


@pytest.fixture
def file(tmp_path):
    return tmp_path / "mine.gin"


def refusal(file, text, *bindings):
    file.write_text(text)
    with pytest.raises(errors.ConfigError) as caught:
        gin_config.load([str(file)], bindings)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


@pytest.mark.parametrize(
    ("changed", "to", "line", "message"),
    [
        (
            "digits/Task.data",
            "flowres/Task.batch_size = 8\ndigits/Task.data",
            8,
            "flowres/Task.batch_size is for 'flowres', to which nothing refers; did you mean 'flowers'?",
        ),
        (
            "[@flowers/Task()",
            "[@flowres/Task()",
            3,
            "train.tasks names @flowres/Task(), and nothing is set for 'flowres'; did you mean 'flowers'?",
        ),
        (
            "digits/Task.data = 'embedded/digits'\n",
            "",
            3,
            "train.tasks names @digits/Task(), a task without data; add digits/Task.data = '...'",
        ),
        (
            "train.steps = 3",
            "share_workers = True",
            4,
            "'share_workers' is no macro of this configuration; as a setting, write train.share_workers = ...",
        ),
        (
            "train.steps = 3",
            "batch_size = 8",
            4,
            "'batch_size' is no macro of this configuration; as a setting, write Task.batch_",
        ),
        ("train.steps = 3", "share_worker = True", 4, "unused macro 'share_worker'; did you mean 'train.share_workers'?"),
        (
            "train.steps = 3",
            "train.stepz = 3",
            4,
            "unknown setting of train 'stepz'; did you mean 'steps'? Known: backbone, ",
        ),
    ],
)
def test_wrong_names(file, changed, to, line, message):
    assert changed in TWO
    assert refusal(file, TWO.replace(changed, to)).startswith(f"{file}, line {line}: {message}")


def test_right_names_pass(file):
    file.write_text(TWO + "Task.batch_size = 8\n")
    assert "flowers/Task.data" in gin_config.load([str(file)])


def test_a_binding_of_the_command_line_has_its_place_there(file):
    said = refusal(file, TWO, "flowres/Task.batch_size = 8")
    assert said.startswith("--gin_bindings: flowres/Task.batch_size is for 'flowres'")


def test_places_in_included_files(file, tmp_path):
    (tmp_path / "base.gin").write_text(TWO + "flowres/Task.batch_size = 8\n")
    assert refusal(file, f"include '{tmp_path}/base.gin'\n").startswith(f"{tmp_path}/base.gin, line 9: flowres/")


def test_a_task_that_a_run_leaves_out_may_keep_its_bindings():
    assert "digits" in gin_config.load(["quickstart"], ["train.tasks = [@digits/Task()]"])


def test_a_value_for_all_tasks_is_data_enough(file):
    file.write_text(TWO.replace("digits/Task.data", "Task.data"))
    gin_config.load([str(file)])


def test_the_command_line_says_it_before_anything_is_written(file, tmp_path, capsys):
    file.write_text(TWO.replace("digits/Task.data", "digist/Task.data"))
    assert main.main(["train", "--gin_file", str(file), "--model_dir", str(tmp_path / "m")]) == 1
    said = capsys.readouterr().err
    assert "k4p1: " in said and "line 8: digist/Task.data" in said and "did you mean 'digits'?" in said
    assert not (tmp_path / "m").exists()
