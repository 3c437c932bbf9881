"""Packaging of k4p1. The gin files of `gin/` are installed as `k4p1/configs/`, where `k4p1.cli.gin_files` finds them."""

import pathlib
import shutil

import setuptools
from setuptools.command.build_py import build_py

ROOT = pathlib.Path(__file__).resolve().parent
VERSION = next(
    line.split('"')[1]
    for line in (ROOT / "k4p1" / "__init__.py").read_text(encoding="utf-8").splitlines()
    if line.startswith("__version__")
)


class BuildWithConfigs(build_py):
    """Copies the gin files into the package that is built; an editable install reads them from `gin/`."""

    def run(self):
        super().run()
        if not self.editable_mode:
            target = pathlib.Path(self.build_lib) / "k4p1" / "configs"
            target.mkdir(parents=True, exist_ok=True)
            for path in sorted((ROOT / "gin").glob("*.gin")):
                shutil.copy(path, target)


setuptools.setup(
    name="k4p1",
    version=VERSION,
    description="Parameter-efficient multi-task and transfer learning with TensorFlow and Keras: one backbone, many tasks.",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10,<3.14",
    packages=setuptools.find_packages(include=["k4p1", "k4p1.*"]),
    cmdclass={"build_py": BuildWithConfigs},
    entry_points={"console_scripts": ["k4p1 = k4p1.cli.main:entry"]},
    install_requires=[
        "absl-py>=2.1",
        "gin-config>=0.5",
        "importlib_resources>=6",  # tensorflow-datasets imports it and does not ask for it
        "keras>=3.12,<3.16",
        "matplotlib>=3.9,<4",
        "numpy>=2.1",
        "pyyaml>=6",
        "rich>=14",
        "safetensors>=0.5",
        "scikit-learn>=1.6",
        "tensorboard>=2.20,<2.22",
        "tensorflow>=2.21,<2.22",
        "tensorflow-datasets>=4.9.9,<5",
    ],
    extras_require={
        "dev": [
            "hypothesis>=6.100",
            "import-linter>=2.5,<3",
            "jax>=0.4.38",
            "kubernetes-validate>=1.30",
            "pytest>=8",
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.6,<4",
            "ruff>=0.12",
        ],
        "mobile": ["ai-edge-litert>=2.0"],
        "cuda": ["tensorflow[and-cuda]>=2.21,<2.22"],
    },
)
