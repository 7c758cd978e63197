"""Who drives a run: a small file in its folder that the driver renews, so that no second driver takes the run over.

Every driver has a file of its own in `drivers/`, with a number above those before it, and writes it again every 15 s.
The age of such a file is told by the clock of its store alone: a probe is written, and the two dates are compared. A
driver whose file is older than a minute is taken for dead, one of this very machine as soon as its process is gone.
The next driver deletes the files of those before it. A driver that finds a higher number, or its own file deleted, has
lost its run and writes there no more.
"""

import getpass
import json
import os
import re
import socket
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Self

from pyarrow.fs import FileInfo
from pydantic import AwareDatetime, BaseModel, ConfigDict, ValidationError

from corun_ray.core.errors import UserError
from corun_ray.service.errors import JobFailed
from corun_ray.service.runs.record import RUN_FILE
from corun_ray.service.storage import Location, MissingFile, StorageError

DRIVERS_FOLDER = "drivers"
RENEW_EVERY_S = 15.0
STALE_S = 60.0
"""A driver that has not renewed its file for so long is taken for dead."""
SETTLE_S = 2.0
"""How long drivers that reach for a run at the same time wait to see each other, in an object store."""
POLL_S = 2.0
"""Between two looks at a driver whose end is waited for."""
DRIVER_FILE = re.compile(r"(\d{6})\.json")
JOB_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Set by Ray in the driver of a submitted job."""


class RunDriven(UserError):
    """A run or an output that another driver writes to; the message says whose it is and how to end it."""


class RunTaken(JobFailed):
    """The run has been taken over by another driver; this one must leave everything as it is."""


class DriverRecord(BaseModel):
    """The content of a driver's file: what a person needs to find its process, and to end it."""

    model_config = ConfigDict(frozen=True)

    host: str
    pid: int
    user: str
    job: str = ""
    """Submission id of Ray's Jobs API; empty for a driver that was not submitted."""
    begun: AwareDatetime
    machine: str = ""
    """Id of the machine since its last start, and of the namespace of its processes; empty where not known."""
    start_ticks: int = -1
    """Start of the process in ticks since the machine's start; a number of a process is used again."""

    def describe(self) -> str:
        """Describe the driver: `process 71 of ann on node-3, Ray job raysubmit_x`."""
        job = f", Ray job {self.job}" if self.job else ""
        return f"process {self.pid} of {self.user} on {self.host}{job}"

    def advise_end(self) -> str:
        """Say how to end the driver."""
        if self.job:
            return f"corun-ray jobs stop {self.job}"
        return f"Ctrl-C there, or `kill {self.pid}` on {self.host}"

    @property
    def is_here(self) -> bool:
        """Whether the process runs, or ran, on this very machine."""
        return self.machine != "" and self.machine == identify_machine()

    def is_gone(self) -> bool:
        """Tell whether the process is known to have ended."""
        return self.is_here and read_start_ticks(self.pid) != self.start_ticks


@dataclass(frozen=True)
class Driver:
    """The last driver of a run, as its file tells."""

    number: int
    record: DriverRecord | None
    """None where the file cannot be read, as while it is being written."""
    age_s: float
    """Seconds since the file was written, by the clock of its store."""

    @property
    def is_alive(self) -> bool:
        """Whether the driver must be taken for alive."""
        if self.record is None or not self.record.is_here:
            return self.age_s < STALE_S
        if self.record.is_gone():
            return False
        # A process that is stopped (Ctrl-Z) renews nothing, and lives. What this process left behind does not.
        return self.age_s < STALE_S or self.record.pid != os.getpid()

    def refuse(self, folder: Location) -> RunDriven:
        """Return the error for another driver that wants the folder."""
        who = "a driver that begins this moment" if self.record is None else self.record.describe()
        text = f"{folder.uri} is in use by {who}, whose last sign of life is {max(self.age_s, 0):.0f} s old"
        if self.record is not None:
            text += f"; to end it: {self.record.advise_end()}"
        # Of a process of this machine it is known that it lives.
        if self.record is None or not self.record.is_here:
            text += f"; if it is dead, try again in {max(STALE_S - self.age_s, 1):.0f} s"
        return RunDriven(text)


# --- Looking ---


