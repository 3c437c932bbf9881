"""Speed of a parameter-server cluster on this machine, as ratios of medians measured in turns within one run.

    python benchmarks/cluster.py [--rounds 5] [--steps 60]

One parameter server and two workers, all processes here; random weights and images: speed does not depend on them. Every
side's steps are given out by the same coordinator. The last line is one JSON object:

* `packed_over_plain`: steps/s with packed vectors over those with a server variable per Keras variable and Keras' optimizer;
* `packed_over_local`: the same over the one-process engine on the same cores;
* `resident_over_read`: steps/s with 32 MB of frozen weights kept by the workers, over reading them at every step;
* `steps_16_tasks_over_2`: steps/s of two workers that serve eight tasks each, over one each; tracing left out;
* `bytes_over_vectors`: bytes over the loopback interface a step, over the size of the vectors that a step reads and writes.

Before it come what `docs/cluster.md` estimates larger clusters from: costs of one step without parameters, and of one byte.
"""

import argparse
import json
import os
import pathlib
import statistics
import tempfile
import threading
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")

from k4p1.cluster.local import LocalCluster
from k4p1.files import run_record

CLASSES, IMAGE_SIZE, BATCH_SIZE = 10, 64, 16
FROZEN_WIDTH, FROZEN_BATCH = 2880, 4
WORKERS = 2


class Turns:
    """Gives out steps: tells how long a number of them takes."""

    def __init__(self, connection):
        self._queue = connection.coordinator.queue
        self._queue.dispatcher = self
        self._lock = threading.Lock()
        self._left, self._open, self._steps, self._over = {}, 0, {}, threading.Event()

    def __call__(self, traced, steps):
        """Seconds of an even number of steps; task i belongs to worker i modulo 2, whose tasks take turns."""
        from k4p1.cluster.tensorflow_private import Step

        with self._lock:
            self._open = steps
            queue = self._queue
            self._steps = {(t, w): Step(str(t), *traced[t], queue) for t in traced for w in range(WORKERS)}
            self._left = {w: [t for t in range(len(traced)) if t % WORKERS == w] * steps for w in range(WORKERS)}
            self._left = {w: tasks[: steps // WORKERS] for w, tasks in self._left.items()}
            self._over.clear()
        start = time.perf_counter()
        self._queue.wake()
        self._over.wait()
        return time.perf_counter() - start

    def next_step(self, worker):
        with self._lock:
            if not self._left.get(worker):
                return None
            task = self._left[worker].pop(0)
        return self._steps[task, worker]

    def finished(self, step, worker, result):
        with self._lock:
            self._open -= 1
            if not self._open:
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
    step = Step("", tf.function(function), iterator, connection.coordinator.queue)
    return step.traced, iterator


def engine_steps(store, schedule, patched, groups, name):
    """The engine's step on a store, as a function of an iterator."""
    from k4p1.cluster.trainer import packed_step
    from k4p1.engine.pure import PureTask
    from k4p1.engine.step import Pace, training_step
    from k4p1.tasks.loss import TaskLoss
    from k4p1.tasks.objectives import CLASSIFICATION

    loss = TaskLoss.of("softmax_cross_entropy", CLASSIFICATION)
    step = training_step(PureTask(name, patched, groups), store, loss, schedule, Pace(10**9, (1.0,), 0, 0))
    return packed_step(step)


def packed(connection, models, image_size, resident=True, batch_size=BATCH_SIZE):
    """Steps of tasks on packed vectors; and the store."""
    from k4p1.cluster.store import ServerStore
    from k4p1.engine import OptimizerConfig, plan_groups
    from k4p1.engine.optimizers import RMSProp

    optimizer = OptimizerConfig(schedule="constant", optimizer=RMSProp())
    groups = plan_groups(models, optimizer.resolved())
    store = ServerStore(groups, dict.fromkeys(models, 10**9), devices=connection.devices, resident=resident)
    batches = random_batches(image_size, batch_size)
    steps = {
        number: traced(connection, engine_steps(store, optimizer.schedule, patched, groups, name), batches)
        for number, (name, patched) in enumerate(models.items())
    }
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
    functions = [tf.function(engine_steps(store, optimizer.schedule, m, groups, name)) for name, m in models.items()]
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
    by_hand, in_process = plain(connection), local_stepper(models)
    found = rates(
        {
            "packed vectors": lambda n: turns(two, n),
            "one variable each": lambda n: turns(by_hand, n),
            "one process": in_process,
        },
        rounds,
        steps,
    )
    ratios["packed_over_plain"] = found["packed vectors"] / found["one variable each"]
    ratios["packed_over_local"] = found["packed vectors"] / found["one process"]

    before = loopback_bytes()
    turns(two, steps)
    a_step = (loopback_bytes() - before) / steps
    print(f"bytes a step: {a_step:,.0f} counted, {store.step_bytes('t0'):,} in vectors")
    ratios["bytes_over_vectors"] = a_step / store.step_bytes("t0")

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
    a = parser.parse_args()
    a.steps += a.steps % WORKERS
    with tempfile.TemporaryDirectory() as folder:
        run_record.announce(pathlib.Path(folder), "")
        with LocalCluster(1, WORKERS, pathlib.Path(folder)) as cluster:
            from k4p1.cluster.connection import Connection

            ratios = measure(Connection(cluster.spec, 120.0), a.rounds, a.steps)
    print(json.dumps({name: round(value, 3) for name, value in ratios.items()}), flush=True)
    os._exit(0)  # the threads of connections never stop


if __name__ == "__main__":
    main()
