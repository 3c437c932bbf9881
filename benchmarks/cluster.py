"""Speed of a parameter-server cluster on this machine, as ratios of medians measured in turns within one run.

    python benchmarks/cluster.py [--rounds 5] [--steps 60] [--stand_ins 64]

One parameter server and two workers, all processes here; random weights and images: speed does not depend on them. Every
side's steps are given out by the same coordinator. The last line is one JSON object:

* `packed_over_plain`: steps/s with packed vectors over those with a server variable per Keras variable and Keras' optimizer;
* `packed_over_local`: the same over the one-process engine on the same cores;
* `resident_over_read`: steps/s with 32 MB of frozen weights kept by the workers, over reading them at every step;
* `steps_16_tasks_over_2`: steps/s of two workers that serve eight tasks each, over one each; tracing left out;
* `bytes_over_vectors`: bytes over the loopback interface a step, over the size of the vectors that a step reads and writes;
* `bf16_transport_bytes`: those bytes with `transport = 'bfloat16'`, over those with float32;
* `steps_per_dispatch_16_over_1`: steps/s of a tiny net on two workers with up to 16 steps a dispatch, over one;
* `coordinator_ms_per_step`: CPU of a coordinator that trains a tiny net on two workers, 16 steps a dispatch;
* `coordinator_ms_per_step_64`: the same with 64 workers that share one process, and four servers (`--stand_ins`);
* `cluster_over_two_processes`: steps/s of two workers, up to 16 steps a dispatch, over those of two processes of one thread
  that train without a cluster.

Before it come what `docs/cluster.md` estimates larger clusters from: costs of one step without parameters, and of one byte.
"""

import argparse
import itertools
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import threading
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")

from k4p1.cluster.local import LocalCluster
from k4p1.files import run_record

CLASSES, IMAGE_SIZE, BATCH_SIZE = 10, 64, 16
FROZEN_WIDTH, FROZEN_BATCH = 2880, 4
TINY_SIZE = 16
WORKERS = 2