def find_driver(folder: Location) -> Driver | None:
    """Find the last driver of a folder; None where none has left a file.

    Raises `StorageError`.
    """
    place = folder.child(DRIVERS_FOLDER)
    if not place.exists():
        return None

    # A probe tells what the clock of the store says now: clocks of machines may differ.
    probe = place.child(f"probe-{uuid.uuid4().hex}")
    probe.write(b"")
    try:
        infos = place.list_infos()
    finally:
        probe.delete()

    numbers = _list_numbers(infos)
    if not numbers:
        return None
    number = max(numbers)
    return Driver(
        number, _read_record(place.child(_name_file(number))), _compare(infos, probe.name, _name_file(number))
    )


def refuse_driven(folder: Location) -> None:
    """Refuse a folder whose driver is alive.

    Raises `RunDriven` and `StorageError`.
    """
    driver = find_driver(folder)
    if driver is not None and driver.is_alive:
        raise driver.refuse(folder)


def _compare(infos: dict[str, FileInfo], later: str, earlier: str) -> float:
    """Return the seconds between the dates of two files of a folder."""
    dates = [infos[name].mtime_ns if name in infos else None for name in (later, earlier)]
    if dates[0] is None or dates[1] is None:
        return 0.0
    return (dates[0] - dates[1]) / 1e9


def _list_numbers(infos: dict[str, FileInfo]) -> list[int]:
    """List the numbers of the drivers' files in a folder."""
    matches = [DRIVER_FILE.fullmatch(name) for name in infos]
    return [int(match[1]) for match in matches if match]


def _name_file(number: int) -> str:
    return f"{number:06d}.json"


def _read_record(place: Location) -> DriverRecord | None:
    try:
        return DriverRecord.model_validate_json(place.read())
    except (MissingFile, ValidationError):
        return None


# --- Holding ---


class Lease:
    """This process as the driver of a folder: renewed by a thread until `release`, or until another driver has it."""

    def __init__(self, folder: Location, number: int) -> None:
        self._folder, self._number = folder, number
        self._content = describe_this_process().model_dump_json(indent=1).encode()
        self.place = folder.child(DRIVERS_FOLDER).child(_name_file(number))
        """The file of this driver. It is there as long as the driver has its run."""
        self._on_loss: Callable[[RunTaken], None] | None = None
        self._loss: RunTaken | None = None
        self._lock = threading.Lock()
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)

    @classmethod
    def take(cls, folder: Location, patience_s: float = 0.0) -> Self:
        """Become the driver of a folder, and renew it from now on.

        Waits up to `patience_s` for the end of the driver before.

        Raises `RunDriven` where another driver is alive, and `StorageError`.
        """
        deadline_s = time.monotonic() + patience_s
        while True:
            driver = find_driver(folder)
            if driver is None or not driver.is_alive:
                lease = cls(folder, 1 if driver is None else driver.number + 1)
                if _create_once(lease.place, lease._content):
                    break
            elif time.monotonic() >= deadline_s:
                raise driver.refuse(folder)
            # Another driver was faster, or is waited for.
            time.sleep(min(POLL_S, max(0.1, patience_s)))

        lease._forget_earlier()
        lease._thread.start()
        return lease

    @classmethod
    def begin(cls, folder: Location) -> Self:
        """Become the first driver of a folder that no other process knows yet.

        Raises `StorageError`.
        """
        lease = cls(folder, 1)
        lease.place.write(lease._content)
        lease._thread.start()
        return lease

    def call_on_loss(self, on_loss: Callable[[RunTaken], None]) -> None:
        """Have `on_loss` called, from another thread, once another driver has taken the run."""
        with self._lock:
            self._on_loss = on_loss
            loss = self._loss
        if loss is not None:
            on_loss(loss)

    def release(self) -> None:
        """End the renewal, and delete this driver's file."""
        self._ending.set()
        self._thread.join()
        # A file that stays is stale in a minute. The folder goes unless another driver has its file there.
        with suppress(StorageError, OSError):
            self.place.delete()
            if self.place.is_local:
                Path(self.place.path).parent.rmdir()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *reason: object) -> None:
        self.release()

    def _renew(self) -> None:
        """Write the file again and again (the thread's function)."""
        while not self._ending.wait(RENEW_EVERY_S):
            # A store that is away for a while has no news: try again. No error may end the renewal.
            with suppress(Exception):
                numbers = _list_numbers(self.place.parent().list_infos())
                if max(numbers, default=0) > self._number or self._number not in numbers:
                    self._lose()
                    return
                self.place.write(self._content)

    def _lose(self) -> None:
        """Tell that the run has another driver."""
        loss = _describe_loss(self._folder)
        with self._lock:
            self._loss = loss
            on_loss = self._on_loss
        if on_loss is not None:
            on_loss(loss)

    def _forget_earlier(self) -> None:
        """Delete the files of the drivers before this one."""
        folder = self.place.parent()
        for number in _list_numbers(folder.list_infos()):
            if number < self._number:
                folder.child(_name_file(number)).delete()


