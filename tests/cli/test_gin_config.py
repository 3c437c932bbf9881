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
    "nettailor_svhn": ["data = 'embedded/digits'", "weights = None"],
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


class TestTypes:
    @pytest.mark.parametrize(
        ("binding", "message"),
        [
            ("steps = 'x'", "--gin_bindings: steps = 'x'; expected a whole number or None for train.steps"),
            ("image_size = (32, 32)", "image_size = (32, 32); expected a whole number for Task.image_size"),
            ("Task.image_size = 32.5", "--gin_bindings: Task.image_size = 32.5; expected a whole number"),
            ("digits/Task.data = 3", "digits/Task.data = 3; expected text in quotes or a reference such as @name"),
            (
                "learning_rate = 'fast'",
                "learning_rate = 'fast'; expected a number or None for OptimizerConfig",
            ),
            ("train.refit = 'no'", "train.refit = 'no'; expected True or False"),
            ("train.backbone = 3", "train.backbone = 3; expected a reference such as @name or text in quotes"),
            (
                "Task.metrics = 'accuracy'",
                "Task.metrics = 'accuracy'; expected a list, each text in quotes or a reference such as @name or None",
            ),
            (
                "Task.metrics = [1]",
                "Task.metrics = [1]; expected a list, each text in quotes or a reference such as @name or None",
            ),
            ("k4p1.train.steps = True", "train.steps = True; expected a whole number or None"),
            ("Cosine.warmup = None", "Cosine.warmup = None; expected a number"),
        ],
    )
    def test_a_wrong_type_names_the_binding(self, binding, message):
        with pytest.raises(errors.ConfigError) as caught:
            gin_config.load(["quickstart"], [binding])
        assert message in str(caught.value)
        assert len(str(caught.value).splitlines()) == 1

    def test_file_and_line_of_a_binding(self, tmp_path):
        mine = tmp_path / "mine.gin"
        mine.write_text("include 'quickstart.gin'\n\nsteps = 'many'\n")
        with pytest.raises(errors.ConfigError, match=rf"{mine}, line 3: steps = 'many'; expected a whole number or None"):
            gin_config.load([str(mine)])
        mine.write_text("include 'quickstart.gin'\ndigits/Task:\n  batch_size = '8'\n")
        with pytest.raises(errors.ConfigError, match=rf"{mine}, line 3: digits/Task.batch_size = '8'; expected"):
            gin_config.load([str(mine)])

    def test_the_last_binding_counts(self):
        assert "steps = 7" in gin_config.load(["quickstart"], ["steps = 'x'", "steps = 7"])

    @pytest.mark.parametrize("binding", ["Task.epochs = 1", "train.tasks = (@digits/Task(),)", "Task.schedule = @Cosine()"])
    def test_whole_numbers_are_numbers_and_references_may_be_anything(self, binding):
        gin_config.load(["quickstart"], [binding])


def test_a_percent_sign_in_quotes_is_no_macro():
    text = gin_config.load(["finetune"], ["data = '/x/100%real'"])
    assert "'/x/100%real'" in text
