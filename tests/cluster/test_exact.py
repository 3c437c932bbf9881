"""Late updates, shared statistics, snapshots and accounts, on a store as servers hold it, in this process."""

import numpy as np
import pytest
import tensorflow as tf

from k4p1.cluster.several_steps import Results, several_steps
from k4p1.cluster.step_counts import StepCounts
from k4p1.cluster.store import ServerStore
from k4p1.engine.groups import ParameterGroup
from k4p1.engine.optimizers import SGD
from k4p1.engine.packing import Packing
from k4p1.engine.pure import Forward
from k4p1.engine.rules import Update
from k4p1.engine.schedules import Constant
from k4p1.engine.step import Pace, Term, training_step
from k4p1.engine.store import Store

HERE = ["CPU:0"]


def vector_of(role="trained", size=3, value=0.0):
    import keras

    names = ("w",) if role == "trained" else ("bn/moving_mean", "bn/moving_variance")
    shapes = ((size,),) * len(names)
    variables = tuple(keras.Variable(np.full(shape, value, np.float32)) for shape in shapes)
    updates = {"t": Update(0.5, SGD(), 0.0, False)} if role == "trained" else {}
    kind = "head" if role == "trained" else "backbone"
    return ParameterGroup(role, "t", ("t",), role, kind, Packing(names, shapes), variables, updates)


class Linear:
    """A task whose gradient is 1 everywhere."""

    name, statistics_momentum = "t", {}

    def __init__(self, group):
        self.groups = [group]

    def forward(self, vectors, inputs, *, training, seed=None):
        output = tf.reduce_sum(vectors[self.groups[0].name]) + 0.0 * tf.reduce_sum(inputs)
        return Forward({"logits": output}, {}, tf.zeros([]))


def steps_of(store, group, target, *, meanwhile=0, most=1):
    """The function of several steps; while a loss is computed, others update so many times."""

    def loss(batch, outputs):
        with tf.control_dependencies([outputs["logits"]]):
            others = store._updates[group.name].assign_add(meanwhile) if meanwhile else tf.zeros([])
        with tf.control_dependencies([others]):
            return {"loss": Term(tf.identity(outputs["logits"]), 1.0)}

    step = training_step(Linear(group), store, loss, Constant(), Pace(target, (1.0,), 0, 0))
    return tf.function(several_steps(step, store, "t", most=most, seconds=60.0), autograph=False)


def batches(count=-1):
    batch = {"inputs": tf.ones([2, 1]), "weight": tf.ones([2])}
    return iter(tf.data.Dataset.from_tensors(batch).repeat(count))


def accounts(store, group):
    counts = StepCounts({"t": {}}, {})
    counts.settle(store.snapshot(), [group])
    return counts


@pytest.mark.parametrize(("lag", "applied"), [(4, True), (5, False)])
def test_an_update_that_comes_too_late_changes_nothing_and_is_counted(lag, applied):
    group = vector_of()
    store = ServerStore([group], {"t": 10}, devices=HERE, max_staleness=4)
    store.allow({"t": 10})
    result = Results.of(steps_of(store, group, 10, meanwhile=lag)(batches()).numpy())
    assert result.rows[0, 4] == lag
    moved = not np.array_equal(store.vectors()[group.name], np.zeros(3))
    found = accounts(store, group)
    assert moved is applied
    assert found.tickets == {"t": 1} and found.late == {"t": 0 if applied else 1}


def test_late_updates_may_be_damped():
    moved = []
    for damped in (False, True):
        group = vector_of()
        store = ServerStore([group], {"t": 10}, devices=HERE, max_staleness=4, damp_stale_updates=damped)
        store.allow({"t": 10})
        steps_of(store, group, 10, meanwhile=3)(batches())
        moved.append(store.vectors()[group.name])
    np.testing.assert_allclose(moved[0], 4.0 * moved[1], rtol=1e-6)


def test_a_step_without_data_takes_no_ticket():
    """Of the data end nothing is lost but the steps that had none."""
    group = vector_of()
    store = ServerStore([group], {"t": 100}, devices=HERE)
    store.allow({"t": 100})
    function, iterator = steps_of(store, group, 100, most=8), batches(5)
    result = Results.of(function(iterator).numpy())
    assert len(result.rows) == 5 and result.out_of_data
    result = Results.of(function(iterator).numpy())
    assert not len(result.rows) and result.out_of_data
    found = accounts(store, group)
    assert found.tickets == {"t": 5} and found.updates == {"t": 5} and found.missing == {"t": 0}


def test_a_single_step_that_has_no_data_takes_no_ticket_either():
    """Without a ticket of its own, a step takes one once its batch is there."""
    group = vector_of()
    store = Store([group], {"t": 100})

    def loss(batch, outputs):
        return {"loss": Term(outputs["logits"], 1.0)}

    step = training_step(Linear(group), store, loss, Constant(), Pace(100, (1.0,), 0, 0))
    function, iterator = tf.function(lambda iterator: step(next(iterator))), batches(2)
    for _ in range(2):
        function(iterator)
    for _ in range(20):
        with pytest.raises(tf.errors.OutOfRangeError):
            function(iterator)
    assert store.done() == {"t": 2} and int(store.snapshot()[f"updates/{group.name}"]) == 2


