"""Ten thousand altered files, each with the hash that belongs to it: an `ArtifactError`, or a file that can be used.

The alterations are drawn by a fixed seed. Files are altered in memory: `tensor_file.read` gives what a file would give.
"""

import json
import random

import keras
import numpy as np
import pytest

from k4p1 import backbones, errors
from k4p1.backbones import files as backbone_files
from k4p1.files import result_file, run_record, tensor_file
from k4p1.patches import factor_file, patch_file
from k4p1.patches.apply import apply_patches
from k4p1.runs import status
from k4p1.runs.model_dir import ModelDir

pytestmark = pytest.mark.filterwarnings("ignore::k4p1.errors.PatchWarning")  # of kinds that say a patch is unwise

SPECS = (
    "scale_bias+depthwise+head",
    "mask(mask_type=ternary)+head",
    "parallel_adapter(rank=2)+lora(layers=mix)+head",
    "none",
)
LABELS = ("a", "b", "c")
ODD = (
    *(None, True, False, 0, -1, 3, 2**63, 10**30, 0.5, -0.0, 1e400, float("nan"), "", "x", "../../x", "é", "\ud800"),
    *("[/x]", "0" * 64, "none", "1", [], [1], [[]], [None], ["a", 3], {}, {"a": 1}, {"scale_bias": 3}, "scale_bias(", "+"),
    *("nothing+head", "head(mode=shared)", "lora(rank=0)", "mask(threshold=1e99)+head", "scale_bias(momentum=nan)"),
)


@pytest.fixture(scope="module")
def network():
    """A backbone that is built in milliseconds."""
    keras.utils.set_random_seed(0)
    image = keras.Input((None, None, 3))
    x = keras.layers.Conv2D(4, 3, use_bias=False, name="stem")(image)
    x = keras.layers.BatchNormalization(name="stem_bn")(x)
    x = keras.layers.DepthwiseConv2D(3, use_bias=False, name="spatial")(x)
    x = keras.layers.Conv2D(4, 1, name="mix")(x)
    return backbones.from_model(keras.Model(image, x), name="tiny", scaling="unit")


@pytest.fixture(scope="module")
def contents(network, tmp_path_factory):
    """(tensors, metadata) of a file of each format, by path."""
    folder = tmp_path_factory.mktemp("files")
    found = {}
    for number, spec in enumerate(SPECS):
        patched = apply_patches(network, spec, classes=len(LABELS), image_size=16)
        path = folder / f"patch_{number}"
        info = patch_file.save_patch(path, patched, network, task="t", labels=LABELS)
        found[path] = tensor_file.read(path, patch_file.FORMAT, 1)
    path = patch_file.save_head(folder, patched, LABELS)
    found[path] = tensor_file.read(path, patch_file.HEAD_FORMAT, 1)
    factors = {"mix/parallel_adapter/beta": np.ones((4, 2), "float32")}
    tensor_file.write(folder / "factors", factor_file.FORMAT, 1, factors, {"backbone_fingerprint": info.fingerprint})
    found[folder / "factors"] = tensor_file.read(folder / "factors", factor_file.FORMAT, 1)
    backbones.save(network, folder / "backbone")
    found[folder / "backbone"] = tensor_file.read(folder / "backbone", backbone_files.FORMAT, 1)
    return found


def altered_value(draw, value):
    """A value like `value`, or quite another."""
    if isinstance(value, dict) and value and draw.random() < 0.7:
        return altered_object(draw, value)
    if isinstance(value, list) and value and draw.random() < 0.5:
        place = draw.randrange(len(value))
        return [*value[:place], altered_value(draw, value[place]), *value[place + 1 :]]
    if isinstance(value, str) and value and draw.random() < 0.4:
        place = draw.randrange(len(value))
        return value[:place] + draw.choice(["", "9", "(", "=", "+", "\n", "A", "é"]) + value[place + 1 :]
    return draw.choice(ODD)


def altered_object(draw, values):
    """One field of an object left out, altered, or added."""
    name = draw.choice(sorted(values))
    kind = draw.random()
    if kind < 0.2:
        return {key: value for key, value in values.items() if key != name}
    if kind < 0.25:
        return {**values, draw.choice(["weights", "extra", "é", ""]): draw.choice(ODD)}
    return {**values, name: altered_value(draw, values[name])}


def altered_metadata(draw, metadata):
    """A header in which one part differs: its text, or a part of the JSON in it."""
    name = draw.choice([key for key in metadata if key not in ("format", "version")])
    text = metadata[name]
    if draw.random() < 0.15:
        return {key: value for key, value in metadata.items() if key != name}
    if draw.random() < 0.15:
        return {**metadata, name: draw.choice(["", "{}", "[]", "3", "null", '"x"', "[" * 100_000, "9" * 5000, text[:-1]])}
    try:
        value = json.loads(text)
    except ValueError:
        return {**metadata, name: str(altered_value(draw, text)).encode("utf-8", "replace").decode()}
    return {**metadata, name: json.dumps(altered_value(draw, value))}


