"""What the tests of one shared cluster look at, done once in a process of its own: two servers, two workers, real processes.

Prints one JSON object: what each experiment found, or its traceback.
"""

import dataclasses
import faulthandler
import json
import os
import pathlib
import signal
import sys
import tempfile
import threading
import time
import traceback

faulthandler.dump_traceback_later(int(os.environ.get("DRIVER_LIMIT", "240")), exit=True)
os.environ.update(TF_NUM_INTRAOP_THREADS="1", CUDA_VISIBLE_DEVICES="-1", TF_CPP_MIN_LOG_LEVEL="3")

import keras  # noqa: E402
import numpy as np  # noqa: E402
import tensorflow as tf  # noqa: E402

from k4p1 import errors  # noqa: E402
from k4p1.cluster.connection import Connection  # noqa: E402
from k4p1.cluster.fork_server import ForkServer  # noqa: E402
from k4p1.cluster.local import LocalCluster  # noqa: E402
from k4p1.cluster.policy import WorkerPolicy  # noqa: E402
from k4p1.cluster.store import ServerStore  # noqa: E402
from k4p1.cluster.tensorflow_private import Step  # noqa: E402
from k4p1.cluster.trainer import ClusterTrainer  # noqa: E402
from k4p1.cluster.worker_groups import WorkerRequest  # noqa: E402
from k4p1.files import run_record  # noqa: E402

STEPS = 300
COUNTS = 10


class Runs:
    """Gives out steps of one function to some workers until there were enough."""

    def __init__(self, connection):
        self.queue, self.connection = connection.coordinator.queue, connection
        self._lock = threading.Lock()

    def __call__(self, function, batches, count, workers=(0, 1), enough=lambda results: False):
        """Results in the order in which they came, as (worker, numbers)."""
        iterator = iter(self.connection.coordinator.create_per_worker_dataset(batches))
        self.function = (Step("t", tf.function(function), iterator, self.queue).traced, iterator)
        self.left, self.workers, self.results, self.error = count, workers, [], None
        self.count = count
        self.queue.dispatcher = self
        self.queue.go_on()
        while len(self.results) < count and self.error is None and not enough(self.results):
            self.queue.wake()
            time.sleep(0.02)
        self.left = 0
        self.queue.wait(30.0)
        self.queue.dispatcher = None
        if self.error is not None:
            raise self.error
        return self.results

    def next_step(self, worker):
        with self._lock:
            if worker not in self.workers or self.left == 0:
                return None
            self.left -= 1
        return Step("t", *self.function, self.queue)

    def finished(self, step, worker, result):
        with self._lock:
            self.results.append((worker, None if result is None else np.atleast_1d(result).tolist()))

    def interrupted(self, step):
        with self._lock:
            self.left += 1

    def failed(self, error):
        self.error = error


def nothing():
    return tf.data.Dataset.from_tensors(0).repeat()


def optimizers(connection, cluster):
    """50 updates of each optimizer on one worker, and by Keras here: the largest difference."""
    from k4p1.engine.groups import ParameterGroup
    from k4p1.engine.optimizers import SGD, Adam, AdamW, RMSProp
    from k4p1.engine.packing import Packing
    from k4p1.engine.rules import Update

    pairs = {
        "sgd": (SGD(), keras.optimizers.SGD(0.05)),
        "momentum": (SGD(momentum=0.9), keras.optimizers.SGD(0.05, momentum=0.9)),
        "nesterov": (SGD(momentum=0.9, nesterov=True), keras.optimizers.SGD(0.05, momentum=0.9, nesterov=True)),
        "rmsprop": (RMSProp(), keras.optimizers.RMSprop(0.05)),
        "rmsprop_momentum": (RMSProp(momentum=0.9), keras.optimizers.RMSprop(0.05, momentum=0.9)),
        "adam": (Adam(), keras.optimizers.Adam(0.05)),
        "adamw": (AdamW(), keras.optimizers.AdamW(0.05, weight_decay=0.004)),
    }
    found = {}
    for name, (ours, theirs) in pairs.items():
        values = np.random.default_rng(0).normal(size=37).astype("float32")
        variable = keras.Variable(values)
        decay = 0.004 if name == "adamw" else 0.0
        update = {"t": Update(0.05, ours, decay, False)}
        group = ParameterGroup("g", "t", ("t",), "trained", "head", Packing(("v",), ((37,),)), (variable,), update)
        store = ServerStore([group], {"t": 50}, devices=connection.devices)

        Runs(connection)(_update_of(store, group), nothing, 50, workers=(0,))
        for ticket in range(50):
            theirs.apply([keras.ops.sin(3.0 * variable.value + float(ticket))], [variable])
        found[name] = float(np.abs(store.vectors()["g"] - variable.numpy()).max())
    return found


