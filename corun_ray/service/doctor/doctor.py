"""`corun-ray doctor`: try everything that a job would use; a line for each, with advice where it fails."""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from corun_ray.config.jobs import ClusterSection, Job
from corun_ray.config.trials import choose_example_job
from corun_ray.core.weights import WeightsError
from corun_ray.service.cluster.connect import ClusterError, connect, format_nodes
from corun_ray.service.cluster.ports import read_ray_address
from corun_ray.service.cluster.room import await_room, request_workers
from corun_ray.service.doctor.nodes import ClusterNodes, NodeTrouble, collect_local_facts, measure_all_reduce
from corun_ray.service.doctor.places import is_listening, measure_server_clocks, try_mlflow, try_storage
from corun_ray.service.errors import JobFailed, format_reason
from corun_ray.service.models.tracking import TrackingError, get_tracking_uri
from corun_ray.service.storage import StorageError, locate
from corun_ray.service.waiting import announce_wait
from corun_ray.service.weights.needed import NeededFiles, describe_missing_weights, find_needed_files

MAX_CLOCK_OFFSET_S = 5.0
"""Beyond, timestamps of logs and metrics mislead; object stores refuse requests that are 15 minutes off."""
ALL_REDUCE_MIB = 64
ROOM_LIMIT_S = 10.0
"""How long the workers of the sum wait for room; a job itself waits without limit."""


@dataclass(frozen=True)
class Finding:
    """A line: what was tried, whether it works (None: not tried), what was seen, and advice."""

    name: str
    is_ok: bool | None
    text: str
    advice: str = ""

    def __str__(self) -> str:
        mark = {True: "ok", False: "BAD", None: "-"}[self.is_ok]
        line = f"{mark:<4} {self.name:<8} {self.text}"
        return f"{line}\n{'':<13} -> {self.advice}" if self.advice else line


@dataclass(frozen=True)
class Needs:
    """What the jobs to come would use."""

    storage: str
    tracking: str
    size: ClusterSection = field(default_factory=lambda: ClusterSection(workers=(2, 2)))
    weights: NeededFiles = field(default_factory=dict)

    def replace_places(self, storage: str | None, tracking: str | None) -> "Needs":
        """Return the needs with other places, if given."""
        return replace(self, storage=storage or self.storage, tracking=tracking or self.tracking)


def collect_needs(jobs: Sequence[Job]) -> Needs:
    """Collect what the jobs of a file use together.

    That is: the places of the first job, the largest size, and the weights of all.
    """
    largest = max((job.whole_cluster for job in jobs), key=lambda size: (size.gpus_per_worker, size.min_workers))

    weights: NeededFiles = {}
    for job in jobs:
        # Of a search, an example of its trials.
        for folder, files in find_needed_files(choose_example_job(job)).items():
            weights.setdefault(folder, {}).update(files)

    return Needs(jobs[0].storage, get_tracking_uri(jobs[0]), largest, weights)


class _Problem(Exception):
    """Something that does not work: what was seen, and what to do about it."""

    def __init__(self, text: str, advice: str) -> None:
        super().__init__(text)
        self.advice = advice