def refuse_taken(file: Location | None) -> None:
    """Refuse to go on writing for a driver that has lost its run.

    `file` is the driver's; None for a driver without one.

    Raises `RunTaken` and `StorageError`.
    """
    if file is None or _is_last(file):
        return
    # A machine that does not see the run at all cannot tell.
    run = file.parent().parent()
    if run.child(RUN_FILE).exists():
        raise _describe_loss(run)


def _is_last(file: Location) -> bool:
    """Tell whether a driver's file is there, without that of a later driver beside it.

    Its own file alone says too little: a renewal under way may write it again after the next driver has deleted it.
    """
    folder = file.parent()
    numbers = _list_numbers(folder.list_infos()) if folder.is_folder() else []
    return bool(numbers) and file.name == _name_file(max(numbers))


def _describe_loss(folder: Location) -> RunTaken:
    """Return the error of a driver whose folder has another driver by now."""
    record = None
    with suppress(StorageError):
        drivers = folder.child(DRIVERS_FOLDER)
        numbers = _list_numbers(drivers.list_infos())
        record = _read_record(drivers.child(_name_file(max(numbers)))) if numbers else None
    who = "another driver" if record is None else record.describe()
    return RunTaken(f"{folder.uri} has been taken over by {who}: this process ends, and deletes nothing")


def _create_once(place: Location, content: bytes) -> bool:
    """Create a file; return False where there is one, or where another process creates it at the same time.

    Raises `StorageError`.
    """
    if place.is_local:
        return place.create(content)

    # Not every object store refuses to replace an object. So each contender writes an object of its own, waits until it
    # sees the others, and the first by name goes on.
    contender = place.parent().child(f"{place.name}.{uuid.uuid4().hex}")
    contender.write(content)
    try:
        time.sleep(SETTLE_S)
        infos = place.parent().list_infos()
        rivals = [name for name in infos if name.startswith(f"{place.name}.")]
        alive = [name for name in rivals if _compare(infos, contender.name, name) < STALE_S]
        if min(alive, default="") != contender.name or place.exists():
            return False
        place.write(content)
        return True
    finally:
        contender.delete()


# --- This process ---


def describe_this_process() -> DriverRecord:
    """Describe the process that calls."""
    return DriverRecord(
        host=socket.gethostname(),
        pid=os.getpid(),
        user=_get_user(),
        job=_get_submission_id(),
        begun=datetime.now(UTC),
        machine=identify_machine(),
        start_ticks=read_start_ticks(os.getpid()),
    )


@cache
def identify_machine() -> str:
    """Return an id of this machine since its last start, with that of this process's namespace; empty if not known."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def read_start_ticks(pid: int) -> int:
    """Read when a process started, in ticks since the machine's start; -1 where there is none, or a dead one."""
    try:
        # The name in brackets may hold blanks; the state follows it, and the start is 19 fields further.
        fields = Path(f"/proc/{pid}/stat").read_text("utf-8", "replace").rpartition(")")[2].split()
    except OSError:
        return -1
    return -1 if fields[0] in ("Z", "X") else int(fields[19])


def _get_user() -> str:
    """Return the user's name; the number where there is no name, as in many containers."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return f"uid {os.getuid()}"


def _get_submission_id() -> str:
    """Return the id under which Ray's Jobs API knows this process; empty for other processes."""
    with suppress(ValueError, AttributeError):
        return str(json.loads(os.environ.get(JOB_VARIABLE, "{}")).get("metadata", {}).get("job_submission_id", ""))
    return ""
