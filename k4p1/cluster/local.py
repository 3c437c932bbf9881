"""A cluster of processes on this machine: started, watched, restarted when they die, and stopped."""

import contextlib
import dataclasses
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence

from k4p1 import errors, log_lines
from k4p1.cluster.fork_server import ForkServer, NewProcesses, Process
from k4p1.cluster.network_namespace import Namespace
from k4p1.cluster.spec import COORDINATOR, SERVER, WORKER, ClusterSpec, on_this_machine
from k4p1.files import run_lock, run_record

_LOOK_SECONDS = 0.2
_STOP_SECONDS = 60.0
_MOST_RESTARTS = 100
_LONGEST_PAUSE_SECONDS = 30.0
_REFUSALS = (1, 2)
_IMPORTED = ("keras", "k4p1.cli.main", "k4p1.cli.gin_config")
"""What the processes of a local cluster have in common."""
_OPEN = (
    "TensorFlow's servers listen on all interfaces, without authentication, while this local cluster runs (no network of "
    "its own: {})"
)


@dataclasses.dataclass
class _Member:
    """A server or worker: its process, how often it was restarted, and how often in a row without success."""

    spec: ClusterSpec
    process: Process | None = None
    restarts: int = 0
    in_vain: int = 0
    next_start: float = 0.0
    over: bool = False


class LocalCluster:
    """`with LocalCluster(...) as cluster:` runs servers and workers as processes on free ports of 127.0.0.1.

    A process that dies is restarted, after a pause that doubles when it dies again before it serves; one that refuses to
    run, or does not get to serve again and again, ends the cluster.

    Args:
      servers, workers: how many.
      model_dir: the folder of the run; its `logs/` gets one file per role.
      flags: of the command line, which the processes compare with the run's: `--gin_file`, `--gin_bindings`.
      restarts: how many failed starts in a row are tolerated.
      environment: further variables of servers and workers.
      processes: how they are started; each as a process of its own if not given.

    Attributes:
      spec: the cluster, seen by its coordinator.
      failure: why the cluster ended; None while it is well.
      refusal: the exit code of a member that refused to run, if that is why.
    """

    def __init__(
        self,
        servers: int,
        workers: int,
        model_dir: pathlib.Path,
        flags: Sequence[str] = (),
        *,
        restarts: int = 5,
        environment: Mapping[str, str] | None = None,
        processes: NewProcesses | ForkServer | None = None,
    ):
        self.spec = on_this_machine(servers, workers)
        self.failure: str | None = None
        self.refusal: int | None = None
        self._model_dir, self._flags, self._restarts = model_dir, list(flags), restarts
        self._environment = dict(environment or {})
        self._processes = processes or NewProcesses()
        self._members = [
            _Member(self.spec.of(job, index)) for job in (SERVER, WORKER) for index in range(len(self.spec.jobs[job]))
        ]
        self._stopping = threading.Event()
        self._lock = threading.Lock()
        self._watcher = threading.Thread(target=self._watch, name="watch local cluster", daemon=True)

    def __enter__(self) -> "LocalCluster":
        (self._model_dir / "logs").mkdir(parents=True, exist_ok=True)
        try:
            for member in self._members:
                self._start(member)
        except OSError:
            self._stop()
            raise
        self._watcher.start()
        return self

    def __exit__(self, *_) -> None:
        self._stop()
        self._watcher.join()

    def _stop(self) -> None:
        """Servers and workers hold nothing that could be saved: they are killed."""
        self._stopping.set()
        with self._lock:
            running = [member.process for member in self._members if member.process is not None]
            for process in running:
                process.kill()
            for process in running:
                process.wait()

    def kill(self, job: str, index: int) -> None:
        """Kills a member with SIGKILL, as a crash would; it is restarted."""
        process = self.process(job, index)
        if process is not None:
            process.kill()

    def process(self, job: str, index: int) -> Process | None:
        """The present process of a member; None between two of them."""
        with self._lock:
            return next(m.process for m in self._members if (m.spec.job, m.spec.index) == (job, index))

    def log(self, spec: ClusterSpec) -> pathlib.Path:
        """The log file of a role."""
        return self._model_dir / "logs" / f"{spec.job}_{spec.index}.log"

    def _start(self, member: _Member) -> None:
        arguments = ["join", "--model_dir", str(self._model_dir), *self._flags]
        environment = {**_threads(member.spec), **os.environ, "TF_CONFIG": member.spec.as_tf_config(), **_gpu(member.spec)}
        environment |= self._environment
        member.process = self._processes.start(
            arguments, environment, self.log(member.spec), f"{member.spec.job} {member.spec.index}"
        )

    def _watch(self) -> None:
        while not self._stopping.wait(_LOOK_SECONDS):
            with self._lock:
                for member in self._members:
                    if self._stopping.is_set() or member.over:
                        continue
                    try:
                        self._watch_over(member)
                    except OSError as e:
                        self.failure, member.over = f"cannot watch {member.spec.name}: {e}", True

    def _watch_over(self, member: _Member) -> None:
        now = time.monotonic()
        if member.process is not None:
            code = member.process.poll()
            if code is None:
                return
            member.process.wait()
            if code == 0:
                member.over = True
                return
            if code in _REFUSALS:
                self.failure, self.refusal = self._last_line(member), code
                member.over = True
                return
            served = f"(process {member.process.pid})" in self._said(member)
            member.restarts, member.in_vain = member.restarts + 1, 0 if served else member.in_vain + 1
            if member.in_vain > self._restarts or member.restarts > _MOST_RESTARTS:
                times = f"{member.in_vain} times before it served" if member.in_vain else f"{member.restarts} times"
                self.failure = f"{member.spec.name} died {times}; {self._last_line(member)}"
                member.over = True
                return
            pause = min(_LONGEST_PAUSE_SECONDS, 0.5 * 2**member.in_vain)
            member.process, member.next_start = None, now + pause
            print(f"{member.spec.name} ended ({_reason(code)}); starting it again", file=sys.stderr, flush=True)
        elif now >= member.next_start:
            self._start(member)

    def _last_line(self, member: _Member) -> str:
        lines = [line for line in self._said(member).splitlines() if line.strip()]
        said = log_lines.text_of(lines[-1]).removeprefix("k4p1: ")[:300] if lines else "it said nothing"
        return f"{member.spec.name}: {said} ({self.log(member.spec)})"

    def _said(self, member: _Member) -> str:
        return self.log(member.spec).read_text(encoding="utf-8", errors="replace")


