"""What all tests share: a quiet TensorFlow, small networks, and real data beside the project where it is there."""

import contextlib
import os
import resource

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")

import pathlib

import keras
import numpy as np
import pytest
import tensorflow as tf

from k4p1 import backbones

BESIDE = pathlib.Path(os.environ.get("K4P1_SHARED", pathlib.Path(__file__).resolve().parents[2] / "shared"))
"""Folder with `data/` and `weights/`: real images and pretrained weights. Tests that need it skip without it."""
SHALLOW = ("train.backbone = @cifar_resnet", "cifar_resnet.depth = 8")
"""Bindings that give the quickstart a network of seven convolutions, for tests that do not care which it is: TensorFlow's
graphs of MobileNetV2 take most of the time of a short run."""


def pytest_configure(config):
    threads = 1 if os.environ.get("PYTEST_XDIST_WORKER") else 2  # beside another worker, one core is ours
    tf.config.threading.set_intra_op_parallelism_threads(threads)
    tf.config.threading.set_inter_op_parallelism_threads(2)
    # Here graphs take a few steps: to optimise one costs more than that saves. Processes that tests start optimise theirs.
    tf.config.optimizer.set_experimental_options({"disable_meta_optimizer": True})


def pytest_addoption(parser):
    parser.addoption(
        "--quick",
        action="store_true",
        help="the tests that find most, in under three minutes: a covering set of the conformance table, and of the others "
        "those that start no processes and are not slow",
    )


def pytest_collection_modifyitems(config, items):
    """With `--quick` leaves out what takes long. Files that take longest come first, so that all workers end together."""
    if config.getoption("--quick"):
        left_out = [item for item in items if _takes_long(item)]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not _takes_long(item)]
    items.sort(key=lambda item: _LONGEST.index(item.path.name) if item.path.name in _LONGEST else len(_LONGEST))


_LONGEST = tuple(
    f"test_{name}.py"
    for name in (
        "faults",
        "zoo",
        "readme",
        "one_cluster",
        "conformance",
        "baselines",
        "compress",
        "platforms",
        "docs_python",
        "examples",
        "run",
        "cli",
        "python_api",
        "resume",
        "own_objective",
        "gin_files",
        "nettailor",
    )
)


def _takes_long(item) -> bool:
    return any(item.get_closest_marker(name) is not None for name in ("processes", "slow", "full_table"))


@pytest.fixture(scope="session")
def weights_file() -> pathlib.Path:
    """ImageNet weights of MobileNetV2 0.35."""
    path = BESIDE / "weights" / "mobilenet_v2_0.35_224_imagenet_notop.weights.h5"
    if not path.is_file():
        pytest.skip("the pretrained weights are not beside the project")
    return path


@pytest.fixture(scope="session")
def real_data() -> pathlib.Path:
    """Prepared TFDS directories of real images."""
    path = BESIDE / "data"
    if not path.is_dir():
        pytest.skip("the real images are not beside the project")
    return path


@pytest.fixture
def full_disk():
    """A context in which no file of this process can grow."""

    @contextlib.contextmanager
    def full():
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    return full


@pytest.fixture(autouse=True)
def float32_policy():
    """Every test starts with the default precision."""
    yield
    keras.config.set_dtype_policy("float32")


def small_model(batch_normalisation: bool = True, seed: int = 0) -> keras.Model:
    """Convolution, depthwise convolution and 1x1 convolution of a few channels, weights away from their defaults."""
    keras.utils.set_random_seed(seed)
    image = x = keras.Input((None, None, 3))
    layers = keras.layers
    for name, layer in {
        "stem": layers.Conv2D(6, 3, strides=2, padding="same", use_bias=not batch_normalisation, name="stem"),
        "spatial": layers.DepthwiseConv2D(3, padding="same", use_bias=not batch_normalisation, name="spatial"),
        "mix": layers.Conv2D(8, 1, use_bias=not batch_normalisation, name="mix"),
    }.items():
        x = layer(x)
        if batch_normalisation:
            x = layers.BatchNormalization(momentum=0.9, name=f"{name}_bn")(x)
        x = layers.ReLU(name=f"{name}_relu")(x)
    model = keras.Model(image, layers.GlobalAveragePooling2D(name="pool")(x), name="small")
    random = np.random.default_rng(seed)
    for variable in model.variables:
        values = random.normal(0.0, 0.3, variable.shape)
        variable.assign(1.0 + np.abs(values) if variable.name in ("gamma", "moving_variance") else values)
    return model


@pytest.fixture
def small_backbone() -> backbones.Backbone:
    """A network with batch normalisation that is built in milliseconds."""
    return backbones.from_model(small_model(), name="small", scaling="symmetric")


@pytest.fixture
def plain_backbone() -> backbones.Backbone:
    """The same without batch normalisation."""
    return backbones.from_model(small_model(batch_normalisation=False), name="small_plain", scaling="symmetric")


@pytest.fixture(scope="session")
def mobilenet() -> backbones.Backbone:
    """MobileNetV2 1.0, random weights."""
    return backbones.mobilenet_v2()


@pytest.fixture(scope="session")
def inception() -> backbones.Backbone:
    """InceptionV3, random weights."""
    return backbones.inception_v3()


@pytest.fixture
def images() -> np.ndarray:
    """Four images of 16 x 16 pixels, 0 to 255."""
    return np.random.default_rng(1).integers(0, 256, (4, 16, 16, 3)).astype("float32")