class Doctor:
    """One examination. It leaves nothing behind, except for an empty MLflow experiment.

    Each `_examine_…` returns what it saw, or None where there is nothing to try, and raises `_Problem`.
    """

    def __init__(self, needs: Needs) -> None:
        self.needs = needs
        self.nodes: ClusterNodes | None = None
        """None until, or unless, Ray is connected."""

    def examine(self) -> Iterator[Finding]:
        """Yield the findings as they are made."""
        steps: dict[str, Callable[[], str | None]] = {
            "driver": self._examine_driver,
            "ray": self._examine_ray,
            "gpus": self._examine_gpus,
            "workers": self._examine_workers,
            "storage": self._examine_storage,
            "mlflow": self._examine_mlflow,
            "weights": self._examine_weights,
            "clock": self._examine_clocks,
        }
        for name, step in steps.items():
            try:
                with announce_wait(f"the check of {name}"):
                    text = step()
            except _Problem as problem:
                yield Finding(name, False, str(problem), problem.advice)
            except NodeTrouble as trouble:
                advice = "look at the nodes: ray status, and the logs of the one named"
                yield Finding(name, False, str(trouble), advice)
            except Exception as error:
                # Whatever a library raises, the other checks go on.
                advice = "the check itself failed, by what a library says"
                yield Finding(name, False, f"{type(error).__name__}: {format_reason(error)}", advice)
            else:
                if text:
                    yield Finding(name, True, text)
                else:
                    yield Finding(name, None, self._explain_omission(name))

    def _explain_omission(self, name: str) -> str:
        """Return why a step tried nothing."""
        if name == "weights":
            return "no file of weights is needed"
        if self.nodes is None:
            return "not looked at without Ray"
        return "no GPU is asked for, and there is none"

    def _examine_driver(self) -> str:
        """Compare the driver's GPUs with torch's."""
        # A driver that is too old for torch's CUDA hides its GPUs from torch.
        facts = collect_local_facts()
        if facts.driver_gpus and not facts.torch_gpus:
            raise _Problem(
                f"the NVIDIA driver has {facts.driver_gpus} GPUs, torch {facts.torch} none",
                f"update the driver: this torch is built for CUDA {facts.cuda}",
            )

        gpus = f"{facts.torch_gpus} GPUs" if facts.torch_gpus else "no GPU"
        return f"Python {facts.python}, torch {facts.torch}, Ray {facts.ray}, {gpus} here"

    def _examine_ray(self) -> str:
        """Connect to Ray; check versions and token authentication."""
        # A Ray that starts here gets as many logical CPUs as the job wants; a cluster has what it has.
        address = read_ray_address()
        sizes = []
        if not address:
            sizes.append(self.needs.size.model_copy(update={"gpus_per_worker": 0.0}))

        try:
            place = connect(*sizes)
        except (ClusterError, JobFailed) as error:
            raise _Problem(str(error), _advise_on_ray(address)) from None

        # All nodes must run the same versions.
        self.nodes = ClusterNodes()
        others = self.nodes.describe_other_versions()
        if others:
            raise _Problem(f"{place}: other versions on {others}", "give every node the same image")

        # A cluster must ask for a token; a Ray that was started here is reached from here alone.
        has_token = os.environ.get("RAY_AUTH_MODE") == "token"
        if address and not has_token:
            raise _Problem(
                f"{place}: token authentication is off: whoever reaches it can run code on it",
                "start every node with RAY_AUTH_MODE=token and the same RAY_AUTH_TOKEN",
            )

        return f"{place}: {self.nodes.summarise()}, token authentication {'on' if has_token else 'off'}"

    def _examine_gpus(self) -> str | None:
        """Compare Ray's GPUs with torch's and the job's."""
        if self.nodes is None:
            return None

        # Ray counts GPUs by the driver; an image without CUDA cannot use them.
        ray_gpus = self.nodes.count_ray_gpus()
        for address, facts in self.nodes.collect_facts().items():
            if facts.torch_gpus < ray_gpus.get(address, 0):
                raise _Problem(
                    f"Ray has {ray_gpus[address]:g} GPUs on {address}, torch sees {facts.torch_gpus}",
                    "check its driver (nvidia-smi) and that it runs the GPU image",
                )

        # The job's workers need that many GPUs at least.
        wanted = self.needs.size.min_workers * self.needs.size.gpus_per_worker
        total = sum(ray_gpus.values())
        if wanted > total:
            raise _Problem(
                f"the job asks for {wanted:g} GPUs, Ray has {total:g}",
                "add GPU nodes, or train on CPUs: --set cluster.gpus_per_worker=0",
            )

        return f"{total:g} in Ray, and torch sees them" if total else None

    def _examine_workers(self) -> str | None:
        """Let the job's workers sum tensors.

        They sum their gradients the same way.
        """
        if self.nodes is None:
            return None

        try:
            connect(self.needs.size)
            await_room(request_workers(self.needs.size, decodes=False), lambda line: None, ROOM_LIMIT_S)
            return measure_all_reduce(self.needs.size, ALL_REDUCE_MIB)
        except ClusterError as error:
            raise _Problem(str(error), "start more nodes, or ask for less (cluster.workers, serve.replicas)") from None
        except RuntimeError as error:
            raise _Problem(
                f"workers cannot talk to each other: {error}",
                "open all ports between the nodes; with several networks set NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME",
            ) from None

    def _examine_storage(self) -> str:
        """Try storage from here and from every node."""
        advice = "check the URI, and that every node has the credentials, and AWS_ENDPOINT_URL or a profile"
        try:
            place = locate(self.needs.storage)
            if place.is_local:
                advice = "give a URI or a folder that all nodes share and may write"
            speeds = [try_storage(place)]
            if self.nodes is not None:
                speeds += self.nodes.try_storage(place)
        except StorageError as error:
            raise _Problem(str(error), advice) from None

        # The slowest place counts.
        write = min(speed.write_mb_per_s for speed in speeds)
        read = min(speed.read_mb_per_s for speed in speeds)
        num_nodes = len(speeds) - 1
        tried_from = f"here and {format_nodes(num_nodes)}" if num_nodes else "here"
        text = f"{place.uri} from {tried_from}: write {write:.0f} MB/s, read {read:.0f} MB/s at least, list, delete"
        if speeds[0].keeps_versions:
            text += "; keeps what is deleted, so it needs a lifecycle rule (docs/operating.md)"
        return text

    def _examine_mlflow(self) -> str:
        """Log a run and read it back."""
        try:
            return f"{self.needs.tracking}: {try_mlflow(self.needs.tracking)}"
        except TrackingError as error:
            raise _Problem(str(error), "check MLFLOW_TRACKING_URI and the server's own artifact store") from None

    def _examine_weights(self) -> str | None:
        """Look for the needed weight files."""
        # Sizes are compared; checksums when a job uses the files.
        try:
            mistakes = describe_missing_weights(self.needs.weights)
        except WeightsError as error:
            mistakes = [str(error)]

        if mistakes:
            advice = "corun-ray weights fetch DIR, or put the files there and run corun-ray weights index DIR"
            raise _Problem("; ".join(mistakes), advice)

        files = [name for wanted in self.needs.weights.values() for name in wanted]
        return f"{', '.join(files)}: there, of the sizes that their index names" if files else None

    def _examine_clocks(self) -> str:
        """Compare the clocks of all servers and nodes with ours."""
        offsets_s = measure_server_clocks(self.needs.storage, self.needs.tracking)
        if self.nodes is not None:
            offsets_s |= self.nodes.measure_clocks()

        wrong = []
        for name, offset_s in offsets_s.items():
            if abs(offset_s) > MAX_CLOCK_OFFSET_S:
                wrong.append(f"{name} {offset_s:+.0f} s")

        if wrong:
            raise _Problem(
                f"apart from the clock here: {', '.join(wrong)}",
                "let every machine take its time from NTP (chronyc tracking)",
            )

        # Name the largest distance, whatever its direction.
        largest_s = max(map(abs, offsets_s.values()), default=0.0)
        return f"{', '.join(offsets_s) or 'this machine'}: at most {largest_s:.1f} s apart"


def _advise_on_ray(address: str) -> str:
    """Return what to do about a Ray that cannot be had."""
    if not address:
        return "RAY_TMPDIR names the folder of a local Ray: short, writable and with room"
    if is_listening(address):
        return (
            "something listens there: does it know your token, and is its Ray of the version above? "
            "(RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token)"
        )
    return "give RAY_ADDRESS=HOST:6379 of a head that runs and can be reached; without, a Ray starts here"
