"""gin files by short name, and the mistakes that gin itself lets pass."""

import pytest

import gin
from k4p1 import errors
from k4p1.cli import gin_config, gin_files

NEEDED = {
    "finetune": ["data = 'embedded/digits'"],
    "decathlon": ["weights = None"],
    "decathlon_adapters": ["weights = None"],
    "lwf": ["data = 'embedded/digits'", "old_backbone = 'b'", "old_patch = 'p'"],
}
"""Bindings without which a shipped file cannot be read."""


@pytest.fixture(autouse=True)
def clean_gin():
    """gin's configuration is global."""
    gin.clear_config()
    yield
    gin.clear_config()


class TestFiles:
    @pytest.mark.parametrize("name", ["quickstart", "quickstart.gin"])
    def test_a_short_name_is_found_from_anywhere(self, name, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        assert gin_files.find(name) == gin_files.folder() / "quickstart.gin"

    def test_a_file_of_the_user_comes_first(self, tmp_path, monkeypatch):
        (tmp_path / "mine.gin").write_text("steps = 3\n")
        monkeypatch.chdir(tmp_path)
        assert gin_files.find("mine.gin").samefile(tmp_path / "mine.gin")
        assert gin_files.find(str(tmp_path / "mine.gin")).samefile(tmp_path / "mine.gin")

    def test_an_unknown_name_shows_the_nearest(self):
        with pytest.raises(errors.ConfigError, match="unknown gin file 'quickstat'; did you mean 'quickstart'"):
            gin_files.find("quickstat")

    def test_every_shipped_file_says_what_it_is(self):
        shipped = gin_files.shipped()
        assert set(shipped) >= {
            "quickstart",
            "finetune",
            "k4p1_table4",
            "k4p1_table5",
            "decathlon",
            "decathlon_small",
            "packnet",
            "lwf",
        }
        for name, summary in shipped.items():
            text = (gin_files.folder() / f"{name}.gin").read_text()
            assert len(summary) > 20, name
            for word in ("Stands for:", "Deviates:", "Usually overridden:"):
                assert word in text, f"{name}: {word}"

    def test_no_python_lies_beside_the_gin_files(self):
        assert not list(gin_files.folder().glob("**/*.py"))

    @pytest.mark.parametrize("name", gin_files.shipped())
    def test_every_shipped_file_can_be_read(self, name):
        text = gin_config.load([name], NEEDED.get(name, ()))
        assert "seed = 0" in text

    def test_a_file_may_include_a_shipped_one(self, tmp_path):
        (tmp_path / "mine.gin").write_text("include 'quickstart.gin'\nsteps = 7\n")
        assert "steps = 7" in gin_config.load([str(tmp_path / "mine.gin")])


class TestLoading:
    def test_bindings_come_after_files(self):
        assert "steps = 300" in gin_config.load(["quickstart"])
        assert "steps = 12" in gin_config.load(["quickstart"], ["steps = 12"])

    def test_nothing_of_an_earlier_configuration_stays(self):
        gin_config.load(["quickstart"], ["OptimizerConfig.weight_decay = 0.25"])
        assert "0.25" not in gin_config.load(["quickstart"])

    def test_values_reach_what_they_configure(self):
        gin_config.load(["quickstart"], ["learning_rate = 0.125"])
        assert gin_config.CONFIGURABLES["OptimizerConfig"]().learning_rate == 0.125

    @pytest.mark.parametrize(
        ("binding", "message"),
        [
            ("step = 3", "unused macro 'step'; did you mean 'steps'"),
            ("imagesize = 3", "unused macro 'imagesize'; did you mean 'image_size'"),
            ("zzzz = 3", "unused macro 'zzzz'; Used: augment, "),
            ("trian.steps = 3", "unknown configurable 'trian'; did you mean 'train'"),
            ("digits/Tsk.name = 'a'", "unknown configurable 'Tsk'; did you mean 'Task'"),
            ("Task.nam = 'a'", "unknown parameter of Task 'nam'; did you mean 'name'"),
            ("mobilenet_v2.widht = 1", "unknown parameter of mobilenet_v2 'widht'; did you mean 'width'"),
            ("train.backbone = @mobilnet_v2", "unknown configurable 'mobilnet_v2'; did you mean 'mobilenet_v2'"),
            ("train.steps = %stepps", "macro '%stepps' has no value; did you mean 'steps'"),
            ("steps 200", "gin cannot read 'steps 200'"),
            ("steps =", "gin cannot read 'steps ='"),
            ("steps = two words", "gin cannot read 'steps = two words': a value is number, quoted text"),
            ("train.tasks = [1,", "gin cannot read 'quickstart; train.tasks = .1,': (unexpected )?EOF"),
            ("train.backbone = @a/mobilnet_v2()", "did you mean 'mobilenet_v2'"),
            ("include 'nowhere.gin'", "gin: .*nowhere.gin"),
        ],
    )
    def test_bad_bindings_are_one_line(self, binding, message):
        with pytest.raises(errors.ConfigError, match=message) as caught:
            gin_config.load(["quickstart"], [binding])
        assert len(str(caught.value).splitlines()) == 1

    def test_a_macro_without_value_names_itself(self):
        with pytest.raises(errors.ConfigError, match=r"macro '%data' has no value; .*--gin_bindings 'data = ...'"):
            gin_config.load(["finetune"])

    def test_a_misspelt_macro_in_a_file(self, tmp_path):
        (tmp_path / "mine.gin").write_text("include 'quickstart.gin'\npacth = 'head'\n")
        with pytest.raises(errors.ConfigError, match="unused macro 'pacth'; did you mean 'patch'"):
            gin_config.load([str(tmp_path / "mine.gin")])


class TestUnused:
    def test_unused_bindings_are_named(self):
        gin_config.load(["quickstart"], ["RMSProp.rho = 0.5", "k4p1_rmsprop.learning_rate = 0.1"])
        gin_config.CONFIGURABLES["OptimizerConfig"]()
        unread = gin_config.unused()
        assert {"RMSProp.rho", "k4p1_rmsprop.learning_rate"} <= set(unread)
        assert not any(name.startswith("OptimizerConfig.") for name in unread)

    def test_scopes_are_told_apart(self):
        gin_config.load(["quickstart"])
        with gin.config_scope("digits"):
            assert gin_config.CONFIGURABLES["Task"]().name == "digits"
        unread = gin_config.unused()
        assert {"parity/Task.name", "parity/Task.data"} <= set(unread)
        assert not {"digits/Task.name", "Task.patch"} & set(unread)

    def test_the_operative_configuration_holds_defaults(self):
        gin_config.load(["quickstart"])
        gin_config.CONFIGURABLES["mobilenet_v2"]
        gin_config.CONFIGURABLES["Cosine"]()
        assert "Cosine.end = 0.0" in gin_config.operative()
