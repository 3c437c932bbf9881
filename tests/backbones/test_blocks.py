"""Blocks are found from the structure of networks, or from names."""

import keras
import pytest

from k4p1 import backbones, errors
from k4p1.backbones.blocks import Block, find_blocks


@pytest.fixture(scope="module")
def resnet20():
    return backbones.cifar_resnet(depth=20).model


def test_a_block_ends_at_its_sum_and_its_activation_follows(resnet20):
    found = find_blocks(resnet20)
    assert len(found) == 9
    assert found[0] == Block("stem_relu", "stage1_block1_sum", "stage1_block1_relu")
    assert [block.source for block in found[1:]] == [block.node for block in found[:-1]]


def test_macro_blocks_stay_within_a_stage(resnet20):
    found = find_blocks(resnet20, group=2)
    assert [block.end for block in found] == [f"stage{s}_block{b}_sum" for s in (1, 2, 3) for b in (2, 3)]


def test_activations_may_come_first():
    found = find_blocks(backbones.wide_resnet(depth=10, width=2.0).model)
    assert found == tuple(
        Block(source, f"stage{stage}_block1_sum", None)
        for stage, source in ((1, "stage1_block1_1_relu"), (2, "stage1_block1_sum"), (3, "stage2_block1_sum"))
    )


def test_inverted_residuals_with_and_without_a_sum():
    found = find_blocks(backbones.mobilenet_v2(width=0.35).model)
    assert len(found) == 17
    assert found[0] == Block("Conv1_relu", "expanded_conv_project_BN", None)
    assert (found[1].end, found[2].end) == ("block_1_project_BN", "block_2_add")


def test_residual_nets_of_ra_and_he():
    assert len(find_blocks(backbones.resnet26().model)) == 12
    resnet50 = find_blocks(backbones.application("ResNet50").model)
    assert len(resnet50) == 16
    assert resnet50[0] == Block("pool1_pool", "conv2_block1_add", "conv2_block1_out")


def chain(parts=2):
    image = x = keras.Input((None, None, 3))
    for part in range(parts):
        x = keras.layers.Conv2D(4, 3, padding="same", name=f"conv_{part}")(x)
        x = keras.layers.ReLU(name=f"end_{part}")(x)
    return keras.Model(image, keras.layers.GlobalAveragePooling2D(name="pool")(x), name="chain")


def test_names_say_where_blocks_of_another_net_end():
    assert find_blocks(chain(3), "end_*") == (Block("end_0", "conv_1", "end_1"), Block("end_1", "conv_2", "end_2"))


@pytest.mark.parametrize(
    ("make", "pattern", "message"),
    [
        (chain, "", r"no sequence of residual blocks: found a chain of layers; name .*blocks='GLOB'"),
        (chain, "block_*", "matches 0 layers of 'chain'.*conv_0"),
        (lambda: backbones.cifar_resnet(depth=8).model, "*_conv1", "other ways pass by 'stage1_block1_conv1'.*stem_relu"),
        (lambda: backbones.application("DenseNet121").model, "", r"58 places where ways meet \(conv2_block1_concat"),
    ],
)
def test_what_is_no_sequence_of_blocks_is_refused_with_what_was_found(make, pattern, message):
    with pytest.raises(errors.PatchError, match=message):
        find_blocks(make(), pattern)