def _update_of(store, group):
    def step(iterator):
        next(iterator)
        ticket = tf.cast(store.take_ticket("t"), tf.float32)
        store.apply_gradient(group, tf.sin(3.0 * store.read(group) + ticket), tf.constant(0.05))
        return tf.zeros([1])

    return step


def tickets(connection, cluster):
    """Tickets are unique and end at the target; Keras' own counting loses updates (a canary: design, trap 1)."""

    store = ServerStore([], {"t": STEPS}, devices=connection.devices)
    with tf.device(connection.devices[0]):
        counter = keras.Variable(0, dtype="int64")
        ours = tf.Variable(0, dtype=tf.int64)

    def step(iterator):
        next(iterator)
        ticket = store.take_ticket("t")
        with tf.control_dependencies([ticket]):  # a step that is refused counts nothing
            for _ in range(COUNTS):
                counter.assign_add(1)
            ours.assign_add(1)
        return tf.cast(ticket, tf.float64)

    results = Runs(connection)(step, nothing, STEPS + 20)
    taken = sorted(int(numbers[0]) for _, numbers in results if numbers is not None)
    return {
        "unique": taken == list(range(STEPS)),
        "refused": sum(numbers is None for _, numbers in results),
        "done": store.done(),
        "tf_variable": int(ours.numpy()),
        "keras_variable": int(counter.numpy()),
    }


def small_tasks(names, shared_trained=True, spec="scale_bias+head", optimizer=None):
    from k4p1 import backbones
    from k4p1.engine import OptimizerConfig, plan_groups
    from k4p1.patches.apply import apply_patches
    from tests.conftest import small_model

    backbone = backbones.from_model(small_model(), name="small", scaling="symmetric")
    how = {"classes": 3, "image_size": 16, "shared_trained": shared_trained}
    models = {name: apply_patches(backbone, spec, name=name, seed=i, **how) for i, name in enumerate(names)}
    optimizer = optimizer or OptimizerConfig(learning_rate=1e-2)
    return models, plan_groups(models, optimizer.resolved()), optimizer


def training_tasks(models, groups, optimizer, steps):
    from k4p1.engine.bookkeeping import TrainingTask
    from k4p1.engine.pure import PureTask
    from k4p1.tasks.loss import TaskLoss
    from k4p1.tasks.objectives import CLASSIFICATION

    loss = TaskLoss.of("softmax_cross_entropy", CLASSIFICATION)
    from tests.engine.conftest import batches

    return [
        TrainingTask(
            pure=PureTask(name, model, groups),
            steps=steps,
            epochs=1.0,
            batches=lambda start, worker=0, seed=index: batches(start, seed),
            loss=loss,
            loss_terms=loss.names,
            metrics={**CLASSIFICATION.measured(("accuracy",)), **loss.metrics()},
            selecting="accuracy",
            validation=None,
            calibration=lambda: batches(0, 7),
            schedule=optimizer.schedule,
        )
        for index, (name, model) in enumerate(models.items())
    ]


def trainer_of(connection, tasks, groups, requests=None, policy=None, reporter=None, resident=True):
    from k4p1.engine.reporting import Reporter

    targets = {task.name: task.steps for task in tasks}
    store = ServerStore(groups, targets, devices=connection.devices, resident=resident)
    requests = requests or {task.name: WorkerRequest() for task in tasks}
    reporter = reporter or Reporter(targets, quiet=True)
    how = {"evaluate_every": 10**6, "checkpoint_every": 10**6}
    return ClusterTrainer(connection, tasks, store, requests, policy or WorkerPolicy(), reporter, **how), store


def one_worker(connection, cluster):
    """20 steps of SGD on one worker, and on this machine: the largest difference of a parameter."""
    from k4p1.engine import OptimizerConfig, Store, Trainer
    from k4p1.engine.reporting import Reporter

    vectors = []
    for place in ("cluster", "machine"):
        models, groups, optimizer = small_tasks(
            ["a"], optimizer=OptimizerConfig(learning_rate=0.05, optimizer="sgd", schedule="cosine")
        )
        tasks = training_tasks(models, groups, optimizer, 20)
        if place == "cluster":
            trainer, _ = trainer_of(connection, tasks, groups, {"a": WorkerRequest(1)})
        else:
            store = Store(groups, {"a": 20})
            trainer = Trainer(tasks, store, Reporter({"a": 20}, quiet=True), evaluate_every=10**6, checkpoint_every=10**6)
        initial = {group.name: group.initial() for group in groups}
        vectors.append(trainer.run())
    return {
        "difference": max(float(np.abs(vectors[0][name] - vectors[1][name]).max()) for name in vectors[0]),
        "moved": max(float(np.abs(vectors[0][name] - initial[name]).max()) for name in initial),
    }


