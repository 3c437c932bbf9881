"""Counts and values of NetTailor that follow without training."""

import pytest

from k4p1 import backbones, errors
from k4p1.patches.apply import apply_patches
from k4p1.patches.patched_layer import STATISTICS, TRAINED
from k4p1.patches.tailored import complexity, paths


def tailored(backbone, spec, image_size):
    return apply_patches(backbone, f"{spec}+head", classes=10, image_size=image_size)


def proxies(patched):
    network = patched.rewiring
    found = [path for path in network.paths if not path.is_main]
    return len(found), sum(network.costs[path].parameters for path in found)


@pytest.fixture(scope="module")
def resnet34():
    return backbones.resnet34()


@pytest.fixture(scope="module")
def k3(resnet34):
    return tailored(resnet34, "nettailor(k=3)", 224)


@pytest.mark.slow
def test_resnet34_has_the_papers_parameters(k3):
    facts = k3.rewiring.facts()
    assert facts["backbone_parameters"] == 21_284_672
    assert facts["live_parameters"] == 21_284_672 + 2_750_208
    assert facts["blocks"] == facts["live_blocks"] == 16


PAPERS_STEM = 56 * 56 * 64 * (7 * 7 * 3 + 2)  # its convolution counted at the size that pooling leaves, not at 112 x 112


def test_resnet34_has_the_papers_flops_once_the_stem_is_counted_as_there(k3):
    whole = k3.rewiring.whole_cost().flops
    stem = 112 * 112 * 64 * (7 * 7 * 3 + 2)
    assert k3.rewiring.rest.flops == stem
    assert whole == 3_670_725_632
    assert whole - stem + PAPERS_STEM == pytest.approx(3.581e9, rel=2e-4)


@pytest.mark.parametrize(("k", "count"), [("1", (16, 1_092_992)), ("5", (70, 4_083_200)), ("dense", (136, 6_826_752))])
@pytest.mark.slow
def test_proxies_of_resnet34(resnet34, k, count):
    assert proxies(tailored(resnet34, f"nettailor(k={k})", 224)) == count


def test_three_skips_of_resnet34(k3):
    assert proxies(k3) == (45, 2_750_208)


@pytest.fixture(scope="module")
def share(k3):
    return complexity.shares({path: cost.flops for path, cost in k3.rewiring.costs.items()}, PAPERS_STEM)


@pytest.mark.parametrize(
    ("where", "penalty", "value"),
    [
        ("start", "paper", 0.846),
        ("start", "released", 0.704),
        ("start", "independent", 0.864),
        ("uniform", "paper", -0.372),
        ("spread over proxies", "paper", -0.578),
        ("spread over proxies", "independent", 0.026),
        ("nearest proxy", "paper", 0.053),
        ("nearest proxy", "independent", 0.053),
    ],
)
def test_expected_complexity_of_resnet34(k3, share, where, penalty, value):
    network = k3.rewiring
    attention = {
        "start": network.attention_now(),
        "uniform": {p: 1 / len(network.into[p.node]) for p in network.paths},
        "spread over proxies": {p: (not p.is_main) / (len(network.into[p.node]) - 1) for p in network.paths},
        "nearest proxy": {p: float(not p.is_main and p.source == p.node - 1) for p in network.paths},
    }[where]
    assert float(complexity.expected(attention, share, 16, penalty)) == pytest.approx(value, abs=6e-4)


def test_attention_starts_at_the_main_path(k3):
    start = k3.rewiring.attention_now()
    mains = [start[paths.Path(node, node - 1, True)] for node in (1, 2, 3)]
    assert mains == pytest.approx([0.982, 0.965, 0.948], abs=5e-4)


@pytest.mark.parametrize(
    ("network", "image_size", "spec", "parameters", "multiply_adds", "count"),
    [
        (lambda: backbones.cifar_resnet(depth=20), 32, "nettailor", 269_072, 40.9e6, (24, 34_176)),
        (lambda: backbones.cifar_resnet(depth=56), 32, "nettailor(group=3)", 852_368, 126.6e6, (24, 34_176)),
        pytest.param(
            *(lambda: backbones.cifar_resnet(depth=56), 32, "nettailor", 852_368, 126.6e6, (78, 134_976)),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            *(lambda: backbones.cifar_resnet(depth=56), 32, "nettailor(k=1)", 852_368, 126.6e6, (27, 47_840)),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_residual_nets_for_small_images(network, image_size, spec, parameters, multiply_adds, count):
    patched = tailored(network(), spec, image_size)
    whole = patched.rewiring.whole_cost()
    assert whole.parameters == parameters
    assert whole.flops == pytest.approx(multiply_adds, rel=2e-3)
    assert proxies(patched) == count


def test_mobilenet_v2_cannot_lose_its_last_convolution():
    patched = tailored(backbones.mobilenet_v2(width=0.35), "nettailor(k=2)", 96)
    owned = [p for p in patched.owned() if p.kind != "head" and "attention" not in p.key]
    assert proxies(patched)[0] == 33
    assert sum(p.size for p in owned if p.role in (TRAINED, STATISTICS)) == 42_656
    last, stem = 112 * 1280 + 2 * 1280, 3 * 3 * 3 * 16 + 2 * 16
    assert patched.rewiring.rest.parameters == last + stem
    assert last + 2 * 1280 == 148_480  # with its moving statistics


def test_an_unknown_penalty_is_refused(k3, share):
    with pytest.raises(errors.ConfigError, match="penalty of complexity 'papr'; did you mean 'paper'"):
        complexity.expected(k3.rewiring.attention_now(), share, 16, "papr")
