"""The package as it is installed: gin files are found from anywhere, and nothing imports TensorFlow too early."""

import pathlib
import re
import shutil
import subprocess
import sys

import pytest

pytestmark = pytest.mark.processes

ROOT = pathlib.Path(__file__).resolve().parents[1]
SHIPPED = sorted(path.stem for path in (ROOT / "gin").glob("*.gin"))


def run(*command, **settings):
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, **settings)


def copy_of_checkout(folder):
    """A build leaves files in the checkout that it builds."""
    folder.mkdir()
    for name in ("k4p1", "gin", "setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, folder / name)
    return folder


@pytest.mark.parametrize("how", ["installed", "editable"])
def test_gin_files_are_found_by_short_name_from_anywhere(tmp_path, how):
    checkout, venv, elsewhere = copy_of_checkout(tmp_path / "copy"), tmp_path / "venv", tmp_path / "elsewhere"
    elsewhere.mkdir()
    assert run(sys.executable, "-m", "venv", "--without-pip", str(venv)).returncode == 0
    site = next((venv / "lib").glob("python*/site-packages"))
    (site / "outer.pth").write_text("\n".join(p for p in sys.path if p.endswith("site-packages")) + "\n")
    python = str(venv / "bin" / "python")
    quietly = ["--quiet", "--no-deps", "--no-build-isolation", "--disable-pip-version-check", "--ignore-installed"]
    source = [str(checkout)] if how == "installed" else ["--editable", str(checkout)]
    done = run(python, "-m", "pip", "install", *quietly, *source)
    assert done.returncode == 0, done.stderr
    snippet = "import k4p1, k4p1.cli.gin_files as c; print(k4p1.__file__); print(*c.shipped()); print(c.find('quickstart'))"
    found = run(python, "-c", snippet, cwd=elsewhere, env={"PATH": "/usr/bin:/bin"})
    assert found.returncode == 0, found.stderr
    where, names, path = found.stdout.splitlines()
    home = site if how == "installed" else checkout
    assert pathlib.Path(where).is_relative_to(home) and pathlib.Path(path).is_relative_to(home)
    assert names.split() == SHIPPED


def test_the_constraints_name_every_requirement_in_its_range():
    from packaging.requirements import Requirement

    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    pinned = dict(line.split("==") for line in lines)
    assert all(re.fullmatch(r"[a-z0-9-]+==[\w.!+-]+", line) for line in lines)  # no host, no path
    listed = re.search(r"install_requires=\[(.*?)\]", (ROOT / "setup.py").read_text(), re.DOTALL)[1]
    required = [Requirement(text) for text in re.findall(r'"([^"]+)"', re.sub("#.*", "", listed))]
    assert len(required) > 10
    for requirement in required:
        name = requirement.name.lower().replace("_", "-")
        assert name in pinned and requirement.specifier.contains(pinned[name]), name


def test_the_image_gets_what_the_package_is_built_of():
    """What `.dockerignore` lets pass is what a build needs; the image runs as another user than root."""
    kept = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    needed = {"k4p1", "gin", "setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in", "constraints.txt"}
    assert needed <= set(kept)
    lines = (ROOT / "Dockerfile").read_text().splitlines()
    assert "USER 10001:10001" in lines and any("--constraint constraints.txt" in line for line in lines)


def test_no_python_file_shadows_gin():
    assert not list((ROOT / "gin").rglob("*.py"))


def test_import_and_help_are_quick_because_nothing_heavy_is_imported():
    heavy = "tensorflow,keras,numpy,gin,sklearn,rich,tensorflow_datasets"
    snippet = (
        "import sys, k4p1.cli.main; k4p1.cli.main.main(['--help']); "
        f"print([m for m in '{heavy}'.split(',') if m in sys.modules])"
    )
    done = run(sys.executable, "-c", snippet, cwd=ROOT)
    assert done.stdout.splitlines()[-1] == "[]", done.stdout + done.stderr


def test_public_names_exist():
    import k4p1

    for name in k4p1.__all__:
        assert callable(getattr(k4p1, name)), name
    with pytest.raises(AttributeError):
        getattr(k4p1, "nothing")  # noqa: B009
