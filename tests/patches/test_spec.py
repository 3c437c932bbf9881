"""The grammar of patch specs, and what a user reads after a mistake in one."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from k4p1 import errors
from k4p1.patches import (
    Dan,
    Depthwise,
    Full,
    Head,
    Lora,
    Mask,
    PackNet,
    ParallelAdapter,
    PatchSpec,
    ScaleBias,
    SeriesAdapter,
    known_kinds,
)

PATTERNS = st.text(alphabet="abz019_*?[]|/.-", min_size=1, max_size=12)
STAGES = st.sampled_from(["all", "early", "mid", "late"])
POLICIES = st.sampled_from([("private", "private"), ("private", "frozen"), ("frozen", "private")])
MOMENTA = st.floats(0.0, 1.0, exclude_max=True)


@st.composite
def specs(draw):
    """Any valid spec: every kind with every option."""
    where = st.fixed_dictionaries({"layers": PATTERNS, "stage": STAGES})
    statistics, affine = draw(POLICIES)
    options = {"momentum": draw(MOMENTA), "recalibrate": draw(st.booleans())}
    head = Head(mode=draw(st.sampled_from(["trained", "random", "shared"])))
    if draw(st.booleans()):
        candidates = [Full(**options, **draw(where)), head]
    else:
        scale_bias = ScaleBias(statistics=statistics, affine=affine, **options, **draw(where))
        adapter = {
            "block": draw(st.sampled_from(["all", "second"])),
            "rank": draw(st.integers(0, 99)),
            "init_std": draw(st.floats(0.0, 1.0)),
            "dropout": draw(MOMENTA),
            "dropout_block": draw(st.sampled_from(["all", "second"])),
        }
        mask = Mask(
            mask_type=draw(st.sampled_from(["binary", "ternary"])),
            threshold=draw(st.floats(1e-6, 1.0)),
            init_score=draw(st.floats(-1.0, 1.0)),
            gradient=draw(st.sampled_from(["plain", "scaled"])),
            **draw(where),
        )
        candidates = [
            scale_bias,
            Depthwise(**draw(where)),
            ParallelAdapter(**adapter, **draw(where)),
            SeriesAdapter(**adapter, **options, **draw(where)),
            mask,
            Lora(rank=draw(st.integers(1, 99)), alpha=draw(st.floats(1e-3, 99.0)), **draw(where)),
            Dan(**draw(where)),
            PackNet(**draw(where)),
            head,
        ]
    return PatchSpec(tuple(draw(st.permutations([kind for kind in candidates if draw(st.booleans())]))))


@settings(max_examples=200, deadline=None)
@given(specs())
def test_text_of_a_spec_parses_to_the_same_spec(spec):
    assert PatchSpec.parse(str(spec)) == spec


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet="head(mode=sr)+,scale_biu 0.9", max_size=40))
def test_any_text_is_a_spec_or_a_patch_error(text):
    try:
        spec = PatchSpec.parse(text)
    except errors.PatchError as e:
        assert "\n" not in str(e)
    else:
        assert PatchSpec.parse(str(spec)) == spec


@pytest.mark.parametrize(
    ("text", "kinds"),
    [
        ("none", ()),
        (" none ", ()),
        ("head", (Head(),)),
        ("head()", (Head(),)),
        (
            "scale_bias(statistics=frozen)+depthwise(stage=late)+head",
            (ScaleBias(statistics="frozen"), Depthwise(stage="late"), Head()),
        ),
        (" scale_bias ( momentum = 0.9 , recalibrate = False ) ", (ScaleBias(momentum=0.9, recalibrate=False),)),
        ("full(layers=block_*|stem)+head(mode=random)", (Full(layers="block_*|stem"), Head(mode="random"))),
    ],
)
def test_parse(text, kinds):
    assert PatchSpec.parse(text).kinds == kinds


def test_parse_leaves_a_spec_as_it_is():
    spec = PatchSpec((Head(),))
    assert PatchSpec.parse(spec) is spec


@pytest.mark.parametrize(
    ("text", "shortest"),
    [
        ("none", "none"),
        ("scale_bias(statistics=private, momentum=0.990)", "scale_bias"),
        ("head(mode=random)+scale_bias(recalibrate=FALSE)", "head(mode=random)+scale_bias(recalibrate=false)"),
    ],
)
def test_str_leaves_defaults_out(text, shortest):
    assert str(PatchSpec.parse(text)) == shortest


def test_options_hold_the_defaults_too():
    options = PatchSpec.parse("scale_bias(affine=frozen)+head").options()
    assert options == {
        "scale_bias": {
            "layers": "*",
            "stage": "all",
            "where": "normalised",
            "statistics": "private",
            "affine": "frozen",
            "momentum": 0.99,
            "recalibrate": True,
        },
        "head": {"layers": "*", "stage": "all", "mode": "trained"},
    }


def test_get_finds_a_kind_by_name():
    spec = PatchSpec.parse("depthwise+head(mode=random)")
    assert spec.get("head") == Head(mode="random")
    assert spec.get("scale_bias") is None


def test_every_kind_is_registered_and_says_what_it_is():
    assert {"depthwise", "full", "head", "scale_bias"} <= set(known_kinds())
    assert all(kind.summary and kind.__doc__ for kind in known_kinds().values())


MISTAKES = {
    "scale_bais": ["unknown patch kind 'scale_bais'", "did you mean 'scale_bias'?", "depthwise, full, head"],
    "Head": ["unknown patch kind 'Head'", "did you mean 'head'?"],
    "qqqq": ["unknown patch kind 'qqqq'; Known:"],
    "head+none": ["unknown patch kind 'none'"],
    "scale_bias(statistic=frozen)": ["option of patch kind 'scale_bias' 'statistic'", "did you mean 'statistics'?"],
    "depthwise(momentum=0.9)": ["unknown option of patch kind 'depthwise' 'momentum'", "layers, stage"],
    "scale_bias(statistics=frozn)": ["scale_bias(statistics=frozn)", "did you mean 'frozen'?", "Allowed: private, frozen"],
    "scale_bias(affine=scales)": ["did you mean 'scale'?"],
    "depthwise(stage=lat)": ["depthwise(stage=lat)", "did you mean 'late'?", "all, early, mid, late"],
    "head(mode=randm)": ["did you mean 'random'?", "trained, random, shared"],
    "head(stage=late)": ["the head is one layer behind the network"],
    "scale_bias(momentum=high)": ["scale_bias(momentum=high): expected a number"],
    "scale_bias(momentum=1.0)": ["scale_bias(momentum=1.0): expected a number in [0, 1)"],
    "scale_bias(momentum=-0.1)": ["expected a number in [0, 1)"],
    "scale_bias(momentum=nan)": ["expected a number"],
    "full(momentum=1.5)": ["full(momentum=1.5): expected a number in [0, 1)"],
    "full(recalibrate=maybe)": ["full(recalibrate=maybe): expected true or false"],
    "scale_bias(statistics=frozen,affine=frozen)": ["owns nothing", "leave scale_bias out"],
    "head+scale_bias+head(mode=random)": ["'head' is given twice", "join its options in one term"],
    "full+depthwise": ["'full' already makes every parameter private", "take 'depthwise' out"],
    "": ["cannot read ''", "name(option=value)+name"],
    "head+": ["cannot read ''"],
    "scale_bias(": ["cannot read 'scale_bias('"],
    "scale bias": ["cannot read 'scale bias'"],
    "head(mode)": ["cannot read option 'mode'", "write option=value"],
    "head(mode=)": ["cannot read option 'mode='"],
    "head(mode=random,)": ["cannot read option ''"],
    "head(mode=random,mode=shared)": ["option 'mode' is given twice"],
}


@pytest.mark.parametrize("text", MISTAKES, ids=repr)
def test_mistakes(text):
    with pytest.raises(errors.PatchError) as caught:
        PatchSpec.parse(text)
    message = str(caught.value)
    assert "\n" not in message
    for part in MISTAKES[text]:
        assert part in message


@pytest.mark.parametrize("given_value", [None, 3, ["head"]])
def test_a_spec_is_text(given_value):
    with pytest.raises(errors.PatchError, match="a patch spec is text such as 'scale_bias\\+head'; got"):
        PatchSpec.parse(given_value)


def test_patch_errors_are_value_errors_with_exit_code_1():
    with pytest.raises(ValueError, match="unknown patch kind") as caught:
        PatchSpec.parse("nothing")
    assert caught.value.exit_code == 1
