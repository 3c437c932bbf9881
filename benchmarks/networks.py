"""The zoo: what k4p1 makes of the networks of keras.applications and of the shapes of user models in `tests/networks/`.

    python benchmarks/networks.py [NAME ...] [--results zoo.json] [--again] [--only_table] [--small]

For each network (random weights): build; one step of the engine with each patch, write, load in a fresh process, fold,
same answers; and a real run of one step with `scale_bias+head` (`head` where that fits nothing), evaluated and exported
by the fresh process. NAME picks the networks whose names contain it. What is in the file of results is not tried again,
unless `--again`: an interrupted call goes on. Then `docs/networks.md` is written from all results. `--small` leaves the
large members of the families out.
"""

import argparse
import gc
import importlib
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # for `tests.networks`

SMALL = {
    "MobileNet": 32,
    "MobileNetV2": 32,
    "MobileNetV3Small": 32,
    "NASNetMobile": 32,
    "EfficientNetB0": 32,
    "EfficientNetV2B0": 32,
    "DenseNet121": 32,
    "ResNet50": 32,
    "ResNet50V2": 32,
    "InceptionV3": 75,
    "Xception": 71,
    "VGG16": 32,
    "ConvNeXtTiny": 32,
    "InceptionResNetV2": 75,
}
LARGE = {
    "MobileNetV3Large": 32,
    "DenseNet201": 32,
    "ResNet152": 32,
    "ResNet152V2": 32,
    "EfficientNetB7": 32,
    "EfficientNetV2L": 32,
    "NASNetLarge": 32,
    "VGG19": 32,
    "ConvNeXtLarge": 32,
}
"""The smallest and a large member of each family, and the image side at which they are tried."""
DEEPEST = ("EfficientNetB7", "EfficientNetV2L")
"""Networks whose last maps are one pixel, and whose gradients overflow where batch statistics are those of two values."""
RUN = "run and export"
PAGE = ROOT / "docs" / "networks.md"


