"""Files of Keras with layers of k4p1 are read by whoever imported k4p1."""

import re
import subprocess
import sys

import keras
import numpy as np
import pytest

import k4p1
from k4p1 import keras_registration
from k4p1.patches.apply import apply_patches
from k4p1.patches.fold import fold
from k4p1.patches.inference import inference_model

READ = """
{imports}
import numpy as np
model = keras.models.load_model({path!r})
np.save({answer!r}, model(np.load({images!r}), training=False))
"""


def test_every_registered_layer_is_listed_with_its_module():
    import pathlib

    found = {}
    for path in pathlib.Path(k4p1.__file__).parent.rglob("*.py"):
        module = ".".join(("k4p1", *path.relative_to(pathlib.Path(k4p1.__file__).parent).with_suffix("").parts))
        text = path.read_text(encoding="utf-8")
        for name in re.findall(r"register_keras_serializable\([^)]*\)\nclass (\w+)", text):
            found[name] = module
    assert found == keras_registration.LAYERS


@pytest.mark.processes
@pytest.mark.parametrize("imports", ["import k4p1, keras", "import keras, k4p1", "import k4p1, tensorflow, keras"])
def test_a_task_model_is_read_in_a_new_process(imports, small_backbone, images, tmp_path):
    patched = apply_patches(small_backbone, "parallel_adapter+mask+scale_bias+head", classes=3, image_size=16)
    check(patched.model, imports, images, tmp_path)


@pytest.mark.processes
def test_a_folded_model_is_read_with_keras_alone(small_backbone, images, tmp_path):
    patched = apply_patches(small_backbone, "parallel_adapter+scale_bias+head", classes=3, image_size=16)
    for model in (fold(patched.model), inference_model(patched.model).model):
        check(model, "import keras", images, tmp_path)


def check(model, imports, images, folder):
    model.save(folder / "model.keras")
    np.save(folder / "images.npy", images)
    names = {"path": "model.keras", "answer": "answer.npy", "images": "images.npy"}
    program = READ.format(imports=imports, **{what: str(folder / name) for what, name in names.items()})
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    np.testing.assert_allclose(np.load(folder / "answer.npy"), keras.ops.convert_to_numpy(model(images)), atol=1e-5)


def test_only_public_names_are_listed():
    assert set(dir(k4p1)) == {*k4p1.__all__, "__version__"}
    for name in k4p1.__all__:
        assert callable(getattr(k4p1, name))
