"""How fast the processes of a local cluster start, forked from one that has imported TensorFlow or each anew, in one run.

    python benchmarks/start.py [--workers 4] [--rounds 3]

One parameter server and some workers, from nothing until all of them serve; then a worker is killed, until it serves again.
The last line is one JSON object, of medians:

* `start_forked_over_new`: seconds of a start with forks over those of a start of new processes;
* `restart_forked_over_new`: the same of the killed worker.
"""

import argparse
import json
import os
import pathlib
import statistics
import tempfile
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")

from k4p1.cluster.fork_server import ForkServer, NewProcesses
from k4p1.cluster.local import LocalCluster
from k4p1.files import run_record


def measure(make, workers: int) -> tuple[float, float]:
    """Seconds until all serve, and until a killed worker serves again."""
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder)
        run_record.announce(path, run_record.UNKNOWN)
        begin = time.monotonic()
        processes = make(path)
        with LocalCluster(1, workers, path, processes=processes) as cluster:
            roles = [cluster.spec.of("ps", 0), *(cluster.spec.of("worker", index) for index in range(workers))]

            def wait_for(role, times: int) -> None:
                while not cluster.log(role).exists() or cluster.log(role).read_text().count("serving at") < times:
                    if cluster.failure is not None:
                        raise SystemExit(cluster.failure)
                    time.sleep(0.02)

            for role in roles:
                wait_for(role, 1)
            started = time.monotonic() - begin
            begin = time.monotonic()
            cluster.kill("worker", 0)
            wait_for(roles[1], 2)
            restarted = time.monotonic() - begin
        processes.close()
        return started, restarted


def main():
    """Measures in turns, and prints the ratios."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    a = parser.parse_args()
    makers = {"forked": lambda path: ForkServer((), path), "new": lambda path: NewProcesses()}
    found = {name: [] for name in makers}
    for number in range(a.rounds):
        for name, make in makers.items():
            found[name].append(measure(make, a.workers))
            print(
                f"round {number + 1}, {name}: start {found[name][-1][0]:.1f} s, restart {found[name][-1][1]:.1f} s",
                flush=True,
            )
    medians = {name: [statistics.median(times) for times in zip(*pairs, strict=True)] for name, pairs in found.items()}
    ratios = [forked / new for forked, new in zip(medians["forked"], medians["new"], strict=True)]
    print(json.dumps(dict(zip(("start_forked_over_new", "restart_forked_over_new"), ratios, strict=True))))


if __name__ == "__main__":
    main()
