"""A network of its own for the processes of a local cluster, where the system lets a user make one.

TensorFlow's servers listen on all interfaces, and ask nobody who he is. In a network namespace that holds nothing but a
loopback device, all interfaces are that one: nobody outside can connect, and nobody inside gets out. A process that does
nothing else makes the namespace and holds it; the others enter it before they start TensorFlow. The run itself stays
outside: it downloads, reads and writes, and is no part of the cluster's network.
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
"""Environment variable: the process that holds the namespace; `open`, given by a user: make none."""
OPEN = "open"

_NEW_NET, _NEW_USER = 0x40000000, 0x10000000
_READ_FLAGS, _WRITE_FLAGS, _UP = 0x8913, 0x8914, 0x1


class Namespace:
    """`with Namespace() as namespace:` holds a namespace, if it could be made.

    Attributes:
      holder: the process that holds it; None: there is none.
      why_not: what the system said, where there is none.
    """

    def __init__(self):
        self.holder: int | None = None
        self.why_not = ""
        self._process: subprocess.Popen | None = None

    def __enter__(self) -> "Namespace":
        if os.environ.get(VARIABLE) == OPEN:
            self.why_not = f"{VARIABLE}={OPEN}"
            return self
        if sys.platform != "linux":
            self.why_not = f"{sys.platform} has no network namespaces"
            return self
        self._process = subprocess.Popen(
            [sys.executable, "-c", f"from {__name__} import hold; hold()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        said = self._process.stdout.readline().strip()
        if said == "ready":
            self.holder = self._process.pid
        else:
            self.why_not = said or "the process that makes it ended"
        return self

    def __exit__(self, *_) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process.stdin.close()
            self._process.stdout.close()

    def environment(self) -> dict[str, str]:
        """What processes are told that should enter it."""
        return {} if self.holder is None else {VARIABLE: str(self.holder)}


def hold() -> None:
    """Makes a namespace, says so, and holds it until the process that started this one is gone."""
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
    print("ready", flush=True)
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
    holder = os.environ.get(VARIABLE, "")
    if not holder.isdigit():
        return
    libc = ctypes.CDLL(None, use_errno=True)
    for kind in ("user", "net"):
        theirs = f"/proc/{holder}/ns/{kind}"
        if os.readlink(theirs) == os.readlink(f"/proc/self/ns/{kind}"):
            continue
        descriptor = os.open(theirs, os.O_RDONLY)
        try:
            if libc.setns(descriptor, 0):
                number = ctypes.get_errno()
                raise OSError(number, f"cannot enter the network of the local cluster: {os.strerror(number)}")
        finally:
            os.close(descriptor)