def launch(
    command: str,
    flags: Sequence[str],
    model_dir: pathlib.Path,
    servers: int,
    workers: int,
    configuration: run_record.Configuration = run_record.UNKNOWN,
) -> int:
    """Runs a command as coordinator of a local cluster; returns its exit code when everything is stopped.

    Args:
      command: `train` or `finetune`.
      flags: of the coordinator that servers and workers share: `--gin_file`, `--gin_bindings`.
      model_dir: of the run.
      servers, workers: how many.
      configuration: of its gin files; announced before anybody looks for it.

    Raises:
      ConfigError: the folder holds something else, or another coordinator is using it.
      ConfigError, ArtifactError: a server or worker refuses to run.
      ClusterError: the coordinator was killed or crashed, or a server or worker dies again and again.
    """
    model_dir = model_dir.absolute()
    run_lock.check_usable(model_dir)
    with run_lock.run_lock(model_dir, run_lock.LAUNCHER):  # before anything is announced: servers of another run would leave
        run_record.announce(model_dir, configuration)
        return _launch(command, flags, model_dir, servers, workers)


def _launch(command: str, flags: Sequence[str], model_dir: pathlib.Path, servers: int, workers: int) -> int:
    shared = [flag for flag in flags if not flag.startswith(("--resume", "--noresume", "--metrics_port"))]
    caught: list[int] = []
    with contextlib.ExitStack() as held:
        namespace = held.enter_context(Namespace())
        if namespace.why_not:
            print(_OPEN.format(namespace.why_not), file=sys.stderr, flush=True)
        inside = namespace.environment()
        processes = NewProcesses() if _gpus() else ForkServer(_IMPORTED, model_dir)
        held.callback(processes.close)
        cluster = LocalCluster(servers, workers, model_dir, shared, environment=inside, processes=processes)
        held.enter_context(cluster)
        environment = {**os.environ, **inside, "TF_CONFIG": cluster.spec.as_tf_config(), **_gpu(cluster.spec)}
        coordinator = processes.start([command, "--model_dir", str(model_dir), *flags], environment, name=command)

        def forward(number, _frame) -> None:
            caught.append(number)
            coordinator.send_signal(number)

        before = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            while coordinator.poll() is None and cluster.failure is None:
                time.sleep(_LOOK_SECONDS)
            if cluster.failure is not None:
                coordinator.send_signal(signal.SIGTERM)
            code = coordinator.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            coordinator.kill()
            code = coordinator.wait()
        finally:
            if coordinator.poll() is None:
                coordinator.kill()
                coordinator.wait()
            for number, handler in before.items():
                signal.signal(number, handler)
    if cluster.failure is not None and code != 0:
        kinds = {1: errors.ConfigError, 2: errors.ArtifactError}
        raise kinds.get(cluster.refusal, errors.ClusterError)(cluster.failure)
    if code < 0 and caught:
        return 130 if caught[0] == signal.SIGINT else 75
    if code < 0:
        raise errors.ClusterError(
            f"the coordinator is lost ({_reason(code)}); the same command resumes from the newest checkpoint in {model_dir}"
        )
    return code


def _reason(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit {code}"


def _threads(spec: ClusterSpec) -> dict[str, str]:
    """The cores divided among the workers; the environment may say otherwise."""
    return {"TF_NUM_INTRAOP_THREADS": str(max(1, (os.cpu_count() or 1) // len(spec.jobs[WORKER])))}


def _gpu(spec: ClusterSpec) -> dict[str, str]:
    """One GPU per worker, in turn; none for servers, and for the coordinator only one that no worker has."""
    gpus = _gpus()
    if not gpus or spec.job == SERVER:
        return {"CUDA_VISIBLE_DEVICES": "-1"}
    if spec.job == COORDINATOR:
        workers = len(spec.jobs[WORKER])
        return {"CUDA_VISIBLE_DEVICES": gpus[workers] if workers < len(gpus) else "-1"}
    return {"CUDA_VISIBLE_DEVICES": gpus[spec.index % len(gpus)]}


def _gpus() -> list[str]:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name for name in visible.split(",") if name not in ("", "-1")]
    listed = pathlib.Path("/proc/driver/nvidia/gpus")
    return [str(index) for index in range(len(list(listed.iterdir())))] if listed.is_dir() else []
