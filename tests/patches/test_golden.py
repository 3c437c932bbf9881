"""Files of released format versions load for ever, and compute what they did."""

import json
import pathlib

import numpy as np
import pytest

from k4p1 import backbones
from k4p1.patches import PatchSpec, known_kinds
from k4p1.patches.patch_file import load_patch, read_info

FOLDERS = sorted((pathlib.Path(__file__).parents[1] / "golden").glob("version_*"))
PATCHES = [pytest.param(f, p, id=f"{f.name}-{p.stem}") for f in FOLDERS for p in sorted(f.glob("*.safetensors"))]
PATCHES = [patch for patch in PATCHES if patch.values[1].stem != "backbone"]


def spec_of(path) -> PatchSpec:
    return PatchSpec.parse("none" if path.stem == "backbone" else read_info(path).spec)


@pytest.mark.parametrize(("folder", "path"), PATCHES)
def test_a_golden_patch_gives_its_logits(folder, path):
    known = json.loads((folder / "logits.json").read_text(encoding="utf-8"))
    backbone = backbones.load(folder / "backbone.safetensors")
    patched = load_patch(path, backbone, heads=folder / "heads", factors=folder / "factors")
    logits = patched.model(np.array(known["images"], "float32"))
    np.testing.assert_allclose(logits, known["logits"][path.stem], rtol=1e-4, atol=1e-4)


def test_version_1_has_every_kind():
    assert FOLDERS[0].name == "version_1"
    held = {kind.name for path in FOLDERS[0].glob("*.safetensors") for kind in spec_of(path).kinds}
    assert held == set(known_kinds())
