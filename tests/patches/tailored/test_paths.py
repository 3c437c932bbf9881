"""Which paths of a pruned network are live."""

import pytest

from k4p1 import errors
from k4p1.patches.tailored import paths
from k4p1.patches.tailored.paths import Path


def kept(text):
    return paths.from_text(text)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("1.m|2.m|3.m", "1.m|2.m|3.m"),
        ("1.m|3.m.1", "1.m|3.1"),  # nothing leads to node 2, so block 3 has no input
        ("1.m|2.m|3.0", "3.0"),  # nothing reads node 2
        ("1.m|2.1|3.m.1", "1.m|2.1|3.m.1"),
    ],
)
def test_a_path_is_live_on_a_way_from_the_stem_to_the_head(given, expected):
    assert paths.to_text(paths.live(kept(given), 3)) == expected


def test_what_cuts_the_network_in_two_is_refused_with_the_place():
    with pytest.raises(errors.PatchError, match="nothing leads to node 2 or behind it"):
        paths.live(kept("1.m|3.m"), 3)
    with pytest.raises(errors.PatchError, match="nothing leads to node 1"):
        paths.live((), 3)


def test_pruning_takes_the_blocks_of_least_attention_and_weak_proxies():
    attention = {
        **{Path(node, node - 1, True): a for node, a in ((1, 0.9), (2, 0.1), (3, 0.6))},
        **{Path(2, 1, False): 0.8, Path(2, 0, False): 0.1, Path(1, 0, False): 0.05, Path(3, 2, False): 0.4},
    }
    removed = paths.least_attended(attention, 1)
    assert removed == (2,)
    assert paths.to_text(paths.prune(attention, 3, removed, threshold=0.1)) == "1.m|2.1|3.m.2"
    with pytest.raises(errors.PatchError, match="no way is left"):
        paths.prune(attention, 3, paths.least_attended(attention, 3), threshold=0.9)


def test_text_and_paths_are_inverse():
    every = paths.full(12, "dense")
    assert paths.from_text(paths.to_text(every)) == every
    assert len(every) == 12 + 12 * 13 // 2


@pytest.mark.parametrize("text", ["1", "1.x", "a.m", "1.m.m", "2.3", "0.m", "1.m||2.m"])
def test_bad_text_is_refused(text):
    with pytest.raises(errors.PatchError, match=r"cannot read|twice, or from a later node"):
        paths.from_text(text)
