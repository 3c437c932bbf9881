"""One ordered list of rules says how every parameter is updated."""

import keras
import numpy as np
import pytest

from k4p1 import errors
from k4p1.engine import OptimizerConfig, plan_groups
from k4p1.engine.groups import freeze
from k4p1.engine.rules import Rule, layer_of
from k4p1.patches.patched_model import PRIVATE, SHARED, Parameter


def parameter(kind="scale_bias", owner=PRIVATE, rank=4, layer="stage1_conv"):
    key = f"{layer}/kernel" if owner == SHARED else f"{layer}/{kind}/value"
    return Parameter(key, keras.Variable(np.zeros([2] * rank, "float32")), owner, kind, "trained")


def update(config, kind="scale_bias", rank=4, layer="stage1_conv", task="t", **resolved):
    made = parameter(kind, SHARED if kind == "backbone" else PRIVATE, rank, layer)
    return config.resolved(**resolved).update_of(made, task)


def test_short_names_are_rules():
    config = OptimizerConfig(
        learning_rate=1.0, rate_factors={"head": 0.1, "scale_bias": 10.0}, weight_decay={"shared": 1e-4}
    )
    assert update(config, "head").rate == pytest.approx(0.1)
    assert update(config, "scale_bias").rate == 10.0
    assert update(config, "depthwise").rate == 1.0
    assert update(config, "backbone").weight_decay == 1e-4
    assert update(config, "backbone", rank=1).weight_decay == 0.0
    assert update(config, "depthwise").weight_decay == 0.0


def test_the_factor_of_a_kind_goes_before_that_of_its_group_whatever_their_order():
    for factors in ({"patch": 3.0, "scale_bias": 2.0}, {"scale_bias": 2.0, "patch": 3.0}):
        config = OptimizerConfig(learning_rate=1.0, rate_factors=factors)
        assert update(config, "scale_bias").rate == 2.0 and update(config, "lora").rate == 3.0
        assert update(config, "head").rate == update(config, "backbone").rate == 1.0


def test_scores_have_adam_at_1e_4_without_decay_unless_rules_say_otherwise():
    """PB, section 4; a decay would pull every score below the threshold."""
    config = OptimizerConfig(learning_rate=0.1, optimizer="sgd", weight_decay=0.01)
    scores = update(config, "mask")
    assert (scores.rate, type(scores.optimizer).__name__, scores.weight_decay) == (1e-4, "Adam", 0.0)
    assert update(config, "scale_bias").rate == 0.1 and update(config, "depthwise").weight_decay == 0.01
    assert "mask" in scores.sources["learning_rate"]
    rules = {"mask": {"learning_rate": 0.5, "optimizer": "sgd", "rate_factor": 2.0, "weight_decay": 0.1}}
    chosen = update(OptimizerConfig(rules=rules), "mask")
    assert (chosen.rate, type(chosen.optimizer).__name__, chosen.weight_decay) == (1.0, "SGD", 0.1)
    assert chosen.sources["learning_rate"] == "rules['mask']"


def test_a_tasks_own_rate_is_the_base_of_its_steps_and_of_no_kind_with_a_rate_of_its_own():
    config = OptimizerConfig(learning_rate=1.0, rate_factors={"shared": 0.5})
    rates = {"task_rates": {"t": 0.2, "u": None}}
    assert update(config, "scale_bias", **rates).rate == 0.2
    assert update(config, "scale_bias", task="u", **rates).rate == 1.0
    assert update(config, "backbone", task="t", **rates).rate == 0.1
    assert update(config, "backbone", task="u", **rates).rate == 0.5
    assert update(config, "mask", **rates).rate == 1e-4


def test_adamw_brings_its_decay_to_what_names_no_other():
    config = OptimizerConfig(optimizer="adamw")
    assert update(config, "backbone").weight_decay == 0.004 and update(config, "mask").weight_decay == 0.0
    lora = update(OptimizerConfig(rules={"lora": {"optimizer": "adamw"}}), "lora")
    assert lora.weight_decay == 0.004


def test_the_last_matching_rule_wins_setting_by_setting():
    rules = {
        "*/*/stage1_*": {"rate_factor": 0.1, "weight_decay": 0.3},
        "t/scale_bias": {"rate_factor": 5.0},
        "shared": {"learning_rate": 7.0},
    }
    config = OptimizerConfig(learning_rate=1.0, rules=rules)
    found = update(config, "scale_bias")
    assert (found.rate, found.weight_decay) == (5.0, 0.3)
    assert update(config, "scale_bias", task="u").rate == pytest.approx(0.1)
    assert update(config, "scale_bias", layer="stage2_conv", task="u").rate == 1.0
    assert update(config, "backbone").rate == pytest.approx(0.7)
    objects = OptimizerConfig(learning_rate=1.0, rules=[Rule(kind="scale_bias", layer="stage2_*", rate_factor=3.0)])
    assert update(objects, "scale_bias", layer="stage2_conv").rate == 3.0 and update(objects, "scale_bias").rate == 1.0


