"""NetTailor as a patch kind: what is frozen, what a pruned patch holds, and what is left of a network at export."""

import dataclasses
import pathlib

import keras
import numpy as np
import pytest
import tensorflow as tf

from k4p1 import backbones, errors
from k4p1.patches import PatchSpec
from k4p1.patches.apply import apply_patches
from k4p1.patches.fold import fold
from k4p1.patches.own_layer import OwnLayer
from k4p1.patches.patch_file import load_patch, save_patch
from k4p1.patches.patched_layer import STATISTICS, TRAINED, PatchedLayer
from k4p1.patches.patched_model import PRIVATE, SHARED
from k4p1.patches.tailored import paths, pruning
from k4p1.serving.patch_set import PatchSet

LABELS = ("cat", "dog", "owl")
IMAGES = np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3)).astype("float32")


def with_random_values(variables, seed=0):
    random = np.random.default_rng(seed)
    for key, variable in variables.items():
        values = random.normal(0.0, 0.3, variable.shape)
        variable.assign(0.5 + np.abs(values) if key.endswith(("gamma", "variance")) else values)


@pytest.fixture(scope="module")
def backbone():
    made = backbones.cifar_resnet(depth=14)  # 6 blocks
    with_random_values(made.variables())
    return made


def tailored(backbone, spec="nettailor(k=3)+head"):
    patched = apply_patches(backbone, spec, classes=3, image_size=16, seed=1)
    with_random_values(patched.private())
    return patched


@pytest.fixture(scope="module")
def student(backbone):
    return tailored(backbone)


LIVE = ("1.m.0|2.1|3.m.1.2|5.3|6.m.5", "1.m|2.1|3.m|5.2|6.m", "1.m|3.0|4.m.1|6.3.4", "2.0|4.2|6.4")


def pruned(backbone, student, live):
    spec = pruning.pruned_spec(student.spec, paths.from_text(live))
    made = apply_patches(backbone, spec, classes=3, image_size=16)
    pruning.prune_values(student, made)
    return made