def test_several_steps_stop_where_they_are_told_to():
    group = vector_of()
    store = ServerStore([group], {"t": 20}, devices=HERE)
    function, iterator = steps_of(store, group, 20, most=8), batches()

    def taken():
        return len(Results.of(function(iterator).numpy()).rows)

    assert taken() == 0  # nothing was allowed yet
    store.allow({"t": 3})
    assert (taken(), taken()) == (3, 0)
    store.allow({"t": 10**6})
    assert (taken(), taken(), taken(), taken()) == (8, 8, 1, 0)
    assert store.done() == {"t": 20} and accounts(store, group).updates == {"t": 20}


def test_several_steps_learn_what_single_ones_do():
    found = []
    for most in (1, 7):
        group = vector_of()
        store = ServerStore([group], {"t": 20}, devices=HERE)
        store.allow({"t": 20})
        function, iterator = steps_of(store, group, 20, most=most), batches()
        losses = np.concatenate([Results.of(function(iterator).numpy()).rows[:, 0] for _ in range(20)])
        found.append((losses, store.vectors()[group.name]))
    np.testing.assert_array_equal(found[0][0], found[1][0])
    np.testing.assert_array_equal(found[0][1], found[1][1])


@pytest.mark.parametrize(("kind", "stable"), [("batch statistics", True), ("differences", False)])
@pytest.mark.slow
def test_shared_statistics_of_64_workers_are_stable(kind, stable):
    """Each of 64 workers in turn moves what it read 63 updates ago; with differences that diverges from 17 workers on."""
    group, random = vector_of("statistics", value=1.0), np.random.default_rng(0)
    store = ServerStore([group], {"t": 1}, devices=HERE)
    momentum = dict.fromkeys(group.packing.names, 0.9)
    move = store.move_statistics if stable else lambda *a: Store.move_statistics(store, *a)
    moved = tf.function(lambda new, read: move(group, new, read, momentum))
    held = [store.read(group).numpy()] * 64
    lowest, largest = np.inf, 0.0
    for number in range(2000):
        read = held[number % 64]
        batch = random.uniform(0.5, 1.5, 6).astype(np.float32)
        moved(tf.constant(0.9 * read + 0.1 * batch, tf.float32), tf.constant(read))
        held[number % 64] = store.read(group).numpy()
        lowest, largest = min(lowest, held[number % 64].min()), max(largest, held[number % 64].max())
    assert bool(lowest > 0.4 and largest < 1.6) is stable, (lowest, largest)


def test_a_statistic_without_a_momentum_changes_by_a_difference():
    group = vector_of("statistics", value=2.0)
    store = ServerStore([group], {"t": 1}, devices=HERE)
    store.move_statistics(group, tf.fill([6], 5.0), tf.fill([6], 4.0), {"bn/moving_mean": 0.5})
    np.testing.assert_array_equal(store.read(group), [4.0, 4.0, 4.0, 3.0, 3.0, 3.0])  # 0.5 * 2 + (5 - 0.5 * 4), 2 + 1


def test_a_snapshot_is_read_by_one_function_that_is_traced_beforehand(monkeypatch):
    """Functions that are registered later wait for every worker."""
    group = vector_of(size=5)
    store = ServerStore([group], {"t": 10}, devices=HERE * 2)
    store.prepare()
    monkeypatch.setattr(tf, "function", None)
    store.allow({"t": 3})
    snapshot = store.snapshot()
    assert set(snapshot) == {f"vector/{group.name}", f"updates/{group.name}", "ticket/t"} | {
        f"count/{kind}/t" for kind in ("late", "overflowed")
    }
    assert snapshot[f"vector/{group.name}"].shape == (5,) and store.done() == {"t": 0}


def test_checkpoints_of_either_store_resume_in_the_other():
    group = vector_of()
    here, there = Store([group], {"t": 10}), ServerStore([group], {"t": 10}, devices=HERE)
    here.restore(there.snapshot())
    there.restore(here.snapshot())


def test_small_vectors_are_whole_and_large_ones_have_bounded_shards(monkeypatch):
    devices = ["CPU:0", "CPU:0", "CPU:0"]
    store = ServerStore([vector_of(size=16)], {"t": 1}, devices=devices)
    assert [len(store._shard_devices(i, 16_384)) for i in range(3)] == [1, 1, 1]
    assert len(store._shard_devices(0, 16_385)) == 3
    size = 3 * 2**29  # 6 GiB
    shards = store._shard_devices(0, size)
    assert 4 * -(-size // len(shards)) <= 2**29


def test_half_the_bytes_travel_and_the_servers_keep_float32():
    group = vector_of(size=3, value=1.0 + 2**-12)
    store = ServerStore([group], {"t": 10}, devices=HERE, transport="bfloat16")
    np.testing.assert_array_equal(store.read(group), [1.0, 1.0, 1.0])
    store.apply_gradient(group, tf.fill([3], 2.0**-12), tf.constant(1.0))
    np.testing.assert_array_equal(store.vectors()[group.name], [1.0, 1.0, 1.0])
    assert store.step_bytes("t") == 12 == ServerStore([group], {"t": 1}, devices=HERE).step_bytes("t") // 2