def main():
    """Tries networks and writes the page."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*")
    parser.add_argument("--results", default="zoo.json", type=pathlib.Path)
    for flag in ("again", "only_table", "small"):
        parser.add_argument(f"--{flag}", action="store_true")
    parser.add_argument("--half", nargs=3, metavar=("WHICH", "NAME", "FOLDER"), help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.half:
        which, name, folder = a.half
        print(json.dumps((train if which == "train" else check)(name, pathlib.Path(folder))))
        return
    results = json.loads(a.results.read_text()) if a.results.is_file() else {}
    for name in () if a.only_table else names(a.small):
        picked = not a.names or any(part in name for part in a.names)
        if picked and (a.again or name not in results):
            results[name] = tried(name)
            a.results.write_text(json.dumps(results, indent=1))
            print(f"{name}: {results[name]}", flush=True)
    PAGE.write_text(page(results), encoding="utf-8")


def names(small: bool) -> list[str]:
    """All networks; those of users and those that are refused by what is special about them."""
    from tests.networks import user_models

    return [*user_models.REFUSED, *user_models.ACCEPTED, *SMALL, *({} if small else LARGE)]


def tried(name: str) -> dict[str, str]:
    """What became of a network, tried in two fresh processes, one that trains, one that loads; refusals need none."""
    from tests.networks import user_models

    if name in user_models.REFUSED:
        return refusal(name)
    folder = pathlib.Path(tempfile.mkdtemp(prefix="zoo-"))
    try:
        found = {}
        for which in ("train", "check"):
            command = [sys.executable, __file__, "--half", which, name, str(folder)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                return {**found, "process": f"FAILS: {which} ended with {done.returncode}: {done.stderr[-300:]}"}
            found |= json.loads(done.stdout.strip().splitlines()[-1])
        return found
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def network(name: str):
    """A function that makes the backbone, and the side of its images."""
    import k4p1
    from tests.networks import user_models

    if name in user_models.ACCEPTED:
        return lambda: k4p1.backbone_from_model(user_models.ACCEPTED[name](), scaling="unit"), user_models.SIDE
    return lambda: k4p1.application(name), {**SMALL, **LARGE}[name]


def refusal(name: str) -> dict[str, str]:
    """What k4p1 says to a network that it refuses."""
    import k4p1
    from tests.networks import user_models

    make, says = user_models.REFUSED[name]
    try:
        backbone = k4p1.backbone_from_model(make(), scaling="unit")
        k4p1.apply_patches(backbone, "head", classes=3, image_size=user_models.SIDE)
    except k4p1.errors.ConfigError as e:
        return {"refused": str(e) if says in str(e) else f"FAILS: another message: {e}"}
    return {"refused": "FAILS: accepted"}


def train(name: str, folder: pathlib.Path) -> dict:
    """The first process: trains, and writes files."""
    import k4p1
    from tests.networks import trial

    make, side = network(name)
    start = time.perf_counter()
    try:
        backbone = make()
    except Exception as e:
        return {"build": f"FAILS: {type(e).__name__}: {k4p1.errors.reason(e)}"}
    found = {"parameters": sum(int(v.size) for v in backbone.tensors().values()), "build_s": time.perf_counter() - start}
    start = time.perf_counter()
    k4p1.apply_patches(backbone, "head", classes=3, image_size=side)
    found["patch_s"] = time.perf_counter() - start
    start = time.perf_counter()
    k4p1.save_backbone(backbone, folder / "timed.safetensors")
    found["write_s"] = time.perf_counter() - start
    (folder / "timed.safetensors").unlink()
    for number, spec in enumerate(trial.SPECS):  # `train` is the last: it changes the backbone
        found[spec] = trial.outcome(trial.train_step, backbone, spec, side, folder / str(number))
        gc.collect()
    patch = "head" if found["scale_bias+head"].startswith(trial.NO_FIT) else "scale_bias+head"
    found[RUN] = trial.outcome(trial.run, make, side, folder / "run", patch, 8 if name in DEEPEST else 2)
    return found


def check(name: str, folder: pathlib.Path) -> dict:
    """The second process: loads the files, and compares."""
    trial = importlib.import_module("tests.networks.trial")
    importlib.import_module("tests.networks.user_models")  # registers the layers of users

    if not folder.is_dir() or not any(folder.iterdir()):
        return {}
    _, side = network(name)
    found = {}
    for number, spec in enumerate(trial.SPECS):
        if (folder / str(number) / "expected.npy").is_file():
            found[spec] = trial.outcome(trial.check_step, folder / str(number), side)
            shutil.rmtree(folder / str(number))
            gc.collect()
    if (folder / "run" / "expected.npy").is_file():
        found[RUN] = trial.outcome(trial.check_run, folder / "run", side)
    return found


def page(results: dict[str, dict]) -> str:
    """docs/networks.md."""
    from tests.networks import trial, user_models

    columns = [*trial.SPECS, RUN]
    notes: list[str] = []

    def cell(text: str) -> str:
        if text == trial.WORKS:
            return "yes"
        short = text.removeprefix(trial.NO_FIT)
        if short not in notes:
            notes.append(short)
        return f"{'no' if text.startswith(trial.FAILS) else '–'} ({notes.index(short) + 1})"

    def table(listed) -> list[str]:
        rows = [
            f"| network | {' | '.join(f'`{c}`' if c != RUN else c for c in columns)} |",
            "|---" * (len(columns) + 1) + "|",
        ]
        for name in listed:
            if name in results:
                found = results[name]
                broken = found.get("build") or found.get("process")
                rows.append(f"| {name} | {' | '.join(cell(broken or found.get(c, 'not tried')) for c in columns)} |")
        return rows

    of_keras, of_users = table([*SMALL, *LARGE]), table(user_models.ACCEPTED)
    refusals = [f"| {n} | {results[n]['refused']} |" for n in user_models.REFUSED if "refused" in results.get(n, {})]
    timed = [n for n in (*SMALL, *LARGE) if "write_s" in results.get(n, {})]
    times = [
        f"| {n} | {results[n]['parameters'] / 1e6:.1f} | {results[n]['build_s']:.1f} | {results[n]['patch_s']:.1f} | "
        f"{results[n]['write_s']:.1f} |"
        for n in sorted(timed, key=lambda n: -results[n]["parameters"])
    ]
    listed_notes = [f"{number}. {note}" for number, note in enumerate(notes, 1)]
    missing = [f"`{name}`" for name in names(small=False) if name not in results]
    if missing:
        listed_notes += [
            "",
            f"Not tried in the runs behind this page (the command above goes on with them): {', '.join(missing)}.",
        ]
    parts = [_HEAD, *of_keras, _USERS, *of_users, _NOTES, *listed_notes, _REFUSED, *refusals, _TIMES, *times]
    return "\n".join(parts) + "\n"


_HEAD = """# Networks

Which networks become backbones, and what can be trained on them. This page is generated by

    python benchmarks/networks.py

which builds each network with random weights, takes a step of the engine with each patch, writes backbone and patch,
loads both in a fresh process, folds, and compares the answers of the task model that was trained, the loaded and the
folded one. The last column is a real run of one step (`finetune` with `scale_bias+head`, or `head` where that does not
fit), whose files the fresh process loads, evaluates and exports as a SavedModel, which is compared with the task model.
`train` is multi-task training, where the shared weights learn, with `head`.

A trial has random weights and two images of mostly 32 pixels per batch. The last maps of a network are then one pixel, and
their batch statistics those of two values, in which the gradients of EfficientNetB7 and EfficientNetV2L overflow: their runs
have batches of eight.

*yes*: all of that, same answers. *–*: the patch does not fit the network and is refused before training; *no*: it fails.
Numbers refer to the notes below.

## Networks of keras.applications

The smallest and a large member of each family.
"""
_USERS = """
## Shapes of user models

They are in `tests/networks/user_models.py`; add yours there to try it.
"""
_NOTES = """
## Notes
"""
_REFUSED = """
## Refused at once

A backbone is a functional `keras.Model` from one tensor of images to one tensor of features that a file can hold.

| network | what k4p1 says |
|---|---|"""
_TIMES = """
## Time to build, patch and write

Seconds on two cores that other work shared, by the same command: to build the network, to build a task model with
`head` on it, and to write the backbone file.

| network | parameters (million) | build | patch | write |
|---|---|---|---|---|"""


if __name__ == "__main__":
    main()