def by_hand(backbone, patched, images):
    """The network of the equation, layer by layer in numpy order."""
    network = patched.rewiring
    private = {key: np.array(v) for key, v in patched.private().items()}
    names = {block.source for block in network.blocks} | {block.end for block in network.blocks}
    mean, deviation = np.array([123.675, 116.28, 103.53]), np.array([58.395, 57.12, 57.375])

    def part(source, end):
        start = backbone.model.get_layer(source).output
        return keras.Model(start, backbone.model.get_layer(end).output)

    assert names
    stem = keras.Model(backbone.model.input, backbone.model.get_layer(network.blocks[0].source).output)
    nodes = {0: np.array(stem((images - mean) / deviation))}
    for node, into in network.into.items():
        w = private[f"block_{node}/nettailor/attention"]
        a = np.exp(w) / np.exp(w).sum()
        z = 0.0
        for rank, path in enumerate(into):
            if path.is_main:
                block = network.blocks[node - 1]
                way = np.array(part(network.blocks[node - 1].source, block.end)(nodes[path.source]))
            else:
                x, name = nodes[path.source], f"proxy_{path.source}_{node}/nettailor"
                size = 16 // 2 ** ((node - 1) // 2)
                ratio = x.shape[1] // size
                if ratio > 1:
                    padded = np.pad(x, [(0, 0), (ratio // 2, ratio // 2), (ratio // 2, ratio // 2), (0, 0)])
                    starts = range(0, x.shape[1], ratio)
                    k = ratio + 1
                    rows = [[padded[:, i : i + k, j : j + k].max((1, 2)) for j in starts] for i in starts]
                    x = np.array(rows).transpose(2, 0, 1, 3)
                x = x @ private[f"{name}/kernel"][0, 0]
                sd = np.sqrt(private[f"{name}/moving_variance"] + 1e-5)
                way = private[f"{name}/gamma"] * (x - private[f"{name}/moving_mean"]) / sd + private[f"{name}/beta"]
            z = z + a[rank] * way
        nodes[node] = np.maximum(z, 0.0)
    features = nodes[len(network.blocks)].mean((1, 2))
    return features @ private["head/head/kernel"] + private["head/head/bias"]


@pytest.mark.parametrize("live", [None, LIVE[0]])
def test_it_computes_the_equation(backbone, student, live):
    patched = student if live is None else pruned(backbone, student, live)
    np.testing.assert_allclose(patched.model(IMAGES), by_hand(backbone, patched, IMAGES), rtol=1e-4, atol=1e-4)


def train(patched, steps=3):
    model = patched.model
    for _ in range(steps):
        with tf.GradientTape() as tape:
            outputs = model(IMAGES, training=True)
            loss = keras.ops.mean(keras.losses.sparse_categorical_crossentropy(np.arange(4) % 3, outputs, True))
        variables = model.trainable_variables
        for variable, gradient in zip(variables, tape.gradient(loss, [v.value for v in variables]), strict=True):
            variable.assign_sub(0.1 * gradient)


@pytest.mark.parametrize("spec", ["nettailor(k=2)+head", "nettailor(k=1,proxy=bottleneck)+scale_bias(affine=frozen)+head"])
def test_only_private_parameters_move_and_frozen_statistics_are_frozen(backbone, spec):
    before = backbone.tensors()
    patched = tailored(backbone, spec)
    values = {p.key: np.array(p.variable) for p in patched.parameters}
    train(patched)
    for key, value in backbone.tensors().items():
        np.testing.assert_array_equal(value, before[key], err_msg=key)
    for p in patched.parameters:
        moved = not np.array_equal(values[p.key], np.array(p.variable))
        assert moved == (p.owner == PRIVATE), p.key
    moving = {p.key for p in patched.owned() if p.role == STATISTICS}
    assert any(key.startswith("stage1_") for key in moving) == ("scale_bias" in spec)
    assert "proxy_0_1/nettailor/moving_mean" in moving


@pytest.mark.parametrize("live", LIVE)
@pytest.mark.slow
def test_the_exported_network_has_no_gates_and_no_dead_blocks(backbone, student, live):
    patched = pruned(backbone, student, live)
    plain = fold(patched.model)
    np.testing.assert_allclose(plain(IMAGES), patched.model(IMAGES), rtol=1e-5, atol=1e-5)
    assert not any(isinstance(layer, (OwnLayer, PatchedLayer)) for layer in plain._flatten_layers())
    names = {layer.name for layer in plain._flatten_layers()}
    for number, block in enumerate(patched.rewiring.blocks, 1):
        is_live = paths.Path(number, number - 1, True) in patched.rewiring.paths
        assert (block.end in names) == is_live
    held = patched.rewiring.live_cost().parameters
    proxies = [p for p in patched.rewiring.paths if not p.is_main]
    norms = sum(2 * v.shape[0] for k, v in patched.private().items() if k.endswith("moving_mean"))
    statistics = sum(np.prod(v.shape) for v in plain.variables if v.name.startswith("moving_"))
    biases = sum(patched.private()[f"proxy_{p.source}_{p.node}/nettailor/beta"].shape[0] for p in proxies)
    head = 64 * 3 + 3
    assert sum(int(np.prod(v.shape)) for v in plain.variables) == held - norms + biases + statistics + head


@pytest.mark.slow
def test_the_file_shrinks_with_each_pruned_proxy_and_loads(backbone, student, tmp_path):
    attention = student.rewiring.attention_now()
    live, sizes = list(student.rewiring.paths), []
    for number, proxy in enumerate(sorted((p for p in attention if not p.is_main), key=attention.get)):
        live.remove(proxy)
        made = pruned(backbone, student, paths.to_text(live))
        path = tmp_path / f"{number}.safetensors"
        save_patch(path, made, backbone, task="t", labels=LABELS)
        sizes.append(path.stat().st_size)
        if number in (0, 7):
            again = load_patch(path, backbone)
            np.testing.assert_array_equal(again.model(IMAGES), made.model(IMAGES))
            assert again.rewiring.paths == tuple(live)
        if number == 7:
            break
    whole = tmp_path / "whole.safetensors"
    save_patch(whole, student, backbone, task="t", labels=LABELS)
    sizes.insert(0, whole.stat().st_size)
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == len(sizes)


def test_a_pruned_patch_holds_what_is_live_alone(backbone, student):
    patched = pruned(backbone, student, LIVE[1])
    keys = {key.split("/")[0] for key in patched.private()}
    assert keys == {"block_1", "block_2", "block_5", "block_6", "proxy_1_2", "proxy_2_5", "head"}
    shared = {p.key for p in patched.parameters if p.owner == SHARED}
    assert not any(key.startswith(("stage1_block2", "stage2", "stage3_block1")) for key in shared)
    a_private = apply_patches(
        backbone, f"nettailor(live={LIVE[1]})+scale_bias(affine=frozen)+head", classes=3, image_size=16
    )
    statistics = {p.key for p in a_private.owned() if p.kind == "scale_bias"}
    assert statistics and not any(key.startswith("stage1_block2") for key in statistics)


def test_pruned_attention_is_renormalised(backbone, student):
    before, after = student.rewiring.attention_now(), pruned(backbone, student, LIVE[0]).rewiring.attention_now()
    kept = [paths.Path(3, 2, True), paths.Path(3, 1, False), paths.Path(3, 2, False)]
    whole = sum(before[path] for path in kept)
    for path in kept:
        assert after[path] == pytest.approx(before[path] / whole, rel=1e-5)


def test_a_set_of_tailored_tasks_on_one_backbone(backbone, student, tmp_path):
    tasks = PatchSet(backbone)
    made = {name: pruned(backbone, student, live) for name, live in (("lean", LIVE[3]), ("wide", LIVE[0]))}
    for name, patched in made.items():
        save_patch(tmp_path / f"{name}.safetensors", patched, backbone, task=name, labels=LABELS)
        tasks.add(tmp_path / f"{name}.safetensors")
    for name, patched in made.items():
        np.testing.assert_array_equal(tasks(name, IMAGES), np.array(patched.model(IMAGES)))
        tasks.merge(name)
        np.testing.assert_allclose(tasks(name, IMAGES), np.array(patched.model(IMAGES)), rtol=1e-5, atol=1e-5)
    with pytest.raises(errors.PatchError, match="different patch specs"):
        tasks.combine("both", {"lean": 0.5, "wide": 0.5})


def test_live_multiply_adds_fall_with_what_is_gone(backbone, student):
    lean, wide = (pruned(backbone, student, live).rewiring.facts() for live in (LIVE[3], LIVE[0]))
    assert (lean["live_blocks"], lean["live_proxies"]) == (0, 3)
    assert lean["live_multiply_adds"] < wide["live_multiply_adds"] < wide["backbone_multiply_adds"]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("nettailor(k=0)", "k=0.*at least 1, or 'dense'"),
        ("nettailor(k=x)", "k=x.*at least 1, or 'dense'"),
        ("nettailor(group=0)", "group=0.*at least 1"),
        ("nettailor(proxy=basik)", "did you mean 'basic'"),
        ("nettailor(stage=late)", "concerns the whole network"),
        ("nettailor+full", "'nettailor' leaves the blocks shared, 'full' makes them private"),
        ("nettailor(live=1.m|3.m)", "no way is left from the stem to the head: nothing leads to node 2"),
        ("nettailor(k=1,live=1.m|6.0)", "'proxy 0->6' is no path of 6 blocks with k=1"),
        ("nettailor(blocks=*_conv2)", "other ways pass by 'stage1_block1_conv2'"),
    ],
)
def test_bad_specs_are_refused(backbone, spec, message):
    with pytest.raises(errors.PatchError, match=message):
        apply_patches(backbone, f"{spec}+head", classes=3, image_size=16)


def test_specs_round_trip():
    spec = PatchSpec.parse("nettailor(k=dense,live=1.m.0|2.1)+head")
    assert PatchSpec.parse(str(spec)) == spec
    assert str(PatchSpec((dataclasses.replace(spec.kinds[0], live="", k=2),))) == "nettailor(k=2)"


def test_keras_itself_saves_and_reads_it(student, tmp_path: pathlib.Path):
    student.model.save(tmp_path / "m.keras")
    again = keras.models.load_model(tmp_path / "m.keras")
    np.testing.assert_allclose(again(IMAGES), student.model(IMAGES), rtol=1e-5, atol=1e-5)


def test_linear_blocks_are_pooled_without_a_border(backbone):
    pooling = apply_patches(backbone, "nettailor+head", classes=3, image_size=16).model.get_layer("nettailor_pool_2_2")
    x = -np.ones((1, 4, 4, 2), "float32")
    np.testing.assert_array_equal(pooling(x), -np.ones((1, 2, 2, 2)))


def test_statistics_of_proxies_move_once_a_step(backbone):
    patched = apply_patches(backbone, "nettailor(k=1)+head", classes=3, image_size=16)
    tensors = {"x": patched.rewiring.local(1)}
    both = keras.Model(patched.model.input, {"logits": patched.model.output, **tensors})
    before = {p.key: np.array(p.variable) for p in patched.owned() if p.role == STATISTICS}
    stem = keras.Model(patched.model.input, [patched.rewiring.nodes[0], patched.rewiring.nodes[1]])
    x, node = (np.array(one) for one in stem(IMAGES, training=True))
    for p in patched.owned():
        if p.key in before:
            p.variable.assign(before[p.key])
    kernel = np.array(patched.private()["proxy_0_1/nettailor/kernel"])[0, 0]
    outputs = both(IMAGES, training=True)
    np.testing.assert_allclose(outputs["x"], node, rtol=1e-5, atol=1e-5)  # the local branch has the same values
    moved = np.array(patched.private()["proxy_0_1/nettailor/moving_mean"])
    np.testing.assert_allclose(moved, 0.1 * (x @ kernel).mean((0, 1, 2)), rtol=1e-3, atol=1e-6)
    assert {p.role for p in patched.owned()} == {TRAINED, STATISTICS}
