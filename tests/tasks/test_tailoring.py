"""Loss terms of tailored networks: complexity, and what a teacher's blocks say."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from k4p1 import backbones, errors
from k4p1.engine.groups import TRAINED, plan_groups
from k4p1.engine.pure import PureTask
from k4p1.patches.apply import apply_patches
from k4p1.patches.tailored import complexity
from k4p1.tasks import Task, attached_terms
from k4p1.tasks.distillation import Teacher
from k4p1.tasks.loss import TaskLoss, parse
from k4p1.tasks.objectives import CLASSIFICATION

LABELS = ("cat", "dog", "owl")
BATCH = {
    "inputs": tf.constant(np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3)), tf.float32),
    "label": tf.constant([0, 1, 2, 0]),
    "weight": tf.ones(4),
}


@pytest.fixture(scope="module")
def backbone():
    return backbones.cifar_resnet(depth=8)


@pytest.fixture(scope="module")
def teacher(backbone):
    patched = apply_patches(backbone, "full", classes=3, image_size=16, name="t", seed=3)
    for p in patched.owned():
        p.variable.assign(np.array(p.variable) * 1.1)
    return Teacher("t", patched, LABELS, backbone.fingerprint(), "teacher")


def attached(backbone, teacher, term, spec="nettailor(k=2)+head", labels=LABELS, size=16):
    patched = apply_patches(backbone, spec, classes=len(labels), image_size=size, seed=1)
    (one,) = parse(term, CLASSIFICATION, {"teacher": "teacher"})
    how = {"number": 0, "task": "digits", "labels": labels, "teachers": {"teacher": teacher}, "fingerprint": ""}
    return attached_terms.attach(patched, one.name, one.options, **how), one


def value_and_gradients(patched, term, made):
    """The term, its gradient by key, and the outputs of the model."""
    groups = plan_groups({"digits": patched})
    pure = PureTask("digits", patched, groups)
    vectors = {group.name: tf.constant(group.initial()) for group in groups}
    trained = [group for group in groups if group.role == TRAINED]
    with tf.GradientTape() as tape:
        watched = [vectors[group.name] for group in trained]
        tape.watch(watched)
        forward = pure.forward(vectors, BATCH["inputs"], training=True)
        found = TaskLoss([made], CLASSIFICATION, {0: term})(BATCH, forward.outputs)[made.name].value
    slopes = {}
    gradients = tape.gradient(found, watched, unconnected_gradients=tf.UnconnectedGradients.ZERO)
    for group, gradient in zip(trained, gradients, strict=True):
        slopes |= {key: np.abs(part).max() for key, part in group.packing.unpack_numpy(gradient.numpy()).items()}
    return float(found), slopes, forward.outputs


@pytest.mark.parametrize("penalty", ["paper", "independent"])
@pytest.mark.parametrize("cost", ["multiply_adds", "parameters"])
def test_the_complexity_term_is_the_expected_complexity(backbone, teacher, penalty, cost):
    (patched, term), made = attached(backbone, teacher, f"complexity(penalty={penalty},cost={cost})")
    value, slopes, _ = value_and_gradients(patched, term, made)
    network = patched.rewiring
    expected = complexity.expected(network.attention_now(), network.shares(cost), 3, penalty)
    assert value == pytest.approx(float(expected), rel=1e-5)
    assert {key for key, slope in slopes.items() if slope} == {f"block_{n}/nettailor/attention" for n in (1, 2, 3)}


def test_the_cost_of_a_block_can_be_its_time(backbone, teacher):
    (patched, term), _ = attached(backbone, teacher, "complexity(cost=milliseconds)")
    assert set(term.share) == set(patched.rewiring.paths)
    assert all(share > 0 for share in term.share.values())


def squares(patched, teacher, outputs, norm):
    """The distance to the teacher by the printed and the released formula."""
    model = teacher.patched.model
    inner = next(layer for layer in model.layers if isinstance(layer, keras.Model))
    names = [f"stage{stage}_block1_relu" for stage in (1, 2, 3)]
    nodes = keras.Model(inner.input, [inner.get_layer(name).output for name in names])
    scaled = model.get_layer("input_scaling")(BATCH["inputs"])
    pairs = [(outputs["logits"], model(BATCH["inputs"]))]
    pairs += [(outputs[f"node_{n}"], x) for n, x in enumerate(nodes(scaled), 1)]
    distances = [(np.array(mine) - np.array(theirs)) ** 2 for mine, theirs in pairs]
    return sum(d.mean() for d in distances) / 3 if norm == "mean" else sum(d.sum() for d in distances) / 4


@pytest.mark.parametrize("norm", ["mean", "sum"])
def test_it_compares_logits_and_every_node_with_the_teachers(backbone, teacher, norm):
    (patched, term), made = attached(backbone, teacher, f"block_distillation(gradient=end_to_end,norm={norm})")
    value, _, outputs = value_and_gradients(patched, term, made)
    assert value == pytest.approx(float(squares(patched, teacher, outputs, norm)), rel=1e-4)


def test_local_and_end_to_end_agree_in_value_and_differ_in_whom_they_reach(backbone, teacher):
    values, reached = {}, {}
    for gradient in ("local", "end_to_end"):
        (patched, term), made = attached(backbone, teacher, f"block_distillation(gradient={gradient})")
        values[gradient], _, _ = value_and_gradients(patched, term, made)
        distance = tf.reduce_mean
        pure = PureTask("digits", patched, plan_groups({"digits": patched}))
        vectors = {group.name: tf.constant(group.initial()) for group in pure.groups}
        trained = [group for group in pure.groups if group.role == TRAINED]
        with tf.GradientTape() as tape:
            tape.watch([vectors[group.name] for group in trained])
            last = distance(pure.forward(vectors, BATCH["inputs"], training=True).outputs["node_3"])
        slopes = tape.gradient(last, [vectors[g.name] for g in trained], unconnected_gradients="zero")
        reached[gradient] = {
            key.split("/")[0]
            for group, slope in zip(trained, slopes, strict=True)
            for key, part in group.packing.unpack_numpy(slope.numpy()).items()
            if np.abs(part).max() > 0
        }
    assert values["local"] == pytest.approx(values["end_to_end"], rel=1e-5)
    assert reached["local"] == {"block_3", "proxy_1_3", "proxy_2_3"}
    assert reached["local"] < reached["end_to_end"] and "proxy_0_1" in reached["end_to_end"]


def test_every_frozen_block_is_computed_once(backbone, teacher):
    (patched, _), _ = attached(backbone, teacher, "block_distillation(gradient=local)")
    calls = {}
    for node in (n for nodes in patched.training_model._nodes_by_depth.values() for n in nodes):
        calls[node.operation.name] = calls.get(node.operation.name, 0) + 1
    convolutions = {name: count for name, count in calls.items() if "_conv" in name}
    assert set(convolutions.values()) == {1}
    assert calls["nettailor_proxy_1_3"] == calls["nettailor_block_3"] == 2


@pytest.mark.parametrize(
    ("term", "changes", "message"),
    [
        ("complexity", {"spec": "head"}, "needs a tailored network, its patch is 'head'"),
        ("complexity(cost=bytes)", {}, "unknown cost of complexity 'bytes'"),
        ("complexity(penalty=papr)", {}, "did you mean 'paper'"),
        ("block_distillation(norm=max)", {}, "unknown norm of block_distillation 'max'"),
        ("block_distillation", {"labels": ("a", "b")}, "has 2 labels .*its teacher 't' 3"),
        ("block_distillation", {"size": 32}, "images of 32x32 pixels, its teacher of 16x16"),
    ],
)
def test_terms_that_do_not_fit_are_refused(backbone, teacher, term, changes, message):
    with pytest.raises(errors.ConfigError, match=message):
        attached(backbone, teacher, term, **changes)


def test_a_teacher_on_another_backbone_is_refused(teacher):
    with pytest.raises(
        errors.ConfigError, match="has no layer 'stage1_block2_relu'; the teacher must be trained on the same"
    ):
        attached(backbones.cifar_resnet(depth=14), teacher, "block_distillation")


def test_a_task_needs_a_teacher_for_it():
    with pytest.raises(errors.ConfigError, match="'block_distillation' has no teacher; give block_distillation"):
        Task(name="digits", data="embedded/digits", patch="nettailor+head", loss="block_distillation")
