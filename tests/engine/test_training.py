"""The loop: turns, exact steps, one best state, resuming, stopping, NaN."""

import os
import signal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from k4p1 import errors
from k4p1.engine.checkpoints import Checkpoints
from k4p1.engine.training import next_task


@given(st.dictionaries(st.sampled_from("abcd"), st.integers(1, 30), min_size=1))
def test_tasks_end_together_and_exactly(targets):
    done = dict.fromkeys(targets, 0)
    while (task := next_task(done, targets)) is not None:
        done[task] += 1
        shares = [done[t] / targets[t] for t in targets]
        assert max(shares) - min(shares) <= 1 / min(targets.values()) + 1e-9
    assert done == targets


def test_steps_are_exact(make_run):
    run = make_run(steps={"a": 5, "b": 3})
    run.trainer().run()
    assert run.store.done() == {"a": 5, "b": 3}


@pytest.mark.slow
def test_training_learns(make_run):
    run = make_run(steps={"a": 60, "b": 60})
    trainer = run.trainer(evaluate_every=20)
    trainer.run()
    assert trainer.progress.best > 0.6  # chance: 0.33


def test_the_joint_best_state_is_returned(make_run, tmp_path, monkeypatch):
    run = make_run(steps={"a": 4, "b": 4})
    trainer = run.trainer(Checkpoints(tmp_path), evaluate_every=2)
    scores = iter([0.2, 0.4, 0.9, 0.9, 0.5, 0.5, 0.1, 0.1])  # a and b at total steps 2, 4, 6, 8
    seen = {}

    def evaluate(vectors, batches):
        seen[sum(run.store.done().values())] = run.store.vectors()
        return {"accuracy": next(scores), "examples": 1.0}

    monkeypatch.setattr(trainer._books, "_evaluators", dict.fromkeys(run.steps, evaluate))
    best = trainer.run()
    assert (trainer.progress.best, trainer.progress.best_step) == (0.9, 4)
    for name, vector in best.items():
        np.testing.assert_array_equal(vector, seen[4][name])


def test_selection_looks_at_population_statistics(make_run, monkeypatch):
    """Moving averages that have not arrived must not decide: what is evaluated is what would be written."""
    run = make_run({"a": "scale_bias+head"}, steps={"a": 2})
    trainer = run.trainer(evaluate_every=2)
    seen = []
    monkeypatch.setattr(
        trainer._books,
        "_evaluators",
        {"a": lambda vectors, batches: seen.append(vectors) or {"accuracy": 0.5, "examples": 1.0}},
    )
    trainer.run()
    (group,) = [g for g in run.groups if g.role == "statistics"]
    now = run.store.vectors()[group.name]
    distance = np.abs(seen[0][group.name] - now).max()
    assert distance > 0.1


@pytest.mark.parametrize("optimizer", ["adam", "rmsprop"])
@pytest.mark.slow
def test_resumed_run_is_bit_equal(make_run, tmp_path, optimizer):
    from k4p1.engine import OptimizerConfig

    runs = {}
    for name, stops in (("unbroken", [None]), ("broken", [5, 4, None])):
        for stop_after in stops:
            run = make_run(
                steps={"a": 8, "b": 6},
                optimizer=OptimizerConfig(learning_rate=1e-2, optimizer=optimizer),
                backbone=None if name == "unbroken" else runs["unbroken"].backbone,
                dropout=0.3,
            )
            run.trainer(Checkpoints(tmp_path / name), evaluate_every=100, checkpoint_every=2).run(stop_after)
        runs[name] = run
    assert runs["broken"].store.done() == {"a": 8, "b": 6}
    one, other = (runs[name].store.snapshot() for name in ("unbroken", "broken"))
    for key in one:
        np.testing.assert_array_equal(one[key], other[key], err_msg=key)


def test_a_loss_that_is_not_finite_names_task_and_step(make_run, tmp_path):
    run = make_run({"a": "head"}, steps={"a": 20})
    with pytest.raises(errors.DivergedError, match=r"task 'a', step 7: the loss is nan"):
        run.trainer(Checkpoints(tmp_path), bad_from=7, checkpoint_every=5).run()
    assert [p.name for p in Checkpoints(tmp_path).paths()] == ["step_00000005.safetensors"]


@pytest.mark.parametrize(
    ("number", "error", "exit_code"), [(signal.SIGTERM, errors.Preempted, 75), (signal.SIGINT, errors.Interrupted, 130)]
)
def test_signals_save_and_stop(make_run, tmp_path, number, error, exit_code):
    run = make_run(steps={"a": 50, "b": 50})
    trainer = run.trainer(Checkpoints(tmp_path))
    take_step = trainer._take_step

    def interrupted(task, iterator):
        if sum(run.store.done().values()) == 6:
            os.kill(os.getpid(), number)
        return take_step(task, iterator)

    trainer._take_step = interrupted
    handler = signal.getsignal(number)
    with pytest.raises(error) as caught:
        trainer.run()
    assert caught.value.exit_code == exit_code
    assert [p.name for p in Checkpoints(tmp_path).paths()] == ["step_00000007.safetensors"]
    assert signal.getsignal(number) is handler


def test_mixed_float16_scales_the_loss_and_drops_bad_gradients(make_run):
    import keras

    from k4p1 import backbones
    from tests.conftest import small_model

    keras.config.set_dtype_policy("mixed_float16")
    half = backbones.from_model(small_model(), scaling="symmetric")
    run = make_run({"a": "scale_bias+head"}, steps={"a": 6}, backbone=half, loss_scaled=True)
    scale, _ = run.store._loss_scales["a"]
    scale.assign(2.0**100)  # overflows float16: the update must be dropped and the scale halved
    before = run.store.vectors()
    run.trainer(loss_scaled=True).run(stop_after=1)
    assert float(scale) == 2.0**99
    for group in run.groups:
        if group.role == "trained":
            np.testing.assert_array_equal(before[group.name], run.store.vectors()[group.name])
    scale.assign(2.0**7)
    run.trainer(loss_scaled=True).run()
    assert float(scale) == 2.0**7
    assert all(np.isfinite(v).all() for v in run.store.vectors().values())
    assert any(not np.array_equal(before[g.name], run.store.vectors()[g.name]) for g in run.groups if g.role == "trained")
