"""Writes the golden files of the present format versions; run once when a version is new, never to make a test pass.

python tests/golden/make.py tests/golden/version_1
python tests/golden/make.py tests/golden/version_1_normalisations

Run it with the oldest Keras that setup.py allows: a newer one reads what it wrote of a network, not the other way round.
"""

import json
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import keras
import numpy as np

from k4p1 import backbones
from k4p1.patches import factor_file, patch_file
from k4p1.patches.apply import apply_patches
from tests.conftest import small_model

SPECS = {
    "none": "none",
    "head": "head",
    "random_head": "head(mode=random)",
    "scale_bias": "scale_bias+head",
    "frozen_statistics": "scale_bias(statistics=frozen)+head",
    "frozen_affine": "scale_bias(affine=frozen)+head",
    "depthwise": "scale_bias+depthwise+head",
    "full": "full",
    "series_adapter": "series_adapter(layers=stem)+scale_bias+head",
    "parallel_adapter": "parallel_adapter+scale_bias+head",
    "low_rank": "parallel_adapter(rank=2)+head",
    "joint": "parallel_adapter+head",
    "mask": "mask+scale_bias+head",
    "ternary": "mask(mask_type=ternary)+head",
    "lora": "lora(rank=2)+head",
    "dan": "dan(layers=stem)+head",
    "packnet": "packnet+head",
    "tailored": "nettailor(k=2,blocks=*_relu,live=1.m.0|2.m.0)+scale_bias(affine=frozen)+head",
}


NORMALISATION_SPECS = {
    "both": "scale_bias+head",
    "every": "scale_bias(where=every)+head",
    "scale": "scale_bias(affine=scale)+head",
    "bias": "scale_bias(affine=bias,where=every)+head",
}


def normalised_model() -> keras.Model:
    """Layer, group, RMS and batch normalisation, and a convolution that none follows."""
    layers = keras.layers
    keras.utils.set_random_seed(0)
    image = x = keras.Input((None, None, 3))
    for layer in (
        layers.Conv2D(6, 3, strides=2, activation="relu", name="stem"),
        layers.LayerNormalization(name="layer_norm"),
        layers.Conv2D(6, 1, name="mix"),
        layers.GroupNormalization(groups=2, name="group_norm"),
        layers.RMSNormalization(name="rms_norm"),
        layers.BatchNormalization(name="bn"),
        layers.GlobalAveragePooling2D(name="pool"),
    ):
        x = layer(x)
    return keras.Model(image, x, name="normalised")


def main(folder: pathlib.Path) -> None:
    """Writes backbone, patches, shared head, factors, and the logits that they give for one batch."""
    random = np.random.default_rng(11)
    is_first = folder.name == "version_1"
    backbone = backbones.from_model(small_model() if is_first else normalised_model(), name="small", scaling="symmetric")
    backbones.save(backbone, folder / "backbone.safetensors")
    images = random.integers(0, 256, (2, 16, 16, 3))
    betas = {"stem/parallel_adapter/beta": (3, 2), "mix/parallel_adapter/beta": (6, 3)}
    factors = {
        key: keras.Variable(random.normal(size=shape).astype("float32"), trainable=False, name="beta")
        for key, shape in betas.items()
    }
    logits = {}
    for name, spec in (SPECS if is_first else NORMALISATION_SPECS).items():
        shared = factors if name == "joint" else None
        patched = apply_patches(backbone, spec, classes=3, image_size=16, factors=shared, name=name, seed=3)
        for key, variable in patched.private().items():
            values = random.normal(0.0, 0.3, variable.shape)
            positive = key.endswith(("gamma", "variance", "free"))
            variable.assign(np.abs(values) + 0.5 if positive else values * (0.05 if key.endswith("scores") else 1.0))
        info = patch_file.save_patch(
            folder / f"{name}.safetensors", patched, backbone, task=name, labels=["cat", "dog", "owl"], dropout=0.25
        )
        if patched.spec.shares_head:
            patch_file.save_head(folder / "heads", patched, ["cat", "dog", "owl"])
        if info.factors:
            factor_file.save_factors(folder / "factors", patched, info.fingerprint)
        logits[name] = np.array(patched.model(images.astype("float32"))).tolist()
    (folder / "logits.json").write_text(json.dumps({"images": images.tolist(), "logits": logits}) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
