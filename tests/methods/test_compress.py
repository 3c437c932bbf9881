"""Joint compression of finished tasks: files, accuracy, budget, fine-tuning, and what is refused."""

import dataclasses
import json

import keras
import numpy as np
import pytest
import tensorflow as tf
from safetensors import numpy as safetensors_numpy

import k4p1
from k4p1 import backbones, data, errors
from k4p1.cli import main
from k4p1.files import tensor_file
from k4p1.methods.compress import compress
from k4p1.runs.evaluate import evaluate
from k4p1.runs.model_dir import ModelDir
from tests.conftest import small_model

pytestmark = pytest.mark.slow

STEPS = 6


def arrays(seed):
    random = np.random.default_rng(seed)
    labels = np.arange(60) % 3
    images = random.integers(0, 160, (60, 16, 16, 3)) + 90 * np.eye(3, dtype=int)[labels][:, None, None]
    splits = {"train": (images[:40].astype("uint8"), labels[:40]), "test": (images[40:].astype("uint8"), labels[40:])}
    return data.Arrays(splits, ("red", "green", "blue"))


def folder_of_images(path, seed):
    """An image folder, so that commands can open the data again."""
    source = arrays(seed)
    for split in ("train", "test"):
        for number, example in enumerate(source.examples(split)):
            place = path / split / source.labels[int(example["label"])]
            place.mkdir(parents=True, exist_ok=True)
            tf.io.write_file(str(place / f"{number}.png"), tf.io.encode_png(example["image"]))
    return str(path)


def finished(root, names, spec="parallel_adapter+scale_bias+head", seed=0, backbone=None):
    backbone = backbone or backbones.from_model(small_model(), name="small", scaling="symmetric")
    tasks = [
        k4p1.Task(
            name=name,
            data=folder_of_images(root / f"data_{name}", seed + index),
            patch=spec,
            image_size=16,
            batch_size=8,
            steps=STEPS,
            validation_fraction=0.0,
        )
        for index, name in enumerate(names)
    ]
    optimizer = k4p1.OptimizerConfig(learning_rate=1e-2)
    k4p1.finetune(backbone=backbone, tasks=tasks, optimizer=optimizer, model_dir=root / "run", quiet=True)
    return root / "run"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return finished(tmp_path_factory.mktemp("finished"), ("a", "b", "c"))


@pytest.mark.parametrize("share", ["output", "input"])
def test_the_whole_rank_changes_nothing(run, tmp_path, images, share):
    done = compress([run], tmp_path / "out", rank=1.0, share=share)
    assert done.share == share
    assert done.energy == pytest.approx(1.0) and done.accuracy_after == pytest.approx(done.accuracy_before)
    before, after = ModelDir(run), ModelDir(tmp_path / "out")
    for name in ("a", "b", "c"):
        np.testing.assert_allclose(
            after.load_task(name).model(images), before.load_task(name).model(images), atol=2e-4, rtol=1e-3
        )


def test_half_the_rank_keeps_most_of_the_energy_in_fewer_bytes(run, tmp_path):
    before = {path: path.read_bytes() for path in sorted(run.rglob("*.safetensors"))}
    done = compress([run], tmp_path / "out", tasks=("c", "a"), rank=0.5)
    assert {path: path.read_bytes() for path in sorted(run.rglob("*.safetensors"))} == before
    assert list(done.accuracy_after) == ["c", "a"] and 0.4 < done.energy < 1.0
    assert done.bytes_after < done.bytes_before
    files = list((tmp_path / "out" / "backbone" / "factors").iterdir())
    assert len(files) == 1
    patches = [ModelDir(tmp_path / "out").patch(name) for name in ("a", "c")]
    assert all(name.endswith("parallel_adapter/gamma") for name in safetensors_numpy.load_file(files[0]))  # the output side
    sizes = sum(t.nbytes for t in safetensors_numpy.load_file(files[0]).values())
    betas = sum(
        t.nbytes for p in patches for name, t in safetensors_numpy.load_file(p).items() if name.endswith("adapter/beta")
    )
    assert sizes + betas == done.bytes_after
    for path in patches:
        info = json.loads(tensor_file.read_header(path)["patch"])
        assert info["factors"].startswith(files[0].stem) and info["spec"] == "parallel_adapter+scale_bias+head"
    assert evaluate(tmp_path / "out", "a")["a"]["accuracy"] == pytest.approx(done.accuracy_after["a"])


