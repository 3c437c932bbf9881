"""Parameter counts that papers print, or that follow from them without training."""

import pytest

from k4p1.patches.apply import apply_patches
from k4p1.patches.patched_layer import FIXED, STATISTICS, TRAINED
from k4p1.patches.patched_model import PRIVATE, SHARED

IMAGENET = 1000


def private(backbone, spec, *roles, classes=2, image_size=96):
    """The private parameters of a spec beside its head."""
    patched = apply_patches(backbone, spec, classes=classes, image_size=image_size)
    return sum(p.size for p in patched.parameters if p.owner == PRIVATE and p.kind != "head" and p.role in roles)


def whole_net(backbone, classes):
    return sum(v.size for v in backbone.tensors().values()) + (backbone.features + 1) * classes


def test_mobilenet_v2_has_17056_channels_with_scale_bias_and_statistics(mobilenet):
    channels = 17_056
    assert private(mobilenet, "scale_bias", TRAINED) == 2 * channels == 34_112  # K4P1: 34K
    assert private(mobilenet, "scale_bias", STATISTICS) == 2 * channels


@pytest.mark.parametrize(
    ("spec", "trained", "statistics"),
    [
        ("scale_bias(statistics=frozen)", 34_112, 0),
        ("scale_bias(affine=frozen)", 0, 34_112),
        ("depthwise", 64_224, 0),
        ("scale_bias+depthwise", 34_112 + 64_224, 34_112),
        ("scale_bias(statistics=frozen)+depthwise", 34_112 + 64_224, 0),
        ("head", 0, 0),
        ("none", 0, 0),
        ("full", 2_257_984 - 34_112, 34_112),
    ],
)
def test_mobilenet_v2(mobilenet, spec, trained, statistics):
    assert private(mobilenet, spec, TRAINED) == trained
    assert private(mobilenet, spec, STATISTICS) == statistics
    assert private(mobilenet, spec, FIXED) == 0


def test_mobilenet_v2_depthwise_patch_is_under_3_percent(mobilenet):
    assert private(mobilenet, "depthwise", TRAINED) < 0.03 * whole_net(mobilenet, IMAGENET)


def test_mobilenet_v2_whole_net(mobilenet):
    assert whole_net(mobilenet, IMAGENET) == 3_538_984
    assert pytest.approx(17.7e6, rel=1e-2) == 5 * 3_538_984  # K4P1, Table 5: five independent nets


def test_table_5_of_five_scale_and_bias_patches(mobilenet):
    """One net and four more patches: the first resolution's scale and bias are those of the net."""
    net = whole_net(mobilenet, IMAGENET)
    gamma_beta = private(mobilenet, "scale_bias", TRAINED)
    with_statistics = private(mobilenet, "scale_bias", TRAINED, STATISTICS)
    assert net + 4 * gamma_beta == 3_675_432  # K4P1, Table 5: 3.7M
    assert net + 4 * with_statistics == 3_811_880


def test_mobilenet_v2_shares_all_but_what_a_patch_replaces(mobilenet):
    patched = apply_patches(mobilenet, "scale_bias+depthwise+head", classes=10, image_size=96)
    whole = whole_net(mobilenet, 10)
    owned = patched.count(PRIVATE, TRAINED, STATISTICS)
    assert patched.count(SHARED, TRAINED, FIXED, STATISTICS) + owned == whole
    assert patched.model.count_params() == whole


def test_inception_v3_has_17216_channels_and_the_patch_adds_their_scales(inception):
    channels = 17_216
    assert not any(key.endswith("/gamma") for key in inception.tensors())
    patched = apply_patches(inception, "scale_bias", classes=2, image_size=96)
    by_name = dict.fromkeys(("gamma", "beta", "moving_mean", "moving_variance"), 0)
    for key, variable in patched.private().items():
        by_name[key.rsplit("/", 1)[1]] += variable.shape[0]
    assert by_name == dict.fromkeys(by_name, channels)
    assert patched.count(PRIVATE, TRAINED) == 34_432
    assert 2 * (channels + 896) == pytest.approx(36e3, rel=1e-2)  # K4P1's 36K counts the auxiliary head's channels, too


@pytest.mark.parametrize(("classes", "parameters"), [(102, 208_998), (196, 401_604), (100, 204_900)])
def test_heads_on_2048_features(inception, classes, parameters):
    assert inception.features == 2_048
    patched = apply_patches(inception, "head", classes=classes, image_size=96)
    assert patched.count(PRIVATE, TRAINED) == parameters
    assert patched.count(PRIVATE, STATISTICS) == 0


def test_a_random_head_is_private_and_fixed(small_backbone):
    patched = apply_patches(small_backbone, "head(mode=random)", classes=3, image_size=16)
    assert patched.count(PRIVATE, FIXED) == (8 + 1) * 3
    assert patched.count(PRIVATE, TRAINED) == 0


def test_a_network_without_batch_normalisation_gets_a_scale_and_a_bias_per_channel(plain_backbone):
    patched = apply_patches(plain_backbone, "scale_bias", classes=3, image_size=16)
    assert patched.count(PRIVATE, TRAINED) == 2 * (6 + 6 + 8)
    assert patched.count(PRIVATE, STATISTICS) == 0


@pytest.mark.parametrize(
    ("shared_trained", "trained", "fixed", "statistics"), [(True, True, False, True), (False, False, True, False)]
)
def test_shared_parameters_by_role(small_backbone, shared_trained, trained, fixed, statistics):
    patched = apply_patches(small_backbone, "none", classes=3, image_size=16, shared_trained=shared_trained)
    weights = 3 * 3 * 3 * 6 + 3 * 3 * 6 + 6 * 8 + 2 * (6 + 6 + 8) + (8 + 1) * 3
    moving = 2 * (6 + 6 + 8)
    assert patched.count(SHARED, TRAINED) == weights * trained
    assert patched.count(SHARED, FIXED) == (weights + moving) * fixed
    assert patched.count(SHARED, STATISTICS) == moving * statistics