def altered_tensors(draw, tensors):
    """One tensor left out, renamed, reshaped, of another type, or with other values."""
    if not tensors:
        return {"x": np.zeros(3, draw.choice(["int64", "float32", "bool"]))}
    name = draw.choice(sorted(tensors))
    value, rest = tensors[name], {key: tensor for key, tensor in tensors.items() if key != name}
    changed = value.copy()
    kind = draw.randrange(8)
    if kind == 0:
        return rest
    if kind == 1:
        return {**rest, draw.choice(["", "x", "a/b", f"{name}/x", name.upper(), "é"]): value}
    if kind == 2:
        return {**tensors, "extra/scale_bias/gamma": value}
    if kind == 3:
        return {**rest, name: draw.choice([value[..., None], value.reshape(-1)[:1], np.zeros((), value.dtype)])}
    if kind == 4:
        return {
            **rest,
            name: value.astype(draw.choice(["int32", "int64", "bool", "float64", "uint8", "float32", "float16"])),
        }
    if changed.dtype == np.uint8:
        changed.reshape(-1)[draw.randrange(changed.size)] = draw.randrange(256)
    else:
        odd = [np.nan, np.inf, -np.inf, -1.0, 1e38, 0.0]
        changed.reshape(-1)[draw.randrange(changed.size)] = draw.choice(odd)
    return {**rest, name: changed}


def usable(path, network):
    """Reads a file as k4p1 does; everything short of building models, which only a sample goes through."""
    if path.name == "backbone":
        return backbone_files.read(path)
    if path.name == "factors":
        return factor_file.read_factors(path)
    return patch_file.read_patch(path) if path.name.startswith("patch") else patch_file.read_head(path)


def loaded(path, network):
    """The same, and builds what the file describes."""
    if path.name == "backbone":
        return backbone_files.load(path)
    return (
        patch_file.load_patch(path, network, heads=path.parent) if path.name.startswith("patch") else usable(path, network)
    )


@pytest.mark.parametrize(("reading", "count", "seed"), [(usable, 9_200, 0), (loaded, 800, 1)], ids=["read", "built"])
@pytest.mark.slow
def test_an_altered_file_is_refused_as_such_or_can_be_used(reading, count, seed, contents, network, monkeypatch):
    draw = random.Random(seed)
    given = {}

    def read(path, *_):
        if path not in given:
            raise errors.ArtifactError(f"no file {path}")
        return given[path]

    monkeypatch.setattr(tensor_file, "read", read)
    before = network.fingerprint()
    refused = 0
    for _ in range(count):
        path = draw.choice(list(contents))
        tensors, metadata = contents[path]
        if draw.random() < 0.6:
            given = {**contents, path: (dict(tensors), altered_metadata(draw, metadata))}
        else:
            given = {**contents, path: (altered_tensors(draw, tensors), dict(metadata))}
        try:
            reading(path, network)
        except errors.ArtifactError as e:
            refused += 1
            assert str(e)
    assert network.fingerprint() == before
    assert refused > count // 2


def test_what_was_not_altered_can_be_used(contents, network):
    for path in contents:
        usable(path, network)
        loaded(path, network)


RUN = {"versions": {"k4p1": "0.1.0"}, "gin_hash": "a", "config_hash": "b", "config": {"seed": 0}}
RESULT = {"model_size_ratio": 1.0, "tasks": {"t": {"metric": "accuracy", "test_accuracy": 0.5, "steps": 3}}}
TASK = {
    "name": "t",
    "data": "embedded/digits",
    "patch": "head",
    "seed": 0,
    "metrics": ["accuracy"],
    "steps": 3,
    "loss": None,
}
STATUS = {
    **{"state": "training", "host": "h", "pid": 1, "started": 0.0, "time": 1.0, "owners": {"t": {"missing": 1}}},
    "tasks": {"t": {"done": 1, "target": 2, "loss": 0.5, "validation_accuracy": 0.5, "workers": [0]}},
    "workers": {"0": {"state": "working", "tasks": ["t"], "steps": 1, "staleness_mean": 0.5, "staleness_max": 1.0}},
    "events": [{"time": 0.0, "text": "worker 0 is lost"}],
}


@pytest.mark.parametrize("name", ["run.json", "result.json", "task.json", "status.json"])
def test_an_altered_record_of_a_run(name, tmp_path, capsys):
    (tmp_path / "tasks" / "t").mkdir(parents=True)
    path = tmp_path / ("tasks/t/task.json" if name == "task.json" else name)
    whole, reading = {
        "run.json": (RUN, lambda: run_record.compare(tmp_path, run_record.Configuration("a"))),
        "result.json": (RESULT, lambda: result_file.read(tmp_path)),
        "task.json": (TASK, lambda: ModelDir(tmp_path).read_task("t")),
        "status.json": (STATUS, lambda: status.report([tmp_path])),
    }[name]
    draw = random.Random(2)
    path.write_text(json.dumps(whole))
    if name != "run.json":  # of this version, perhaps
        reading()
    for _ in range(200):
        text = json.dumps(altered_value(draw, whole))
        path.write_text(text[: draw.randrange(len(text))] if draw.random() < 0.1 else text)
        try:
            reading()
        except errors.ConfigError:
            assert name == "run.json"  # another version or configuration
        except errors.ArtifactError as e:
            assert str(path) in str(e)
    capsys.readouterr()