def test_tasks_of_several_runs_and_series_adapters(tmp_path):
    backbone = backbones.cifar_resnet(depth=8)
    spec = "series_adapter(layers=stage*)+head"
    roots = [finished(tmp_path / name, (name,), spec, backbone=backbone) for name in ("x", "y")]
    done = compress(roots, tmp_path / "out", rank=0.75)
    assert list(done.accuracy_after) == ["x", "y"] and done.energy > 0.7


@pytest.mark.parametrize("share", ["output", "input"])
def test_keras_saves_and_loads_a_compressed_task(run, tmp_path, images, share):
    compress([run], tmp_path / "out", rank=0.5, share=share)
    model = ModelDir(tmp_path / "out").load_task("a").model
    model.save(tmp_path / "a.keras")
    np.testing.assert_array_equal(keras.saving.load_model(tmp_path / "a.keras")(images), model(images))


def test_tasks_of_python_objects_are_refused_before_anything_is_written(tmp_path):
    how = {"patch": "parallel_adapter+head", "image_size": 16, "batch_size": 8, "steps": 1, "validation_fraction": 0.0}
    task = k4p1.Task(name="object", data=arrays(0), **how)
    k4p1.finetune(backbone=backbones.cifar_resnet(depth=8), task=task, model_dir=tmp_path / "run", quiet=True)
    with pytest.raises(errors.ConfigError, match="trained on a Python object"):
        compress([tmp_path / "run"], tmp_path / "out", rank=0.5)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("share", "common", "own"), [("output", "gamma", "beta"), ("input", "beta", "gamma")])
def test_fine_tuning_moves_a_tasks_factors_and_leaves_the_common_ones(run, tmp_path, share, common, own):
    done = compress([run], tmp_path / "out", tasks=("a", "b"), rank=0.5, finetune_steps=3, share=share)
    compressed, finetuned = ModelDir(tmp_path / "out"), ModelDir(tmp_path / "out" / "finetuned")
    assert set(done.accuracy_finetuned) == {"a", "b"}
    names = [sorted(p.name for p in folder.factors.iterdir()) for folder in (compressed, finetuned)]
    assert names[0] == names[1]
    before, after = (safetensors_numpy.load_file(folder.patch("a")) for folder in (compressed, finetuned))
    assert before.keys() == after.keys()
    assert any(not np.array_equal(before[k], after[k]) for k in before if k.endswith(f"adapter/{own}"))
    assert not any(key.endswith(f"adapter/{common}") for key in after)


def test_the_command_prints_what_was_kept(run, tmp_path, capsys):
    flags = ["--model_dir", str(run), "--tasks", "a,b", "--output_dir", str(tmp_path / "out")]
    assert main.main(["compress", *flags, "--budget", "12KB", "--share", "input"]) == 0
    out = capsys.readouterr().out
    assert "shared by the tasks: the input side of the adapters" in out
    assert "energy kept: " in out and "bytes before" in out and "accuracy before" in out
    total = int(out.split("bytes before, ")[1].split(" after")[0].replace(",", ""))
    assert total <= 12_000
    assert main.main(["inspect", str(tmp_path / "out")]) == 0
    assert "k4p1-factors" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (["--rank", "0.5", "--budget", "1KB"], 1, "either rank"),
        ([], 1, "either rank"),
        (["--rank", "0.5", "--share", "both"], 1, "share"),
        (["--rank", "1.5"], 1, "expected a share of the channels"),
        (["--budget", "10B"], 1, "too small: rank 1 in every layer takes"),
        (["--budget", "lots"], 1, "expected a number and B, KB, MB"),
        (["--rank", "0.5", "--tasks", "aa"], 1, "did you mean 'a'"),
    ],
)
def test_mistakes_are_told_in_one_line_and_write_nothing(run, tmp_path, capsys, flags, code, message):
    output = tmp_path / "out"
    assert main.main(["compress", "--model_dir", str(run), "--output_dir", str(output), *flags]) == code
    err = capsys.readouterr().err.strip()
    assert message in err and "\n" not in err
    assert not output.exists()