KINDS = [
    "head",
    "depthwise+head",
    "full",
    "series_adapter(layers=stem)+scale_bias+head",
    "parallel_adapter+head",
    "mask+scale_bias+head",
    "lora(rank=2)+head",
    "dan(layers=stem)+head",
    "nettailor(k=2,blocks=*_relu)+head",
    "packnet+head",
]


def kinds(connection, cluster):
    """One step of every patch kind on one worker, backbone frozen, and on this machine: the largest difference."""
    from k4p1.engine import OptimizerConfig, Store, Trainer
    from k4p1.engine.reporting import Reporter

    found = {}
    for spec in KINDS:
        vectors = []
        for place in ("cluster", "machine"):
            rules = {"mask": {"learning_rate": 0.05, "optimizer": "sgd"}}
            optimizer = OptimizerConfig(learning_rate=0.05, optimizer="sgd", schedule="constant", rules=rules)
            models, groups, optimizer = small_tasks(["a"], False, spec, optimizer)
            tasks = training_tasks(models, groups, optimizer, 1)
            if place == "cluster":
                trainer, _ = trainer_of(connection, tasks, groups, {"a": WorkerRequest(1)})
            else:
                store = Store(groups, {"a": 1})
                how = {"evaluate_every": 10**6, "checkpoint_every": 10**6}
                trainer = Trainer(tasks, store, Reporter({"a": 1}, quiet=True), **how)
            initial = {group.name: group.initial() for group in groups}
            vectors.append(trainer.run())
        found[spec] = {
            "difference": max(float(np.abs(vectors[0][name] - vectors[1][name]).max()) for name in vectors[0]),
            "moved": max(float(np.abs(vectors[0][name] - initial[name]).max()) for name in initial),
        }
    return found


def groups_of_workers(connection, cluster):
    """Two tasks on two workers, then three on two, then one on two: exact counters, right workers, staleness."""
    from k4p1.engine.reporting import Reporter

    found = {}
    for label, names, policy in (
        ("own", ["a", "b"], WorkerPolicy()),
        ("shared", ["a", "b", "c"], WorkerPolicy(share_workers=True)),
        ("two_for_one", ["a"], WorkerPolicy()),
    ):
        models, groups, optimizer = small_tasks(names)
        tasks = training_tasks(models, groups, optimizer, 60)
        with tempfile.TemporaryDirectory() as folder:
            reporter = Reporter(dict.fromkeys(names, 60), folder, quiet=True)
            trainer, store = trainer_of(connection, tasks, groups, policy=policy, reporter=reporter)
            with reporter:
                trainer.run()
            records = [json.loads(line) for line in (pathlib.Path(folder) / "metrics.jsonl").read_text().splitlines()]
        snapshot = store.snapshot()
        found[label] = {
            "done": store.done(),
            "workers": {task: sorted(counts) for task, counts in trainer.step_counts.steps.items()},
            "missing": trainer.step_counts.missing,
            "updates": {name: int(value) for name, value in snapshot.items() if name.startswith("updates/")},
            "staleness": max(r["staleness_max"] for r in records if r["kind"] == "train"),
            "kinds": sorted({r["kind"] for r in records}),
            "traced": len(trainer.dispatcher.traced),
        }
    return found


def devices(connection, cluster):
    """Where the operations of a step are placed, and what it captures."""
    found = {}
    for label, shared_trained in (("trained", True), ("frozen", False)):
        models, groups, optimizer = small_tasks(["a"], shared_trained=shared_trained)
        trainer, _ = trainer_of(connection, training_tasks(models, groups, optimizer, 5), groups)
        trainer._trace()
        graph = trainer.dispatcher.traced["a"][0].graph
        operations = list(graph.get_operations())
        for function in graph._functions.values() if hasattr(graph, "_functions") else ():
            operations += getattr(getattr(function, "graph", None), "get_operations", list)()
        found[label] = {
            "devices": sorted({op.device for op in operations}),
            "on_cpu_of_worker": sorted({op.type for op in operations if "CPU" in op.device and "/job:ps" not in op.device}),
            "captured_from": sorted({t.device for t, _ in graph.captures if hasattr(t, "device")}),
            "updates_on": sorted({op.device for op in operations if op.type.startswith("ResourceApply")}),
        }
    return found


