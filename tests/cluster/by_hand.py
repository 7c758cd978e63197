"""The services of cluster/compose.yaml on this machine without Docker: each in a network namespace of its own.

A namespace has an address, its own ports and a hosts file, so that the commands run as they stand in the file: `s3`,
`mlflow` and `ray-head` are names there, and no port of the machine is touched. Volumes are folders.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from tests.cluster.composed import Service

SUBNET = "10.231.77"
HEALTHY_TIMEOUT_S = 120.0
JOB_TIMEOUT_S = 540.0
NOBODY = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
"""Postgres does not run as root."""
OWN_FOLDERS = 'mount --bind "$0" "$RAY_TMPDIR" && mount -t tmpfs -o mode=1777 none /var/run/postgresql && exec "$@"'
"""As in containers: two Ray nodes that share their folder for temporary files delete each other's."""


def programs() -> str:
    """A PATH with what the services' commands name: our environment's programs, Postgres's."""
    ours = str(Path(sys.executable).parent)
    postgres = sorted(str(folder) for folder in Path("/usr/lib/postgresql").glob("*/bin"))
    return os.pathsep.join([ours, *postgres, os.environ.get("PATH", os.defpath)])


def missing() -> str | None:
    """Why the services cannot be started here; None where they can."""
    for name, package in {"postgres": "postgresql", "setpriv": "util-linux", "ip": "iproute2", "wget": "wget"}.items():
        if not shutil.which(name, path=programs()):
            return f"no {name} (Debian: apt-get install {package})"
    trial = f"corun-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", trial], capture_output=True, text=True)
    if made.returncode:
        return f"no network namespaces here: {made.stderr.strip()}"
    subprocess.run(["ip", "netns", "delete", trial], check=True)
    return None


def with_a_store(services: Mapping[str, Service]) -> dict[str, Service]:
    """The services with an S3 server that there is here: the compose file's where it is installed, else moto's.

    No package of PyPI or Debian holds the former. Moto's answers at the same port, from memory, and checks no keys.
    """
    s3 = services["s3"]
    if shutil.which("versitygw"):
        return {**services, "s3": replace(s3, command=["versitygw", *s3.command])}
    command = [sys.executable, "-m", "moto.server", "--host=0.0.0.0", f"--port={s3.command[1].removeprefix(':')}"]
    address = s3.health[-1].removesuffix("/health") if s3.health else ""
    return {**services, "s3": replace(s3, command=command, health=["wget", "-q", "-O", "/dev/null", address])}


