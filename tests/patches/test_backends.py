"""Patched layers use keras.ops alone: they compute the same on another Keras backend."""

import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

pytestmark = pytest.mark.processes

ROOT = pathlib.Path(__file__).resolve().parents[2]

PROGRAM = """
import sys

import keras
import numpy as np
from keras import layers

from k4p1.patches.kinds.dan import FilterCombination
from k4p1.patches.kinds.depthwise import PrivateKernel
from k4p1.patches.kinds.lora import LowRank
from k4p1.patches.kinds.mask import WeightMask
from k4p1.patches.kinds.packnet import FreeWeights
from k4p1.patches.kinds.parallel_adapter import CentreTap
from k4p1.patches.patched_batch_normalization import PatchedBatchNormalization
from k4p1.patches.patched_convolution import PatchedConvolution
from k4p1.patches.patched_normalization import PatchedNormalization
from k4p1.patches.kinds.scale_bias import OutputScaleBias
from k4p1.patches.kinds.series_adapter import SeriesBranch

path, backend = sys.argv[1:]
assert keras.backend.backend() == backend
random = np.random.default_rng(0)
image = x = keras.Input((7, 7, 3))
for layer, patch in (
    (layers.DepthwiseConv2D(3, padding="same"), lambda l: PatchedConvolution(l, [OutputScaleBias(), PrivateKernel()])),
    (layers.BatchNormalization(), lambda l: PatchedBatchNormalization(l, momentum=0.5)),
    (layers.Conv2D(4, 3, strides=2, activation="relu"), lambda l: PatchedConvolution(l, [OutputScaleBias()])),
    (layers.BatchNormalization(scale=False), lambda l: PatchedBatchNormalization(l, statistics="frozen")),
    (layers.LayerNormalization(scale=False), PatchedNormalization),
    (layers.GroupNormalization(2), lambda l: PatchedNormalization(l, "scale")),
    (layers.RMSNormalization(), PatchedNormalization),
):
    layer.build(x.shape)
    x = patch(layer)(x)
outputs = [x]
for layer, patches in (
    (layers.Conv2D(6, 3, padding="same"), [WeightMask(threshold=0.4, values="ternary")]),
    (layers.Conv2D(5, 3, strides=2), [SeriesBranch(rank=2, momentum=0.5), OutputScaleBias()]),
    (layers.Conv2D(5, 3, padding="same"), [CentreTap(), LowRank(2), FilterCombination()]),
    (layers.Conv2D(4, 1), [FreeWeights(), SeriesBranch(momentum=0.5)]),
):
    layer.build(image.shape)
    outputs.append(PatchedConvolution(layer, patches)(image))
model = keras.Model(image, outputs)
for variable in model.variables:
    variable.assign(random.uniform(0.2, 0.5, variable.shape).astype("float32"))
images = random.normal(0, 1, (3, 7, 7, 3)).astype("float32")
trainable, rest = ([keras.ops.convert_to_tensor(v.value) for v in group] for group in (
    model.trainable_variables, model.non_trainable_variables))


def loss(values):
    outputs, state = model.stateless_call(values, rest, images, training=True)
    return sum(keras.ops.sum(keras.ops.sin(output)) for output in outputs), (outputs, state)


if backend == "jax":
    import jax

    gradients, (outputs, state) = jax.jit(jax.grad(loss, has_aux=True))(trainable)
    inference = jax.jit(lambda: model.stateless_call(trainable, rest, images, training=False)[0])()
else:
    import tensorflow as tf

    with tf.GradientTape() as tape:
        tape.watch(trainable)
        value, (outputs, state) = loss(trainable)
    gradients = tape.gradient(value, trainable)
    inference = model(images, training=False)
results = {f"inference/{i}": value for i, value in enumerate(inference)}
results.update({f"training/{i}": value for i, value in enumerate(outputs)})
results.update({f"state/{i}": value for i, value in enumerate(state)})
results.update({f"gradient/{v.path}/{i}": g for i, (v, g) in enumerate(zip(model.trainable_variables, gradients))})
np.savez(path, **{key: np.asarray(value) for key, value in results.items()})
"""
"""Writes outputs, moved statistics and gradients of a net of patched layers to a file; arguments: file, backend."""


def results_on(backend: str, path: pathlib.Path) -> dict[str, np.ndarray]:
    environment = {**os.environ, "KERAS_BACKEND": backend, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(path), backend], env=environment, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    with np.load(path) as saved:
        return dict(saved)


def test_jax_computes_what_tensorflow_computes(tmp_path):
    pytest.importorskip("jax")
    tensorflow, jax = (results_on(backend, tmp_path / f"{backend}.npz") for backend in ("tensorflow", "jax"))
    assert tensorflow.keys() == jax.keys()
    assert len([key for key in tensorflow if key.startswith("gradient/")]) >= 26
    for key, value in tensorflow.items():
        np.testing.assert_allclose(jax[key], value, atol=1e-3, rtol=1e-3, err_msg=key)


def test_patches_and_backbones_do_not_import_tensorflow():
    """Their own code names only Keras; Keras itself imports whichever backend is chosen."""
    sources = [path for folder in ("patches", "backbones") for path in (ROOT / "k4p1" / folder).glob("*.py")]
    assert sources
    for path in sources:
        text = path.read_text(encoding="utf-8")
        assert "import tensorflow" not in text and "from tensorflow" not in text, path.name