def frozen_weights(connection, cluster):
    """The frozen backbone does not move, is the same on both workers, and gives what reading at every step gives."""
    vectors = []
    for resident in (True, False):
        models, groups, optimizer = small_tasks(["a"], shared_trained=False)
        before = {group.name: group.initial() for group in groups if group.role == "fixed"}
        tasks = training_tasks(models, groups, optimizer, 12)
        trainer, store = trainer_of(connection, tasks, groups, {"a": WorkerRequest(1)}, resident=resident)
        vectors.append(trainer.run())
        unmoved = all(np.array_equal(store.vectors()[name], value) for name, value in before.items())
    difference = max(float(np.abs(vectors[0][name] - vectors[1][name]).max()) for name in vectors[0])
    return {"fixed_groups": len(before), "unmoved": unmoved, "difference": difference}


def pipelines(connection, cluster):
    """Batches of the workers of a group, and those of a worker that was killed and started again."""
    from k4p1 import data

    source = data.embedded("digits")
    pipeline = data.Pipeline(source, data.Splits(source), (8, 8), 16, 10, augment="shift(pixels=1)", seed=3)
    store = ServerStore([], {"t": 10**6}, devices=connection.devices)

    def batches():
        worker = tf.distribute.coordinator.experimental_get_current_worker_index()
        return pipeline.training(store.ticket("t"), worker)

    def step(iterator):
        store.take_ticket("t")
        batch = next(iterator)
        weights = tf.range(1, tf.size(batch["inputs"]) + 1, dtype=tf.int64) * 7_368_787 % 99_991_003
        return tf.cast(tf.reduce_sum(tf.cast(tf.reshape(batch["inputs"], [-1]), tf.int64) * weights), tf.float64)

    before = cluster.process("worker", 1)

    class Killing(Runs):
        lost = 10**6

        def finished(self, step, worker, result):
            super().finished(step, worker, result)
            if [w for w, _ in self.results].count(1) > 20:
                before.kill()  # again and again; only the first one matters

        def interrupted(self, step):
            super().interrupted(step)
            self.lost = len(self.results)

    runs = Killing(connection)
    results = runs(step, batches, 10**6, enough=lambda found: [w for w, _ in found[runs.lost :]].count(1) >= 5)
    back = [worker for worker, _ in results[runs.lost :]].count(1)
    of = {worker: [numbers[0] for w, numbers in results if w == worker] for worker in (0, 1)}
    return {
        "after_the_kill": back,
        "common": len(set(of[0]) & set(of[1])),
        "repeated": [len(values) - len(set(values)) for values in of.values()],
        "steps": [len(values) for values in of.values()],
        "first_of_local": float(_first(pipeline)) == of[0][0],
    }


def _first(pipeline):
    pixels = np.reshape(next(iter(pipeline.training()))["inputs"].numpy().astype(np.int64), -1)
    return (pixels * (np.arange(1, pixels.size + 1) * 7_368_787 % 99_991_003)).sum()


def bad_worker(connection, cluster):
    """A worker that produces NaN is named, and so is one that cannot use its data."""
    from tests.engine.conftest import batches

    found = {}
    for label in ("nan", "data"):
        models, groups, optimizer = small_tasks(["a", "b"], spec="head")
        tasks = training_tasks(models, groups, optimizer, 40)

        def spoilt(start, worker=0, label=label):
            return batches(start, 0, bad_from=5) if label == "nan" else batches(start, 0).map(_refused)

        tasks[1] = dataclasses.replace(tasks[1], batches=spoilt)
        trainer, _ = trainer_of(connection, tasks, groups)
        try:
            trainer.run()
            found[label] = "no error"
        except errors.K4p1Error as e:
            found[label] = f"{type(e).__name__}: {e}"
    return found


