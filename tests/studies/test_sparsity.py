"""How much masks take away from finished tasks: by task and layer, in all, as a picture, as a command."""

import numpy as np
import pytest

import k4p1
from k4p1 import backbones, errors
from k4p1.cli import main
from k4p1.data import Arrays
from k4p1.patches.kinds.mask import LayerSparsity
from k4p1.studies import sparsity as study

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Folder of a run of two tasks: `masked`, whose scores learn fast, and `plain` without a mask; and its result."""
    random = np.random.default_rng(0)
    labels = np.arange(40) % 2
    images = random.integers(0, 256, (40, 8, 8, 3))
    data = Arrays({"train": (images[:32], labels[:32]), "test": (images[32:], labels[32:])}, ["dark", "light"])
    how = {"data": data, "image_size": 32, "batch_size": 16, "steps": 3, "validation_fraction": 0.0}
    folder = tmp_path_factory.mktemp("sparsity") / "run"
    result = k4p1.finetune(
        backbone=backbones.cifar_resnet(depth=8),
        tasks=[k4p1.Task(name="masked", patch="mask+head", **how), k4p1.Task(name="plain", patch="head", **how)],
        optimizer=k4p1.OptimizerConfig(rules={"mask": {"learning_rate": 4e-3}}),
        model_dir=folder,
        quiet=True,
    )
    return folder, result


@pytest.fixture
def model_dir(run):
    return run[0]


def test_tasks_with_masks_are_counted_layer_by_layer(run):
    folder, result = run
    found = study.sparsity_of_tasks(folder)
    assert list(found) == ["masked"]
    trained = {
        key.removesuffix("/mask/scores"): np.array(scores)
        for key, scores in result.models["masked"].private().items()
        if key.endswith("/mask/scores")
    }
    zeros = {layer: int(np.sum(scores < np.float32(5e-3))) for layer, scores in trained.items()}
    assert {s.layer: (s.weights, s.zeros, s.negated) for s in found["masked"]} == {
        layer: (scores.size, zeros[layer], 0) for layer, scores in trained.items()
    }
    assert study.total(found["masked"]) == sum(zeros.values()) / sum(scores.size for scores in trained.values()) > 0
    assert study.sparsity_of_tasks(folder, "masked") == found


def test_the_total_weighs_layers_by_their_size():
    assert study.total([LayerSparsity("a", 10, 5, 0), LayerSparsity("b", 90, 0, 0)]) == pytest.approx(0.05)


def test_a_task_without_mask_and_an_unknown_one(model_dir):
    with pytest.raises(errors.ArtifactError, match=r"no task of .* has a mask; train one with patch = 'mask\+head'"):
        study.sparsity_of_tasks(model_dir, "plain")
    with pytest.raises(errors.ConfigError, match="did you mean 'masked'"):
        study.sparsity_of_tasks(model_dir, "maskd")


@pytest.mark.parametrize(("suffix", "start"), [(".png", b"\x89PNG"), (".svg", b"<?xml"), (".pdf", b"%PDF")])
def test_the_plot_has_the_format_of_its_name(suffix, start, tmp_path):
    path = tmp_path / f"masks{suffix}"
    study.plot({"a": [LayerSparsity("stem", 10, 5, 0)], "b": [LayerSparsity("other", 10, 1, 0)]}, path)
    assert path.read_bytes().startswith(start)


def test_a_plot_is_refused_by_its_name(tmp_path):
    with pytest.raises(errors.ConfigError, match=r"expected a file name that ends in \.png, \.svg, \.pdf"):
        study.plot({}, tmp_path / "masks.txt")
    assert not list(tmp_path.iterdir())


def test_the_command_shows_layers_and_draws(model_dir, tmp_path, capsys):
    picture = tmp_path / "masks.png"
    assert main.main(["sparsity", "--model_dir", str(model_dir), "--plot", str(picture)]) == 0
    out = capsys.readouterr().out
    layers = study.sparsity_of_tasks(model_dir)["masked"]
    assert f"Mask of task 'masked': {100 * study.total(layers):.2f}% of the weights are zero" in out
    (row,) = (line for line in out.splitlines() if "stem" in line)
    stem = next(layer for layer in layers if layer.layer == "stem")
    assert f"{stem.weights:,}" in row and f"{stem.zeros:,}" in row
    assert picture.is_file()