def test_tasks_that_do_not_belong_together(run, tmp_path):
    others = {
        "different adapters": finished(tmp_path / "kind", ("k",), "parallel_adapter(layers=mix)+head"),
        "different backbones": finished(tmp_path / "other", ("o",), backbone=backbones.cifar_resnet(depth=14)),
    }
    with pytest.raises(errors.PatchError, match="different backbones"):
        compress([run, others["different backbones"]], tmp_path / "out", rank=0.5)
    backbone = ModelDir(run).load_backbone()
    same = finished(tmp_path / "same", ("s",), "scale_bias+head", backbone=backbone)
    with pytest.raises(errors.PatchError, match=r"'a' .'parallel_adapter.*'. and 's' .'scale_bias[+]head'. have different"):
        compress([run, same], tmp_path / "out", rank=0.5)
    with pytest.raises(errors.PatchError, match="has no adapters"):
        compress([same], tmp_path / "out", rank=0.5)
    compress([run], tmp_path / "first", rank=0.5)
    with pytest.raises(errors.PatchError, match="shares factors already"):
        compress([tmp_path / "first"], tmp_path / "out", rank=0.5)
    with pytest.raises(errors.ConfigError, match="is not empty"):
        compress([run], tmp_path / "first", rank=0.5)
    assert not (tmp_path / "out").exists()


def test_a_factor_file_that_is_missing_or_does_not_match(run, tmp_path):
    compress([run], tmp_path / "out", rank=0.5)
    folder = ModelDir(tmp_path / "out")
    (path,) = folder.factors.iterdir()
    content = path.read_bytes()
    path.unlink()
    with pytest.raises(errors.ArtifactError, match=r"uses shared factors .*, and there is no file"):
        folder.load_task("a")
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(errors.ArtifactError, match="damaged"):
        folder.load_task("a")
    compress([run], tmp_path / "other", rank=0.25)
    (other,) = ModelDir(tmp_path / "other").factors.iterdir()
    path.write_bytes(other.read_bytes())
    with pytest.raises(errors.ArtifactError, match="holds other factors"):
        folder.load_task("a")


def test_a_trained_alpha_starts_an_adapter_of_lower_rank(run, tmp_path):
    """RA, section 3.4: SVD of a task's own alpha, then fine-tuning."""
    folder = ModelDir(run)
    definition, seed = folder.read_task("a")
    spec = "parallel_adapter(layers=mix,rank=3)+scale_bias+head"
    task = dataclasses.replace(definition, patch=spec, init_from=str(folder.patch("a")), steps=1)
    with pytest.raises(
        errors.ArtifactError, match=r"cannot start from .*it has the patch"
    ):  # the file has an adapter of the stem
        k4p1.finetune(backbone=folder.load_backbone, task=task, quiet=True)
    root = finished(tmp_path, ("z",), "parallel_adapter(layers=mix)+scale_bias+head", backbone=folder.load_backbone())
    start = ModelDir(root)
    definition, seed = start.read_task("z")
    low = dataclasses.replace(definition, patch=spec, init_from=str(start.patch("z")), steps=1)
    optimizer = k4p1.OptimizerConfig(learning_rate=1e-9)
    result = k4p1.finetune(backbone=folder.load_backbone, task=low, optimizer=optimizer, seed=seed, quiet=True)
    private = {key: np.array(v) for key, v in result.models["z"].private().items()}
    alpha = safetensors_numpy.load_file(start.patch("z"))["mix/parallel_adapter/alpha"]
    place = "mix/parallel_adapter"
    near = private[f"{place}/beta"] @ private[f"{place}/gamma"].T
    u, s, v = np.linalg.svd(alpha)
    np.testing.assert_allclose(near, (u[:, :3] * s[:3]) @ v[:3], atol=1e-4)
    other = dataclasses.replace(definition, init_from=str(ModelDir(run).patch("a")))
    with pytest.raises(errors.ArtifactError, match=r"cannot start from .*fingerprint"):
        k4p1.finetune(backbone=lambda: backbones.cifar_resnet(depth=14), task=other, quiet=True)