def borrowing(connection, cluster):
    """Worker 1 is killed: its task borrows worker 0, or, where that is not allowed, the run stops."""
    found = {}
    for label, borrow in (("borrow", True), ("stop", False)):
        models, groups, optimizer = small_tasks(["a", "b"])
        tasks = training_tasks(models, groups, optimizer, 400)
        policy = WorkerPolicy(borrow_workers=borrow, no_worker_timeout_s=0.3)
        trainer, store = trainer_of(connection, tasks, groups, policy=policy)
        process = cluster.process("worker", 1)
        killer = threading.Thread(target=lambda t=trainer, p=process: _kill_after(t, p, 60))
        killer.start()
        try:
            trainer.run()
            found[label] = {task: sorted(counts) for task, counts in trainer.step_counts.steps.items()}
            found["done"] = store.done()
            found["missing"] = trainer.step_counts.missing
            found["interrupted"] = dict(trainer.step_counts.interrupted)
        except errors.ClusterError as e:
            found[label] = str(e)
        killer.join()
        while cluster.process("worker", 1) is None:
            time.sleep(0.1)
    return found


def silence(connection, cluster):
    """Worker 1 is stopped just after a result of it has come back; worker 0 goes on, and worker 1 when it is continued."""
    models, groups, optimizer = small_tasks(["a", "b"])
    tasks = training_tasks(models, groups, optimizer, 700)
    policy = WorkerPolicy(max_lead=0.9, steps_per_dispatch=1)
    trainer, store = trainer_of(connection, tasks, groups, policy=policy)
    process, finished, moments = cluster.process("worker", 1), trainer.dispatcher.finished, []

    def stopping(step, worker, result):
        finished(step, worker, result)
        if worker == 1 and not moments and trainer.step_counts.steps["b"][1] >= 20:
            process.send_signal(signal.SIGSTOP)
            moments.append(trainer.step_counts.steps["a"][0])
            threading.Timer(4.0, process.send_signal, [signal.SIGCONT]).start()
            threading.Timer(3.5, lambda: moments.append(trainer.step_counts.steps["a"][0])).start()

    trainer.dispatcher.finished = stopping
    trainer.run()
    return {"steps_meanwhile": moments[1] - moments[0], "done": store.done(), "missing": trainer.step_counts.missing}


def stores(connection, cluster):
    """The memory of a worker, MiB, after each of five stores with 33 MB of frozen weights."""
    from k4p1.engine.groups import ParameterGroup
    from k4p1.engine.packing import Packing

    found = []
    for number in range(5):
        values = np.full([2880, 2880], float(number), np.float32)
        packing = Packing(("v",), (values.shape,))
        group = ParameterGroup("frozen", "t", ("t",), "fixed", "backbone", packing, (keras.Variable(values),))
        store = ServerStore([group], {"t": 10}, devices=connection.devices)

        assert Runs(connection)(_reading(store, group), nothing, 3, workers=(0,))[-1][1] == [float(number)]
        status = pathlib.Path(f"/proc/{cluster.process('worker', 0).pid}/status").read_text()
        found.append(int(status.split("VmRSS:")[1].split()[0]) // 1024)
    return found


def _reading(store, group):
    def step(iterator):
        next(iterator)
        return tf.cast(store.read(group)["v"][0, :1], tf.float64)

    return step


def _kill_after(trainer, process, steps):
    while sum(sum(counts.values()) for counts in trainer.step_counts.steps.values()) < steps:
        time.sleep(0.005)
    process.kill()


def _refused(batch):
    message = ["task data: label out of range; got:", batch["label"]]
    with tf.control_dependencies([tf.debugging.Assert(tf.reduce_sum(batch["label"]) < 0, message)]):
        return {**batch, "weight": tf.identity(batch["weight"])}


EXPERIMENTS = (
    optimizers,
    tickets,
    one_worker,
    kinds,
    groups_of_workers,
    devices,
    frozen_weights,
    bad_worker,
    pipelines,
    borrowing,
    silence,
    stores,
)


def main():
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        run_record.announce(pathlib.Path(folder), run_record.UNKNOWN)
        processes = ForkServer((), pathlib.Path(folder))
        with LocalCluster(2, 2, pathlib.Path(folder), processes=processes) as cluster:
            connection = Connection(cluster.spec, 120.0)
            for experiment in EXPERIMENTS:
                if len(sys.argv) > 1 and experiment.__name__ not in sys.argv[1:]:
                    continue
                begin = time.monotonic()
                try:
                    found[experiment.__name__] = experiment(connection, cluster)
                except Exception:
                    found[experiment.__name__] = {"traceback": traceback.format_exc()}
                print(f"{experiment.__name__}: {time.monotonic() - begin:.1f} s", file=sys.stderr, flush=True)
    print(json.dumps(found), flush=True)
    os._exit(0)


if __name__ == "__main__":
    main()
