"""`--metrics_port`: what `status.json` says, as text for Prometheus (exposition format 0.0.4), over HTTP."""

import contextlib
import http.server
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from k4p1 import errors
from k4p1.files.status_file import StatusFile

_OF_TASKS = {
    "done": ("k4p1_steps_total", "counter", "Steps that a task has taken."),
    "target": ("k4p1_steps_target", "gauge", "Steps that a task shall take."),
    "saved": ("k4p1_steps_saved", "gauge", "Steps in the newest checkpoint."),
    "interrupted": ("k4p1_interrupted_steps_total", "counter", "Steps lost with their worker."),
    "loss": ("k4p1_loss", "gauge", "Mean loss of the last steps."),
    "steps_per_s": ("k4p1_steps_per_second", "gauge", "Speed of a task."),
    "examples_per_s": ("k4p1_examples_per_second", "gauge", "Speed of a task."),
    "staleness_mean": ("k4p1_staleness_mean", "gauge", "Updates by others between read and update, since the start."),
    "staleness_max": ("k4p1_staleness_max", "gauge", "The largest staleness since the start."),
}


def render(status: Mapping[str, Any]) -> str:
    """The metrics of a run.

    Args:
      status: what `status.json` holds.
    """
    lines = [*_family("k4p1_run", "gauge", "1, by state of the run.", [({"state": status["state"]}, 1)])]
    tasks = status["tasks"]
    for field, (name, kind, meaning) in _OF_TASKS.items():
        lines += _family(
            name, kind, meaning, [({"task": t}, v[field]) for t, v in tasks.items() if v.get(field) is not None]
        )
    measured = [
        ({"task": task, "metric": name.removeprefix("validation_")}, value)
        for task, values in tasks.items()
        for name, value in values.items()
        if name.startswith("validation_")
    ]
    lines += _family("k4p1_validation", "gauge", "The newest metrics on validation splits.", measured)
    states = Counter(values.get("state") or "unknown" for values in status["workers"].values())
    lines += _family("k4p1_workers", "gauge", "Workers by state.", [({"state": s}, n) for s, n in sorted(states.items())])
    missing = [({"owner": owner}, values.get("missing", 0)) for owner, values in status["owners"].items()]
    lines += _family("k4p1_missing_updates_total", "counter", "Updates that did not arrive, by owner.", missing)
    return "\n".join(lines) + "\n"


def _family(name: str, kind: str, meaning: str, samples: list[tuple[Mapping[str, str], float]]) -> list[str]:
    if not samples:
        return []
    lines = [f"# HELP {name} {meaning}", f"# TYPE {name} {kind}"]
    for labels, value in samples:
        named = ",".join(f'{label}="{_escaped(text)}"' for label, text in labels.items())
        lines.append(f"{name}{{{named}}} {float(value)!r}")
    return lines


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


@contextlib.contextmanager
def metrics_server(status: StatusFile, port: int | None) -> Iterator[None]:
    """Serves `/metrics` on all interfaces; nothing without a port.

    Raises:
      ConfigError: the port cannot be used.
    """
    if port is None:
        yield
        return

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            if self.path.split("?")[0] != "/metrics":
                self.send_error(404)
                return
            body = render(status.copy()).encode()
            self.send_response(200)
            self.send_header("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            """Who scrapes is no news."""

    try:
        server = http.server.ThreadingHTTPServer(("", port), Handler)
    except OSError as e:
        raise errors.ConfigError(
            f"{errors.option('metrics_port')}={port} cannot be used ({e.strerror}); give another port"
        ) from e
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, name="metrics server", daemon=True).start()
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
