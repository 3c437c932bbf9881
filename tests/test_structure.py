"""The house: which room may import which. The contracts are in pyproject.toml."""

import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]


def test_no_import_runs_upward_or_in_a_circle():
    pytest.importorskip("importlinter")
    check = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True))"
    done = subprocess.run([sys.executable, "-c", check], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_modules_stay_readable():
    """Median near 130 lines, few above 350 (a file that is longer holds more than one concept)."""
    lengths = sorted(len(path.read_text().splitlines()) for path in ROOT.glob("k4p1/**/*.py") if path.name != "__init__.py")
    assert lengths[len(lengths) // 2] < 150
    assert sum(length > 350 for length in lengths) <= 3


def test_rooms_have_a_line_that_says_what_they_hold():
    for package in ROOT.glob("k4p1/**/__init__.py"):
        assert package.read_text().startswith('"""'), package


def test_tests_mirror_the_package():
    rooms = {path.parent.relative_to(ROOT / "k4p1") for path in ROOT.glob("k4p1/**/__init__.py")}
    for path in ROOT.glob("tests/**/test_*.py"):
        place = path.parent.relative_to(ROOT / "tests")
        assert place in rooms or place == pathlib.Path("."), f"{path} is in no room of the package"