class Turns:
    """Gives out steps: tells how long a number of them takes."""

    def __init__(self, connection):
        self._queue = connection.coordinator.queue
        self._queue.dispatcher = self
        self._lock = threading.Lock()
        self._left, self._working, self._steps, self._over = {}, set(), {}, threading.Event()

    def __call__(self, traced, steps):
        """Seconds of so many steps, in the mean; task i belongs to worker i modulo 2, whose tasks take turns."""
        from k4p1.cluster.tensorflow_private import Step

        with self._lock:
            queue = self._queue
            self._steps = {(t, w): Step(str(t), *traced[t], queue) for t in traced for w in range(WORKERS)}
            self._turns = {w: itertools.cycle([t for t in traced if t % WORKERS == w]) for w in range(WORKERS)}
            self._left = dict.fromkeys(range(WORKERS), steps // WORKERS)
            self._working, due = set(), sum(self._left.values())
            self._over.clear()
        start = time.perf_counter()
        self._queue.wake()
        self._over.wait()
        return (time.perf_counter() - start) * due / (due - sum(self._left.values()))

    def next_step(self, worker):
        with self._lock:
            if self._left.get(worker, 0) <= 0:
                return None
            self._working.add(worker)
            return self._steps[next(self._turns[worker]), worker]

    def finished(self, step, worker, result):
        from k4p1.cluster.several_steps import Results

        with self._lock:
            self._working.discard(worker)
            self._left[worker] -= len(Results.of(result).rows) if result.ndim == 2 else 1
            if not self._working and all(left <= 0 for left in self._left.values()):
                self._over.set()

    def interrupted(self, step):
        raise RuntimeError(f"worker {step.worker} is lost")

    def failed(self, error):
        print(error, flush=True)
        os._exit(1)


def random_batches(image_size, batch_size=BATCH_SIZE):
    """One batch, repeated: the pipeline is not what is measured."""
    import tensorflow as tf

    def batches(*_):
        batch = {
            "inputs": tf.random.uniform([batch_size, image_size, image_size, 3], 0, 255),
            "label": tf.random.uniform([batch_size], 0, CLASSES, tf.int64),
            "weight": tf.ones([batch_size]),
        }
        return tf.data.Dataset.from_tensors(batch).cache().repeat().prefetch(2)

    return batches


def traced(connection, function, batches):
    """A function of an iterator as the steps of one task."""
    import tensorflow as tf

    from k4p1.cluster.tensorflow_private import Step

    iterator = iter(connection.coordinator.create_per_worker_dataset(batches))
    step = Step("", tf.function(function, autograph=False), iterator, connection.coordinator.queue)
    return step.traced, iterator


def engine_step(store, schedule, patched, groups, name):
    """The engine's step on a store."""
    from k4p1.engine.pure import PureTask
    from k4p1.engine.step import Pace, training_step
    from k4p1.tasks.loss import TaskLoss
    from k4p1.tasks.objectives import CLASSIFICATION

    loss = TaskLoss.of("softmax_cross_entropy", CLASSIFICATION)
    return training_step(PureTask(name, patched, groups), store, loss, schedule, Pace(10**9, (1.0,), 0, 0))


def packed(connection, models, image_size, resident=True, batch_size=BATCH_SIZE, most=1, transport="float32"):
    """Steps of tasks on packed vectors, up to `most` a dispatch; and the store."""
    from k4p1.cluster.several_steps import several_steps
    from k4p1.cluster.store import ServerStore
    from k4p1.engine import OptimizerConfig, plan_groups
    from k4p1.engine.optimizers import RMSProp

    optimizer = OptimizerConfig(schedule="constant", optimizer=RMSProp())
    groups = plan_groups(models, optimizer.resolved())
    how = {"devices": connection.devices, "resident": resident, "transport": transport, "max_staleness": 40}
    store = ServerStore(groups, dict.fromkeys(models, 10**9), **how)
    store.allow(dict.fromkeys(models, 10**9))
    batches, steps = random_batches(image_size, batch_size), {}
    for number, (name, patched) in enumerate(models.items()):
        step = engine_step(store, optimizer.schedule, patched, groups, name)
        steps[number] = traced(connection, several_steps(step, store, name, most=most, seconds=0.5), batches)
    return steps, store


def plain(connection):
    """What TensorFlow's tutorial gives: variables of the model on the server, one each, and Keras' optimizer."""
    import keras
    import tensorflow as tf

    with connection.coordinator.strategy.scope():
        network = keras.applications.MobileNetV2(
            input_shape=(IMAGE_SIZE, IMAGE_SIZE, 3), alpha=0.35, weights=None, include_top=False, pooling="avg"
        )
        model = keras.Sequential([network, keras.layers.Dense(CLASSES)])
        model.build((None, IMAGE_SIZE, IMAGE_SIZE, 3))
        optimizer = keras.optimizers.RMSprop(1e-3)
        optimizer.build(model.trainable_variables)
    loss_function = keras.losses.SparseCategoricalCrossentropy(from_logits=True)

    def step(iterator):
        batch = next(iterator)
        with tf.GradientTape() as tape:
            loss = loss_function(batch["label"], model(batch["inputs"], training=True))
        variables = model.trainable_variables
        optimizer.apply_gradients(zip(tape.gradient(loss, variables), variables, strict=True))
        return tf.cast(loss, tf.float64)

    return {number: traced(connection, step, random_batches(IMAGE_SIZE)) for number in range(WORKERS)}


def local_stepper(models):
    """The one-process engine on the same tasks, in turns."""
    import tensorflow as tf

    from k4p1.engine import OptimizerConfig, Store, plan_groups
    from k4p1.engine.optimizers import RMSProp

    optimizer = OptimizerConfig(schedule="constant", optimizer=RMSProp())
    groups = plan_groups(models, optimizer.resolved())
    store = Store(groups, dict.fromkeys(models, 10**9))
    steps = [engine_step(store, optimizer.schedule, patched, groups, name) for name, patched in models.items()]
    functions = [tf.function(lambda iterator, step=step: step(next(iterator)).loss) for step in steps]
    iterators = [iter(random_batches(IMAGE_SIZE)()) for _ in models]

    def run(steps):
        start = time.perf_counter()
        for number in range(steps):
            functions[number % len(functions)](iterators[number % len(functions)]).numpy()
        return time.perf_counter() - start

    return run


def mobilenet_tasks(count):
    """Tasks on one MobileNetV2 0.35 whose weights learn from all."""
    from k4p1 import backbones
    from k4p1.patches.apply import apply_patches

    backbone = backbones.mobilenet_v2(width=0.35)
    how = {"classes": CLASSES, "image_size": IMAGE_SIZE, "shared_trained": True}
    return {f"t{i}": apply_patches(backbone, "scale_bias+head", name=f"t{i}", **how) for i in range(count)}


def two_processes(steps):
    """Steps/s of two processes together, each with a thread and a task of its own, and without a cluster."""
    command = [sys.executable, __file__, "--alone", "--steps", str(steps)]
    environment = {**os.environ, "TF_NUM_INTRAOP_THREADS": "1", "TF_NUM_INTEROP_THREADS": "2"}
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) for _ in range(WORKERS)]
    found = sum(float(process.communicate()[0].split()[-1]) for process in started)
    print(f"two processes: {found:.1f} steps/s", flush=True)
    return found


