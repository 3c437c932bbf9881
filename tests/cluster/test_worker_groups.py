"""Groups: who serves whom, whose turn it is, who is missing."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from k4p1 import errors
from k4p1.cluster.policy import WorkerPolicy
from k4p1.cluster.worker_groups import ALARM_SECONDS, WorkerGroups, WorkerRequest, assign

TASKS = st.lists(st.sampled_from("abcdefgh"), min_size=1, unique=True)


@given(TASKS, st.integers(0, 12), st.data())
def test_every_task_has_workers_of_its_own(tasks, more, data):
    requests = {
        task: WorkerRequest(data.draw(st.none() | st.integers(1, 3)), data.draw(st.floats(0.1, 10, allow_nan=False)))
        for task in tasks
    }
    workers = sum(wish.workers or 1 for wish in requests.values()) + more
    groups = assign(requests, workers)
    taken = [worker for group in groups.values() for worker in group]
    assert len(taken) == len(set(taken)) and set(taken) <= set(range(workers))
    for task, wish in requests.items():
        assert len(groups[task]) == wish.workers if wish.workers else len(groups[task]) >= 1
    if any(wish.workers is None for wish in requests.values()):
        assert len(taken) == workers


def test_shares():
    groups = assign({"a": WorkerRequest(), "b": WorkerRequest(share=3.0), "c": WorkerRequest(2)}, 10)
    assert {task: len(group) for task, group in groups.items()} == {"a": 2, "b": 6, "c": 2}


@given(TASKS, st.integers(1, 8))
def test_shared_workers_serve_equally_many_tasks(tasks, workers):
    groups = assign({task: WorkerRequest() for task in tasks}, workers, share_workers=True)
    assert all(len(group) >= 1 for group in groups.values())
    if workers < len(tasks):
        counts = [sum(worker in group for group in groups.values()) for worker in range(workers)]
        assert max(counts) - min(counts) <= 1


@pytest.mark.parametrize(
    ("requests", "share", "message"),
    [
        (
            {"a": WorkerRequest(), "b": WorkerRequest(), "c": WorkerRequest()},
            False,
            "3 tasks need at least 3 workers, the cluster has 2; .*share_workers",
        ),
        ({"a": WorkerRequest(2), "b": WorkerRequest()}, False, "name 2 workers for 1 of them and need at least 3 workers"),
        ({"a": WorkerRequest(2), "b": WorkerRequest(), "c": WorkerRequest()}, True, "none can have several"),
    ],
)
def test_too_few_workers(requests, share, message):
    with pytest.raises(errors.ConfigError, match=message):
        assign(requests, 2, share)


def groups(tasks="ab", workers=2, steps=100, paced=True, **policy):
    return WorkerGroups(
        {t: WorkerRequest() for t in tasks}, dict.fromkeys(tasks, steps), workers, WorkerPolicy(**policy), paced
    )


def test_steps_go_to_the_group_alone_and_stop_at_the_target():
    g = groups()
    assert g.next_task(0, {"a": 3, "b": 3}, {"a": 2, "b": 2}) == "a"
    assert g.next_task(1, {"a": 3, "b": 3}, {"a": 2, "b": 2}) == "b"
    assert g.next_task(0, {"a": 100, "b": 3}, {"a": 99, "b": 99}) is None


def test_a_task_waits_when_it_leads_too_far():
    assert groups(max_lead=0.1).next_task(0, {"a": 30, "b": 19}, {"a": 29, "b": 18}) is None
    assert groups(max_lead=0.1).next_task(0, {"a": 27, "b": 19}, {"a": 26, "b": 18}) == "a"
    assert groups(max_lead=0.1, paced=False).next_task(0, {"a": 90, "b": 0}, {"a": 90, "b": 0}) == "a"


@given(st.integers(1, 4), st.integers(1, 60), st.integers(1, 60))
def test_nothing_blocks_for_ever(workers, a, b):
    """Whatever the targets, some worker has something to do until all is done."""
    requests = {"a": WorkerRequest(), "b": WorkerRequest()}
    g = WorkerGroups(requests, {"a": a, "b": b}, workers, WorkerPolicy(share_workers=True, max_lead=0.01))
    done = {"a": 0, "b": 0}
    while done != {"a": a, "b": b}:
        task = next((t for w in range(workers) if (t := g.next_task(w, done, done))), None)
        assert task is not None
        done[task] += 1


def test_a_shared_worker_serves_the_task_furthest_behind():
    g = groups("abc", workers=1, share_workers=True)
    assert g.next_task(0, {"a": 5, "b": 4, "c": 6}, {"a": 5, "b": 4, "c": 6}) == "b"


def test_alarm_comes_once_and_names_the_task():
    g = groups()
    done = {"a": 1, "b": 1}
    g.lost(1, now=100.0)
    assert g.alarms(100.0 + ALARM_SECONDS - 0.1, done) == []
    assert ALARM_SECONDS <= 20
    assert g.alarms(100.0 + ALARM_SECONDS, done) == ["b"]
    assert g.alarms(200.0, done) == []
    g.back(1)
    assert g.dead(300.0, done) == {}
    g.lost(1, now=300.0)
    assert g.alarms(400.0, done) == ["b"]


def test_a_group_with_one_live_worker_is_not_dead():
    g = WorkerGroups({"a": WorkerRequest(2)}, {"a": 10}, 2, WorkerPolicy())
    g.lost(0, now=0.0)
    assert g.alarms(100.0, {"a": 1}) == []
    g.lost(1, now=50.0)
    assert g.dead(60.0, {"a": 1}) == {"a": 10.0}
    assert g.dead(60.0, {"a": 10}) == {}  # nothing left to do


def test_borrowing_takes_from_the_largest_group_and_gives_back():
    g = WorkerGroups(
        {"a": WorkerRequest(1), "b": WorkerRequest(3), "c": WorkerRequest(1)},
        dict.fromkeys("abc", 10),
        5,
        WorkerPolicy(no_worker_timeout_s=30),
    )
    g.lost(0, now=0.0)
    assert g.overdue(29.0, dict.fromkeys("abc", 1)) == []
    assert g.overdue(31.0, dict.fromkeys("abc", 1)) == ["a"]
    lent = g.borrow("a")
    assert lent in (1, 2, 3) and g.tasks_of(lent) == ["a", "b"]
    assert g.overdue(40.0, dict.fromkeys("abc", 1)) == []
    g.back(0)
    assert g.tasks_of(lent) == ["b"]


def test_nobody_to_borrow():
    g = groups()
    g.lost(0, 0.0)
    g.lost(1, 0.0)
    assert g.borrow("a") is None


def test_workers_of_finished_tasks_move_on_if_so_wished():
    done = {"a": 100, "b": 10}
    assert groups().reassign(done) == {}
    g = groups(reassign_workers=True)
    assert g.reassign(done) == {0: "b"}
    assert g.group("b") == [0, 1] and g.tasks_of(0) == ["b"]
    assert g.reassign(done) == {}
    assert g.reassign({"a": 100, "b": 100}) == {}


def test_idle_workers_are_known():
    assert WorkerGroups({"a": WorkerRequest(1)}, {"a": 5}, 3, WorkerPolicy()).idle() == [1, 2]


@pytest.mark.parametrize("setting", [{"no_worker_timeout_s": 0}, {"max_lead": -1.0}, {"startup_timeout_s": 0}])
def test_policy_refuses(setting):
    with pytest.raises(errors.ConfigError, match="expected a positive number"):
        WorkerPolicy(**setting)
