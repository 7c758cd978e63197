"""Two machines out of one: Ray nodes with addresses and loopbacks of their own, in Linux network namespaces.

    head    198.51.100.2 ─┐
    worker  198.51.100.3 ─┴─ switch 198.51.100.1, the object store ── the tests 198.51.100.9

What they share are processors and file system. The addresses belong to nobody (RFC 5737).
"""

import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.conftest import CREDENTIALS, wait_for
from tests.faults.rig import Driver, kill, running

SWITCH, HEAD, WORKER, TESTS = (f"198.51.100.{host}" for host in (1, 2, 3, 9))
RAY_ADDRESS = f"{HEAD}:6379"
STORE_PORT = 5000
STORE_URL = f"http://{SWITCH}:{STORE_PORT}"
TIMEOUT_S = 60.0


class NotAllowed(Exception):
    """No namespaces can be made here; the message says what refused."""


@dataclass(frozen=True)
class Machine:
    """A network namespace with one address; `cable` is the switch's end of its link."""

    namespace: str
    address: str
    cable: str

    def command(self, *arguments: str) -> list[str]:
        """The command line that runs these there."""
        return ["ip", "netns", "exec", self.namespace, *arguments]

    def processes(self) -> list[psutil.Process]:
        """Everything that runs there."""
        found = []
        for pid in _ip("netns", "pids", self.namespace).split():
            try:
                found.append(psutil.Process(int(pid)))
            except psutil.NoSuchProcess:
                continue
        return found


@dataclass(frozen=True)
class Network:
    """The switch and the two machines."""

    switch: Machine
    head: Machine
    worker: Machine

    def cut(self, machine: Machine) -> None:
        """Cuts the machine's link. Its processes get no notice; packets are lost."""
        _ip("-n", self.switch.namespace, "link", "set", machine.cable, "down")

    def mend(self, machine: Machine) -> None:
        """Gives it back."""
        _ip("-n", self.switch.namespace, "link", "set", machine.cable, "up")


@contextmanager
def network() -> Iterator[Network]:
    """Namespaces and links between them; raises `NotAllowed`.

    In the end every process in these namespaces is killed, and no other, and they are removed.
    """
    mine = f"corun-{os.getpid()}"
    switch = Machine(f"{mine}-switch", SWITCH, "")
    head, worker = (Machine(f"{mine}-{name}", ip, name) for name, ip in (("head", HEAD), ("worker", WORKER)))
    with ExitStack() as stack:
        for machine in (switch, head, worker):
            _allowed("netns", "add", machine.namespace)
            stack.callback(_remove, machine)
            _allowed("-n", machine.namespace, "link", "set", "lo", "up")
        _allowed("-n", switch.namespace, "link", "add", "bridge", "type", "bridge")
        _link_up(switch.namespace, "bridge", f"{SWITCH}/24")
        for machine in (head, worker):
            _plug(switch.namespace, machine.cable, "eth0", machine.namespace)
            _link_up(machine.namespace, "eth0", f"{machine.address}/24")
        # The tests' own end is in the namespace that they are in: it has a route to the switch alone.
        _plug(switch.namespace, "tests", mine, str(os.getpid()))
        stack.callback(_ip, "link", "del", mine)
        _allowed("addr", "add", TESTS, "peer", SWITCH, "dev", mine)
        _allowed("link", "set", mine, "up")
        yield Network(switch, head, worker)


def _plug(switch: str, cable: str, far_end: str, place: str) -> None:
    _allowed("-n", switch, "link", "add", cable, "type", "veth", "peer", "name", far_end, "netns", place)
    _allowed("-n", switch, "link", "set", cable, "master", "bridge", "up")


def _link_up(namespace: str, device: str, address: str) -> None:
    _allowed("-n", namespace, "addr", "add", address, "dev", device)
    _allowed("-n", namespace, "link", "set", device, "up")


def _remove(machine: Machine) -> None:
    while found := machine.processes():
        for process in found:
            kill(process)
        time.sleep(0.05)
    _ip("netns", "del", machine.namespace)


def _ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True).stdout


def _allowed(*arguments: str) -> None:
    """`ip` while the network is made; raises `NotAllowed` with its words."""
    if shutil.which("ip") is None:
        raise NotAllowed("there is no command `ip` (iproute2)")
    try:
        _ip(*arguments)
    except subprocess.CalledProcessError as error:
        raise NotAllowed(f"`ip {' '.join(arguments)}` said: {error.stderr.strip()}") from None


class TwoMachines:
    """A Ray node on each machine and an object store at the switch, all of them reached by address."""

    def __init__(self, net: Network, folder: Path, head_cpus: int, worker_cpus: int) -> None:
        self.net, self._folder = net, folder
        self._num_cpus = {net.head: head_cpus, net.worker: worker_cpus}
        token = folder / "token"
        token.write_text(secrets.token_hex(32))
        self._environment = {
            **os.environ,
            **CREDENTIALS,
            "AWS_ENDPOINT_URL": STORE_URL,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
        }
        store = [sys.executable, "-m", "moto.server", "-H", SWITCH, "-p", str(STORE_PORT)]
        self._start(net.switch, store)
        for machine in (net.head, net.worker):
            self.start_ray(machine)
        wait_for(STORE_URL)

    def start_ray(self, machine: Machine) -> None:
        """`ray start` there, the head's first."""
        role = ["--address", RAY_ADDRESS]
        if machine is self.net.head:
            role = ["--head", "--port", RAY_ADDRESS.rpartition(":")[2]]
        size = ["--num-cpus", str(self._num_cpus[machine]), "--object-store-memory", str(200 * 2**20)]
        ray = str(Path(sys.executable).with_name("ray"))
        command = [ray, "start", *role, "--node-ip-address", machine.address, *size, "--disable-usage-stats"]
        starting = self._start(machine, command)
        assert starting.wait(TIMEOUT_S) == 0, (self._folder / f"{machine.namespace}.log").read_text()

    def _start(self, machine: Machine, command: list[str]) -> subprocess.Popen:
        with (self._folder / f"{machine.namespace}.log").open("ab") as log:
            return subprocess.Popen(machine.command(*command), env=self._on(machine), stdout=log, stderr=log)

    def _on(self, machine: Machine) -> dict[str, str]:
        """A machine's environment; in the usual folder, Ray would find the addresses of other clusters."""
        return {**self._environment, "RAY_TMPDIR": str(self._folder / machine.cable)}

    def drive(self, job: Path, *arguments: str) -> Driver:
        """`corun-ray run` on the head."""
        environment = {**self._on(self.net.head), "RAY_ADDRESS": RAY_ADDRESS, "PYTHONUNBUFFERED": "1"}
        return Driver(job, environment, *arguments, inside=self.net.head.command())

    def processes(self, title: str, machine: Machine) -> list[psutil.Process]:
        """Ray's worker processes there, by what they run."""
        return running(title, machine.processes())


@contextmanager
def two_machines(head_cpus: int, worker_cpus: int) -> Iterator[TwoMachines]:
    """Both, with Ray's files in a folder of their own; raises `NotAllowed`."""
    # Ray's sockets lie there too: their paths may have 107 characters.
    with tempfile.TemporaryDirectory(prefix="corun-") as folder, network() as net:
        yield TwoMachines(net, Path(folder), head_cpus, worker_cpus)