def alone(steps):
    """Trains without a cluster; the last word is steps/s."""
    run = local_stepper(mobilenet_tasks(1))
    run(max(10, steps // 4))
    print(steps / run(steps), flush=True)


def tiny_tasks(count):
    """Tasks on one small convolution."""
    import keras

    from k4p1 import backbones
    from k4p1.patches.apply import apply_patches

    image = keras.Input((None, None, 3))
    hidden = keras.layers.Conv2D(8, 3, strides=2, use_bias=False, name="stem")(image)
    hidden = keras.layers.ReLU(name="relu")(keras.layers.BatchNormalization(name="normalise")(hidden))
    model = keras.Model(image, keras.layers.GlobalAveragePooling2D(name="mean")(hidden), name="tiny")
    backbone = backbones.from_model(model, name="tiny", scaling="symmetric")
    how = {"classes": CLASSES, "image_size": TINY_SIZE, "shared_trained": True}
    return {f"t{i}": apply_patches(backbone, "scale_bias+head", name=f"t{i}", **how) for i in range(count)}


def coordinator_cost(connection, steps, tasks=WORKERS, most=16):
    """(CPU of this process in ms, seconds) per step while `ClusterTrainer` trains a tiny net, after a fifth of it."""
    from k4p1.cluster.policy import WorkerPolicy
    from k4p1.cluster.store import ServerStore
    from k4p1.cluster.trainer import ClusterTrainer
    from k4p1.cluster.worker_groups import WorkerRequest
    from k4p1.engine import OptimizerConfig, plan_groups
    from k4p1.engine.bookkeeping import TrainingTask
    from k4p1.engine.pure import PureTask
    from k4p1.engine.reporting import Reporter
    from k4p1.tasks.loss import TaskLoss
    from k4p1.tasks.objectives import CLASSIFICATION

    models, optimizer = tiny_tasks(tasks), OptimizerConfig(schedule="constant")
    groups = plan_groups(models, optimizer.resolved())
    targets = dict.fromkeys(models, steps // tasks)
    loss = TaskLoss.of("softmax_cross_entropy", CLASSIFICATION)
    batches = random_batches(TINY_SIZE, 4)
    listed = [
        TrainingTask(
            pure=PureTask(name, patched, groups),
            steps=targets[name],
            epochs=1.0,
            batches=batches,
            loss=loss,
            loss_terms=loss.names,
            metrics={},
            selecting="loss",
            validation=None,
            calibration=batches,
            schedule=optimizer.schedule,
        )
        for name, patched in models.items()
    ]
    store = ServerStore(groups, targets, devices=connection.devices, max_staleness=20 * connection.workers)
    policy, requests = WorkerPolicy(steps_per_dispatch=most), {name: WorkerRequest() for name in models}
    how = {"evaluate_every": 10**9, "checkpoint_every": 10**9}
    trainer = ClusterTrainer(connection, listed, store, requests, policy, Reporter(targets, quiet=True), **how)
    moments = []

    def sample():
        for share in (0.2, 0.95):
            while sum(trainer.dispatcher.done.values()) < share * steps:
                time.sleep(0.01)
            moments.append((sum(trainer.dispatcher.done.values()), time.process_time(), time.perf_counter()))

    threading.Thread(target=sample, daemon=True).start()
    trainer.run()
    (first, cpu, begin), (last, cpu_then, end) = moments
    cost, seconds = 1e3 * (cpu_then - cpu) / (last - first), (end - begin) / (last - first)
    late = sum(int(value) for name, value in store.snapshot().items() if "late/" in name)
    print(f"{tasks} tasks, {connection.workers} workers: {1 / seconds:.0f} steps/s, {cost:.3f} ms per step, {late} late")
    return cost, seconds


def stand_ins(count):
    """CPU of the coordinator, in ms per step, with so many workers that share one process, and four servers.

    The workers are TensorFlow servers like any others; only their number is more than this machine has cores.
    """
    from k4p1.cluster.spec import on_this_machine

    spec = on_this_machine(4, count)
    program = f"""
import json, os, threading, time
import tensorflow as tf
config = tf.compat.v1.ConfigProto(inter_op_parallelism_threads=4, intra_op_parallelism_threads=1)
jobs = json.loads({json.dumps({job: list(addresses) for job, addresses in spec.jobs.items()})!r})
parent = os.getppid()
servers = [
    tf.distribute.Server(tf.train.ClusterSpec(jobs), job_name=job, task_index=index, protocol="grpc", config=config)
    for job in %r for index in range(len(jobs[job]))
]
while os.getppid() == parent:
    time.sleep(0.5)
os._exit(0)
"""
    started = [subprocess.Popen([sys.executable, "-c", program % (jobs,)]) for jobs in (["ps"], ["worker"])]
    try:
        from k4p1.cluster.connection import Connection

        cost, _ = coordinator_cost(Connection(spec, 300.0), 100 * count, tasks=16)
        print(json.dumps({"coordinator_ms_per_step_64": round(cost, 3)}), flush=True)
    finally:
        for process in started:
            process.kill()
            process.wait()
    os._exit(0)


def frozen_tasks():
    """Two tasks on 32 MB of frozen weights: two dense layers of which the second is 2,880 by 2,880."""
    import keras

    from k4p1 import backbones
    from k4p1.patches.apply import apply_patches

    image = keras.Input((None, None, 3))
    hidden = keras.layers.GlobalAveragePooling2D(name="mean")(image)
    for number in range(2):
        hidden = keras.layers.Dense(FROZEN_WIDTH, activation="relu", name=f"wide_{number}")(hidden)
    model = keras.Model(image, hidden, name="wide")
    backbone = backbones.from_model(model, name="wide", scaling="symmetric")
    how = {"classes": CLASSES, "image_size": 8, "shared_trained": False}
    return {f"t{i}": apply_patches(backbone, "head", name=f"t{i}", **how) for i in range(WORKERS)}


def rates(contestants, rounds, steps):
    """Median steps/s of each contestant, in turns; the first round warms up."""
    found = {name: [] for name in contestants}
    for round_ in range(rounds + 1):
        for name, run in contestants.items():
            seconds = run(steps)
            if round_:
                found[name].append(steps / seconds)
    medians = {name: statistics.median(values) for name, values in found.items()}
    for name, value in medians.items():
        print(f"{name}: {value:.1f} steps/s", flush=True)
    return medians


def loopback_bytes():
    """Bytes that went over the loopback interface so far."""
    lines = pathlib.Path("/proc/net/dev").read_text().splitlines()
    return int(next(line for line in lines if line.strip().startswith("lo:")).split(":")[1].split()[0])


def measure(connection, rounds, steps):
    """All ratios."""
    import tensorflow as tf

    turns, ratios = Turns(connection), {}
    models = mobilenet_tasks(WORKERS)
    two, store = packed(connection, models, IMAGE_SIZE)
    many, _ = packed(connection, models, IMAGE_SIZE, most=16)
    by_hand, in_process = plain(connection), local_stepper(models)
    found = rates(
        {
            "packed vectors": lambda n: turns(two, n),
            "packed vectors, up to 16 steps a dispatch": lambda n: turns(many, n),
            "one variable each": lambda n: turns(by_hand, n),
            "one process": in_process,
        },
        rounds,
        steps,
    )
    ratios["cluster_over_two_processes"] = found["packed vectors, up to 16 steps a dispatch"] / two_processes(rounds * steps)
    ratios["packed_over_plain"] = found["packed vectors"] / found["one variable each"]
    ratios["packed_over_local"] = found["packed vectors"] / found["one process"]

    before = loopback_bytes()
    turns(two, steps)
    a_step = (loopback_bytes() - before) / steps
    print(f"bytes a step: {a_step:,.0f} counted, {store.step_bytes('t0'):,} in vectors")
    ratios["bytes_over_vectors"] = a_step / store.step_bytes("t0")

    halved, _ = packed(connection, models, IMAGE_SIZE, transport="bfloat16")
    turns(halved, steps)
    before = loopback_bytes()
    turns(halved, steps)
    ratios["bf16_transport_bytes"] = (loopback_bytes() - before) / steps / a_step

    tiny = {most: packed(connection, tiny_tasks(WORKERS), TINY_SIZE, most=most)[0] for most in (1, 16)}
    contestants = {f"{most} a dispatch": lambda n, most=most: turns(tiny[most], n) for most in tiny}
    found = rates(contestants, rounds, 5 * steps)
    ratios["steps_per_dispatch_16_over_1"] = found["16 a dispatch"] / found["1 a dispatch"]
    ratios["coordinator_ms_per_step"], _ = coordinator_cost(connection, 40 * steps)

    frozen = frozen_tasks()
    kept, _ = packed(connection, frozen, 8, batch_size=FROZEN_BATCH)
    read, read_store = packed(connection, frozen, 8, resident=False, batch_size=FROZEN_BATCH)
    contestants = {"kept by workers": lambda n: turns(kept, n), "read at every step": lambda n: turns(read, n)}
    found = rates(contestants, rounds, steps)
    ratios["resident_over_read"] = found["kept by workers"] / found["read at every step"]
    seconds_a_byte = (1 / found["read at every step"] - 1 / found["kept by workers"]) / read_store.step_bytes("t0")
    print(f"cost of one more byte a step: {1e9 * seconds_a_byte:.3f} ns, both workers at once")

    empty = {i: traced(connection, lambda iterator: tf.zeros([5], tf.float64), random_batches(8)) for i in range(WORKERS)}
    cpu = time.process_time()
    seconds = turns(empty, 20 * steps)
    cpu = (time.process_time() - cpu) / (20 * steps)
    print(f"a step that does nothing: {1e3 * seconds / (20 * steps):.2f} ms, coordinator's CPU {1e3 * cpu:.2f} ms")

    sixteen, _ = packed(connection, mobilenet_tasks(16), IMAGE_SIZE)
    turns(sixteen, 64)
    found = rates({"2 tasks": lambda n: turns(two, n), "16 tasks": lambda n: turns(sixteen, n)}, rounds, max(steps, 64))
    ratios["steps_16_tasks_over_2"] = found["16 tasks"] / found["2 tasks"]
    return ratios


def main():
    """Starts the cluster, measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--stand_ins", type=int, help="only coordinator_ms_per_step_64, with so many workers")
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    a = parser.parse_args()
    a.steps += a.steps % WORKERS
    if a.alone or a.stand_ins:
        return alone(a.steps) if a.alone else stand_ins(a.stand_ins)
    with tempfile.TemporaryDirectory() as folder:
        run_record.announce(pathlib.Path(folder), run_record.UNKNOWN)
        with LocalCluster(1, WORKERS, pathlib.Path(folder)) as cluster:
            from k4p1.cluster.connection import Connection

            ratios = measure(Connection(cluster.spec, 120.0), a.rounds, a.steps)
    print(json.dumps({name: round(value, 3) for name, value in ratios.items()}), flush=True)
    os._exit(0)  # the threads of connections never stop


if __name__ == "__main__":
    main()
