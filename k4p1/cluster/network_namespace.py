"""A network of its own for the processes of a local cluster, where the system lets a user make one.

TensorFlow's servers listen on all interfaces, and ask nobody who he is. In a network namespace that holds nothing but a
loopback device, all interfaces are that one: nobody outside can connect, and nobody inside gets out. A process of its own
makes the namespace and ends; open files of the launcher keep it, so that no death of another process takes it away. The
processes of the cluster enter it before they start TensorFlow. The run itself stays outside: it downloads, reads and writes,
and is no part of the cluster's network.
"""

import contextlib
import ctypes
import fcntl
import os
import pathlib
import socket
import struct
import subprocess
import sys

VARIABLE = "K4P1_NETWORK_NAMESPACE"
"""Environment variable: where the namespaces are, kind=path; `open`, given by a user: make none."""
OPEN = "open"

_KINDS = ("user", "net")
_NEW_NET, _NEW_USER = 0x40000000, 0x10000000
_READ_FLAGS, _WRITE_FLAGS, _UP = 0x8913, 0x8914, 0x1
_READY = "ready"


class Namespace:
    """`with Namespace() as namespace:` keeps a namespace, if it could be made.

    Attributes:
      why_not: what the system said, where there is none.
    """

    def __init__(self):
        self.why_not = ""
        self._open: dict[str, int] = {}

    def __enter__(self) -> "Namespace":
        if os.environ.get(VARIABLE) == OPEN:
            self.why_not = f"{VARIABLE}={OPEN}"
        elif sys.platform != "linux":
            self.why_not = f"{sys.platform} has no network namespaces"
        else:
            self._make()
        return self

    def _make(self) -> None:
        command = [sys.executable, "-c", f"from {__name__} import make; make()"]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        with subprocess.Popen(command, start_new_session=True, **pipes) as maker:  # which ends when its input does
            said = maker.stdout.readline().strip()
            if said == _READY:
                self._open = {kind: os.open(f"/proc/{maker.pid}/ns/{kind}", os.O_RDONLY) for kind in _KINDS}
            else:
                self.why_not = said or "the process that makes it ended"

    def __exit__(self, *_) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)
        self._open = {}

    def environment(self) -> dict[str, str]:
        """What processes are told that should enter it."""
        paths = [f"{kind}=/proc/{os.getpid()}/fd/{descriptor}" for kind, descriptor in self._open.items()]
        return {VARIABLE: ",".join(paths)} if paths else {}


def make() -> None:
    """Makes a namespace around this process, says so, and waits until it is told to end."""
    libc = ctypes.CDLL(None, use_errno=True)
    user, group = os.getuid(), os.getgid()
    if libc.unshare(_NEW_NET):
        if libc.unshare(_NEW_NET | _NEW_USER):
            print(os.strerror(ctypes.get_errno()), flush=True)
            return
        with contextlib.suppress(OSError):  # files keep their owners
            pathlib.Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
            pathlib.Path("/proc/self/setgroups").write_text("deny")
            pathlib.Path("/proc/self/gid_map").write_text(f"{group} {group} 1")
    try:
        _bring_up_loopback()
    except OSError as e:
        print(e.strerror, flush=True)
        return
    print(_READY, flush=True)
    sys.stdin.read()


def _bring_up_loopback() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        request = struct.pack("16sh14x", b"lo", 0)
        _, flags = struct.unpack("16sh14x", fcntl.ioctl(any_socket, _READ_FLAGS, request))
        fcntl.ioctl(any_socket, _WRITE_FLAGS, struct.pack("16sh14x", b"lo", flags | _UP))


def enter_if_told() -> None:
    """Enters the namespace that the environment names; this process must not have threads yet.

    Raises:
      OSError: it is gone, or may not be entered.
    """
    told = os.environ.get(VARIABLE, "")
    paths = dict(part.split("=", 1) for part in told.split(",") if "=" in part)
    libc = ctypes.CDLL(None, use_errno=True)
    with contextlib.ExitStack() as opened:
        descriptors = []
        for kind, path in paths.items():  # all before the first is entered, which may not look outside any more
            if os.readlink(path) != os.readlink(f"/proc/self/ns/{kind}"):
                descriptors.append(os.open(path, os.O_RDONLY))
                opened.callback(os.close, descriptors[-1])
        for descriptor in descriptors:
            if libc.setns(descriptor, 0):
                number = ctypes.get_errno()
                raise OSError(number, f"cannot enter the network of the local cluster: {os.strerror(number)}")