class Stack:
    """The services, started in the order that their conditions ask for; a context manager that ends them all."""

    def __init__(self, services: Mapping[str, Service]) -> None:
        self.services = services
        self.folder = Path(tempfile.mkdtemp(prefix="corun", dir="/tmp"))  # Ray's socket paths must be short
        self.folder.chmod(0o711)
        (self.folder / "tmp").mkdir()
        self._prefix = f"corun-{os.getpid()}"
        self._running: dict[str, subprocess.Popen] = {}

    def __enter__(self) -> "Stack":
        try:
            self._make_network()
            for name in self.services:
                self._start(name)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for name, process in reversed(self._running.items()):
            _end(process, self._namespace(name))
        for namespace in [*map(self._namespace, self.services), f"{self._prefix}-switch"]:
            subprocess.run(["ip", "netns", "delete", namespace], capture_output=True)
            shutil.rmtree(f"/etc/netns/{namespace}", ignore_errors=True)
        shutil.rmtree(self.folder, ignore_errors=True)

    def volume(self, name: str) -> Path:
        """The folder that stands for a named volume."""
        return self.folder / "volumes" / name

    def log(self, name: str) -> str:
        """What a service has printed."""
        return (self.folder / f"{name}.log").read_text(errors="replace")

    def inside(
        self, name: str, *command: str, timeout_s: float = JOB_TIMEOUT_S, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        """Runs a command where a service lives: same names, same addresses, same environment.

        Raises `subprocess.TimeoutExpired`.
        """
        service = self.services[name]
        where = ["nsenter", "--net", "--mount", "--target", str(self._running[name].pid)]
        return subprocess.run(
            [*where, *command],
            env=self._environment(service) | environment,
            capture_output=True,
            text=True,
            timeout=timeout_s,
        )

    def _namespace(self, name: str) -> str:
        return f"{self._prefix}-{name}"

    def _make_network(self) -> None:
        """A switch, and a namespace a service, wired to it."""
        names = list(self.services)
        hosts = "127.0.0.1 localhost\n" + "".join(f"{SUBNET}.{10 + i} {name}\n" for i, name in enumerate(names))
        switch = f"{self._prefix}-switch"
        _ip("netns", "add", switch)
        _ip("-n", switch, "link", "add", "bridge", "type", "bridge")
        _ip("-n", switch, "addr", "add", f"{SUBNET}.1/24", "dev", "bridge")
        _ip("-n", switch, "link", "set", "bridge", "up")
        for i, name in enumerate(names):
            namespace = self._namespace(name)
            _ip("netns", "add", namespace)
            _ip("-n", switch, "link", "add", f"port{i}", "type", "veth", "peer", "name", "eth0", "netns", namespace)
            _ip("-n", switch, "link", "set", f"port{i}", "master", "bridge", "up")
            _ip("-n", namespace, "addr", "add", f"{SUBNET}.{10 + i}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                _ip("-n", namespace, "link", "set", device, "up")
            _ip("-n", namespace, "route", "add", "default", "via", f"{SUBNET}.1")  # Ray asks it for its own address
            etc = Path("/etc/netns") / namespace
            etc.mkdir(parents=True)
            (etc / "hosts").write_text(hosts)
            (etc / "resolv.conf").write_text("nameserver 127.0.0.1\n")  # there is none: other names fail at once

    def _start(self, name: str) -> None:
        if name in self._running:
            return
        service = self.services[name]
        for needed, condition in service.needs.items():
            self._start(needed)
            self._wait(needed, condition)
        for volume in service.volumes.values():
            self.volume(volume).mkdir(parents=True)
        command = service.command
        if command[0] == "postgres":
            self._make_database(service)
            command = [*NOBODY, *service.command]
        self._running[name] = self._launch(service, command)

    def _launch(self, service: Service, command: Sequence[str]) -> subprocess.Popen:
        own = self.folder / "own" / service.name
        own.mkdir(parents=True)
        where = ["ip", "netns", "exec", self._namespace(service.name), "sh", "-c", OWN_FOLDERS, str(own)]
        with (self.folder / f"{service.name}.log").open("w") as log:
            return subprocess.Popen(
                [*where, *self._at_home(service, command)],
                env=self._environment(service),
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def _make_database(self, service: Service) -> None:
        """What the image's entry point does at the first start."""
        environment = self._environment(service)
        folder = Path(environment["PGDATA"])
        os.chown(folder, 65534, 65534)
        password = folder.parent / "password"
        password.write_text(environment["POSTGRES_PASSWORD"])
        password.chmod(0o644)
        options = [
            f"--username={environment['POSTGRES_USER']}",
            f"--pwfile={password}",
            "--auth-local=trust",
            "--auth-host=scram-sha-256",
        ]
        subprocess.run([*NOBODY, "initdb", *options], env=environment, check=True, capture_output=True)
        with (folder / "pg_hba.conf").open("a") as rules:
            rules.write("host all all all scram-sha-256\n")
        single = [*NOBODY, "postgres", "--single", "postgres"]
        subprocess.run(
            single, input=f"CREATE DATABASE {environment['POSTGRES_DB']};\n", text=True, env=environment, check=True
        )

    def _wait(self, name: str, condition: str) -> None:
        process, service = self._running[name], self.services[name]
        deadline = time.monotonic() + HEALTHY_TIMEOUT_S
        while time.monotonic() < deadline:
            code = process.poll()
            if condition == "service_completed_successfully" and code == 0:
                return
            assert code is None, f"{name} has ended with {code}:\n{self.log(name)[-3000:]}"
            if condition == "service_healthy" and self._is_healthy(service):
                return
            time.sleep(0.5)
        raise AssertionError(f"{name}: not {condition} in {HEALTHY_TIMEOUT_S:.0f} s:\n{self.log(name)[-3000:]}")

    def _is_healthy(self, service: Service) -> bool:
        assert service.health, f"{service.name}: no health check"
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self.inside(service.name, *service.health, timeout_s=service.health_timeout_s).returncode == 0
        return False

    def _at_home(self, service: Service, texts: Sequence[str]) -> list[str]:
        """Texts in which the paths of volumes are those of their folders."""
        for target, volume in service.volumes.items():
            texts = [text.replace(target, str(self.volume(volume))) for text in texts]
        return list(texts)

    def _environment(self, service: Service) -> dict[str, str]:
        given = dict(zip(service.environment, self._at_home(service, list(service.environment.values())), strict=True))
        here = {"PATH": programs(), "HOME": str(self.folder), "RAY_TMPDIR": f"{self.folder}/tmp", "LC_ALL": "C.UTF-8"}
        return here | given


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


def _end(process: subprocess.Popen, namespace: str) -> None:
    """Ends a service and what it has started."""
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(10)
    left = subprocess.run(["ip", "netns", "pids", namespace], capture_output=True, text=True).stdout.split()
    for pid in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGKILL)
    process.wait()