def test_shrinkage_by_data_set_size():
    """RA, section 4.1: 0.002, 0.0005, 0.0001 for its small, middle and large data sets."""
    config = OptimizerConfig(weight_decay={"parallel_adapter": "by_size"})
    sizes = (1_020, 3_334, 6_826, 23_520, 28_230)
    decays = [update(config, "parallel_adapter", rank=2, examples={"t": size}).weight_decay for size in sizes]
    assert decays == [0.002, 0.002, 0.0005, 0.0005, 0.0001]
    assert update(config, "lora", rank=2, examples={"t": 2_000}).weight_decay == 0.0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rules": {"maks": {"learning_rate": 0.1}}}, r"unknown kind in rule 'rules\['maks'\]' 'maks'; did you mean 'mask'"),
        (
            {"rules": {"mask": {"learning_rat": 0.1}}},
            "unknown setting in rule 'mask' 'learning_rat'; did you mean 'learning_rate'",
        ),
        ({"rules": {"mask": {"learning_rate": 0.0}}}, "learning_rate=0.0; expected a positive number"),
        ({"rules": {"mask": {"rate_factor": -1.0}}}, "rate_factor=-1.0; expected a number of at least 0"),
        ({"rules": {"mask": {"optimizer": "adm"}}}, "unknown optimizer 'adm'; did you mean 'adam'"),
        ({"rules": {"mask": 0.1}}, "rule 'mask' is 0.1; expected settings"),
        ({"rules": ["mask"]}, "expected Rule objects"),
        ({"rules": {"mask": {"frozen": "no"}}}, "frozen='no'; expected True or False"),
        ({"rules": {"mask": {"optimizer": 3}}}, "optimizer=3; expected a name or an Optimizer"),
        ({"rate_factors": 0.1}, "rate_factors=0.1; expected a mapping"),
        ({"rate_factors": {"sharde": 0.1}}, "unknown name in rate_factors 'sharde'; did you mean 'shared'"),
        ({"weight_decay": {"parallel_adapter": "size"}}, "expected a number of at least 0, or 'by_size'"),
        ({"learning_rate": 0.0}, "expected a positive number"),
    ],
)
def test_refusals(settings, message):
    with pytest.raises(errors.ConfigError, match=message):
        OptimizerConfig(**settings)


def test_a_frozen_layer_keeps_its_values_and_costs_no_optimizer_state(make_run):
    config = OptimizerConfig(learning_rate=0.1, rules={"shared/*/stem*": {"frozen": True}})
    run = make_run({"a": "scale_bias+head"})
    rules = config.resolved()
    models = freeze(run.patched, rules)
    roles = {p.key: p.role for p in models["a"].parameters}
    assert (
        roles["stem/kernel"] == "fixed"
        and roles["mix/kernel"] == "trained"
        and roles["stem_bn/scale_bias/gamma"] == "trained"
    )
    groups = plan_groups(models, rules)
    fixed = {name for g in groups if g.role == "fixed" for name in g.packing.names}
    assert "stem/kernel" in fixed and "mix/kernel" not in fixed


def test_rules_that_match_nothing_are_found(make_run):
    run = make_run({"a": "scale_bias+head"})
    rules = OptimizerConfig(rules={"mask": {"rate_factor": 0.1}, "a/head": {"rate_factor": 0.2}}).resolved()
    assert [rule.source for rule in rules.unmatched(run.patched)] == ["rules['mask']"]


@pytest.mark.parametrize(
    ("key", "owner", "kind", "layer"),
    [
        ("stem/kernel", SHARED, "backbone", "stem"),
        ("inner/conv/kernel", SHARED, "backbone", "inner/conv"),
        ("inner/conv/lora/down", PRIVATE, "lora", "inner/conv"),
        ("block/full/conv/full/kernel", PRIVATE, "full", "block/full/conv"),
        ("head/head/2/kernel", PRIVATE, "head", "head"),
        ("head/head/kernel", PRIVATE, "head", "head"),
        ("head/kernel", SHARED, "head", "head"),
    ],
)
def test_the_layer_of_a_key(key, owner, kind, layer):
    assert layer_of(Parameter(key, keras.Variable(0.0), owner, kind, "trained")) == layer


def test_tasks_that_share_a_parameter_must_agree_on_its_optimizer(make_run):
    run = make_run({"a": "none", "b": "none"})
    rules = OptimizerConfig(rules=[Rule(task="a", optimizer="sgd")]).resolved()
    with pytest.raises(errors.ConfigError, match=r"tasks 'a' and 'b' share '.*' and update it by different optimizers"):
        plan_groups(run.patched, rules)
