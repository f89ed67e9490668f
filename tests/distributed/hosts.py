"""Two hosts on one machine: network namespaces with a virtual cable between them, and nothing else to talk over."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from tests.launch import environment

SCRIPT = Path(__file__).parents[2] / "scripts" / "two_hosts.sh"
IP = shutil.which("ip", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
INTERFACE = "cable0"


@dataclass(frozen=True)
class Host:
    """One end of the cable."""

    rank: int
    namespace: str

    @property
    def address(self) -> str:
        return f"10.77.0.{self.rank + 1}"

    def ip(self, *arguments: str) -> str:
        return _ip("-n", self.namespace, *arguments)

    def kill(self) -> None:
        """SIGKILL to every process of the host at once, as far as one can."""
        for pid in _ip("netns", "pids", self.namespace).split():
            with suppress(ProcessLookupError):  # went with its parent
                os.kill(int(pid), signal.SIGKILL)

    def plug(self, state: str) -> None:
        """The cable "up" or "down": what is sent while it is down is lost, and nobody is told."""
        self.ip("link", "set", INTERFACE, state)


def _ip(*arguments: str) -> str:
    assert IP is not None
    return subprocess.run([IP, *arguments], check=True, capture_output=True, text=True).stdout


def why_not() -> str | None:
    """What stands in the way of two hosts here, if anything does."""
    if sys.platform != "linux":
        return "network namespaces are Linux's"
    if os.geteuid() != 0:
        return "only root may make network namespaces"
    if IP is None:
        return "there is no `ip` (Debian's iproute2)"
    try:
        with two_hosts():
            return None
    except subprocess.CalledProcessError as error:
        return f"network namespaces are refused here: {error.stderr.strip()}"


@contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    """Two namespaces with a loopback each and a cable between; at the end all of their processes are killed."""
    first, second = hosts = tuple(Host(rank, f"bigsae-{os.getpid()}-{rank}") for rank in (0, 1))
    made: list[Host] = []
    try:
        for host in hosts:
            _ip("netns", "add", host.namespace)
            made.append(host)
        _ip(
            *("link", "add", INTERFACE, "netns", first.namespace),
            *("type", "veth", "peer", "name", INTERFACE, "netns", second.namespace),
        )
        for host in hosts:
            host.ip("addr", "add", f"{host.address}/24", "dev", INTERFACE)
            host.ip("link", "set", "lo", "up")
            host.plug("up")
        yield first, second
    finally:
        for host in made:
            host.kill()
            _ip("netns", "del", host.namespace)


@dataclass(frozen=True)
class Launch:
    """scripts/two_hosts.sh on both hosts."""

    processes: tuple[subprocess.Popen[bytes], ...]
    logs: tuple[Path, ...]

    def wait(self, rank: int, timeout: float = 200) -> tuple[int, str]:
        """Exit status and output of one host."""
        code = self.processes[rank].wait(timeout)
        return code, self.logs[rank].read_text()

    def wait_for(self, path: Path, timeout: float = 120) -> None:
        """Until `path` exists; fails where a host ends before."""
        deadline = time.monotonic() + timeout
        while not path.exists():
            for process, log in zip(self.processes, self.logs, strict=True):
                assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, self.logs[0].read_text()
            time.sleep(0.02)


def launch(hosts: tuple[Host, Host], ranks_each: int, arguments: list[str], logs: Path) -> Launch:
    """Start training with `ranks_each` ranks on each of the hosts; their output goes to files in `logs`."""
    logs.mkdir(parents=True, exist_ok=True)
    processes, paths = [], []
    for host in hosts:
        env = environment() | {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PROCESSES_PER_HOST": str(ranks_each),
            "GLOO_SOCKET_IFNAME": INTERFACE,
        }
        paths.append(logs / f"host_{host.rank}.log")
        assert IP is not None
        with paths[-1].open("wb") as log:
            script = ["bash", str(SCRIPT), str(host.rank), hosts[0].address, *arguments]
            processes.append(
                subprocess.Popen(
                    [IP, "netns", "exec", host.namespace, *script],
                    env=env,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                )
            )
    return Launch(tuple(processes), tuple(paths))
