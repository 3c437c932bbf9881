"""The package as it is installed: gin files are found from anywhere, and nothing imports TensorFlow too early."""

import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
SHIPPED = sorted(path.stem for path in (ROOT / "gin").glob("*.gin"))


def run(*command, **settings):
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, **settings)


@pytest.mark.parametrize("how", ["installed", "editable"])
def test_gin_files_are_found_by_short_name_from_anywhere(tmp_path, how):
    """The build is run on a copy, so that it leaves nothing in the checkout."""
    target, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in ("k4p1", "gin", "setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        assert run("cp", "-r", str(ROOT / name), str(copy)).returncode == 0
    flags = ["--quiet", "--no-deps", "--no-build-isolation", "--disable-pip-version-check"]
    if how == "installed":
        done = run(sys.executable, "-m", "pip", "install", *flags, "--target", str(target), str(copy))
        environment = {"PYTHONPATH": str(target)}
    else:
        environment_folder = tmp_path / "venv"
        assert (
            run(sys.executable, "-m", "venv", "--system-site-packages", "--without-pip", str(environment_folder)).returncode
            == 0
        )
        python = str(environment_folder / "bin" / "python")
        paths = "\n".join(p for p in sys.path if p.endswith("site-packages"))
        site = next((environment_folder / "lib").glob("python*/site-packages"))
        (site / "outer.pth").write_text(paths + "\n")
        done = run(python, "-m", "pip", "install", *flags, "--editable", str(copy))
        environment = {}
    assert done.returncode == 0, done.stderr
    python = sys.executable if how == "installed" else str(tmp_path / "venv" / "bin" / "python")
    snippet = "import k4p1, k4p1.config as c; print(k4p1.__file__); print(*sorted(c.shipped())); print(c.find('quickstart'))"
    found = run(
        python,
        "-P" if sys.version_info >= (3, 11) else "-B",
        "-c",
        snippet,
        cwd=elsewhere,
        env={"PATH": "/usr/bin:/bin", **environment},
    )
    assert found.returncode == 0, found.stderr
    where, names, path = found.stdout.splitlines()
    home = target if how == "installed" else copy
    assert pathlib.Path(where).is_relative_to(home) and pathlib.Path(path).is_relative_to(home)
    assert names.split() == SHIPPED


def test_no_python_file_shadows_gin():
    assert not list((ROOT / "gin").rglob("*.py"))


def test_import_and_help_are_quick_because_nothing_heavy_is_imported():
    heavy = "tensorflow,keras,numpy,gin,sklearn,rich,tensorflow_datasets"
    snippet = f"import sys, k4p1, k4p1.cli; k4p1.cli.main(['--help']); print([m for m in '{heavy}'.split(',') if m in sys.modules])"
    done = run(sys.executable, "-c", snippet, cwd=ROOT)
    assert done.stdout.splitlines()[-1] == "[]", done.stdout + done.stderr


def test_public_names_exist():
    import k4p1

    for name in k4p1.__all__:
        assert callable(getattr(k4p1, name)), name
    with pytest.raises(AttributeError):
        k4p1.nothing
