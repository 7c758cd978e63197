"""`corun-ray doctor`: tries everything that a job would use, a line each, with what to do where it fails."""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from corun_ray.config.jobs import ClusterSection, Job
from corun_ray.config.trials import example
from corun_ray.core.weights import WeightsError
from corun_ray.service.cluster import connect as cluster
from corun_ray.service.cluster.connect import ClusterError
from corun_ray.service.doctor.nodes import ClusterNodes, NodeTrouble, collect_local_facts, measure_all_reduce
from corun_ray.service.doctor.places import StorageSpeed, is_listening, measure_server_clocks, try_mlflow, try_storage
from corun_ray.service.models.tracking import TrackingError, get_tracking_uri
from corun_ray.service.storage import StorageError, locate
from corun_ray.service.weights.needed import NeededFiles, describe_missing_weights, find_needed_files

MAX_CLOCK_S = 5.0
"""More apart, timestamps of logs and metrics mislead; object stores refuse requests 15 minutes off."""
ALL_REDUCE_MIB = 64


@dataclass(frozen=True)
class Finding:
    """A line: what was looked at, whether it works (None: not looked at), what was seen, and what to do."""

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

    def at(self, storage: str | None, tracking: str | None) -> "Needs":
        """The same at other places, where some are given."""
        return replace(self, storage=storage or self.storage, tracking=tracking or self.tracking)


def collect_needs(jobs: Sequence[Job]) -> Needs:
    """What a file's jobs use together: the first one's places, everyone's weights, the largest size."""
    largest = max((job.whole_cluster for job in jobs), key=lambda size: (size.gpus_per_worker, size.min_workers))
    weights: NeededFiles = {}
    for job in map(example, jobs):
        for folder, files in find_needed_files(job).items():
            weights.setdefault(folder, {}).update(files)
    return Needs(jobs[0].storage, get_tracking_uri(jobs[0]), largest, weights)


class _Bad(Exception):
    """Something does not work: what was seen, and what to do about it."""

    def __init__(self, text: str, advice: str) -> None:
        super().__init__(text)
        self.advice = advice


class Doctor:
    """One examination. Nothing that is tried is left behind, but for an empty MLflow experiment."""

    def __init__(self, needs: Needs) -> None:
        self.needs = needs
        self.nodes: ClusterNodes | None = None

    def examine(self) -> Iterator[Finding]:
        """The findings as they are made."""
        looks: dict[str, Callable[[], str | None]] = {
            "driver": self._driver,
            "ray": self._ray,
            "gpus": self._gpus,
            "workers": self._workers,
            "storage": self._storage,
            "mlflow": self._mlflow,
            "weights": self._weights,
            "clock": self._clock,
        }
        for name, look in looks.items():
            try:
                text = look()
            except _Bad as bad:
                yield Finding(name, False, str(bad), bad.advice)
            except NodeTrouble as trouble:
                yield Finding(name, False, str(trouble), "look at the nodes: ray status, and the logs of the one named")
            else:
                yield Finding(name, True, text) if text else Finding(name, None, self._why_not(name))

    def _why_not(self, name: str) -> str:
        if name == "weights":
            return "no file of weights is needed"
        return "not looked at without Ray" if self.nodes is None else "no GPU is asked for, and there is none"

    def _driver(self) -> str:
        facts = collect_local_facts()
        if facts.driver_gpus and not facts.torch_gpus:
            raise _Bad(
                f"the NVIDIA driver has {facts.driver_gpus} GPUs, torch {facts.torch} none",
                f"update the driver: this torch is built for CUDA {facts.cuda}",
            )
        gpus = f"{facts.torch_gpus} GPUs" if facts.torch_gpus else "no GPU"
        return f"Python {facts.python}, torch {facts.torch}, Ray {facts.ray}, {gpus} here"

    def _ray(self) -> str:
        # A Ray that starts here has as many logical CPUs as the job wants; a cluster has what it has.
        sizes = [] if os.environ.get("RAY_ADDRESS") else [self.needs.size.model_copy(update={"gpus_per_worker": 0.0})]
        try:
            place = cluster.connect(*sizes)
        except ClusterError as error:
            if is_listening(os.environ.get("RAY_ADDRESS", "")):
                advice = "something listens there: does it know your token, and is its Ray of the version above?"
                advice += " (RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token)"
            else:
                advice = "give RAY_ADDRESS=HOST:6379 of a head that runs and can be reached; without, a Ray starts here"
            raise _Bad(str(error), advice) from None
        self.nodes = ClusterNodes()
        if other := self.nodes.with_other_versions():
            raise _Bad(f"{place}: other versions on {other}", "give every node the same image")
        token = "on" if os.environ.get("RAY_AUTH_MODE") == "token" else "off"
        if token == "off" and os.environ.get("RAY_ADDRESS"):
            raise _Bad(
                f"{place}: token authentication is off: whoever reaches it can run code on it",
                "start every node with RAY_AUTH_MODE=token and the same RAY_AUTH_TOKEN",
            )
        return f"{place}: {self.nodes.summary()}, token authentication {token}"

    def _gpus(self) -> str | None:
        if self.nodes is None:
            return None
        wanted = self.needs.size.min_workers * self.needs.size.gpus_per_worker
        has = self.nodes.ray_gpus()
        for address, facts in self.nodes.facts().items():
            if facts.torch_gpus < has.get(address, 0):
                raise _Bad(
                    f"Ray has {has[address]:g} GPUs on {address}, torch sees {facts.torch_gpus}",
                    "check its driver (nvidia-smi) and that it runs the GPU image",
                )
        if wanted > sum(has.values()):
            raise _Bad(
                f"the job asks for {wanted:g} GPUs, Ray has {sum(has.values()):g}",
                "add GPU nodes, or train on CPUs: --set cluster.gpus_per_worker=0",
            )
        return f"{sum(has.values()):g} in Ray, and torch sees them" if sum(has.values()) else None

    def _workers(self) -> str | None:
        if self.nodes is None:
            return None
        try:
            cluster.connect(self.needs.size)
            return measure_all_reduce(self.needs.size, ALL_REDUCE_MIB)
        except ClusterError as error:
            raise _Bad(str(error), "start more nodes, or ask for less (cluster.workers, serve.replicas)") from None
        except RuntimeError as error:
            raise _Bad(
                f"workers cannot talk to each other: {error}",
                "open all ports between the nodes; with several networks set NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME",
            ) from None

    def _storage(self) -> str:
        place = locate(self.needs.storage)
        advice = "check the URI, and that every node has AWS_ENDPOINT_URL and credentials in its environment"
        if place.is_local:
            advice = "give a URI or a folder that all nodes share and may write"
        try:
            outcomes: list[StorageSpeed] = [try_storage(place)]
            if self.nodes is not None:
                outcomes += self.nodes.try_storage(place)
        except StorageError as error:
            raise _Bad(str(error), advice) from None
        write, read = (min(getattr(one, name) for one in outcomes) for name in ("write_mb_per_s", "read_mb_per_s"))
        count = len(outcomes) - 1
        seen_from = f"here and {count} node{'s' * (count != 1)}" if count else "here"
        return f"{place.uri} from {seen_from}: write {write:.0f} MB/s, read {read:.0f} MB/s at least, list, delete"

    def _mlflow(self) -> str:
        try:
            return f"{self.needs.tracking}: {try_mlflow(self.needs.tracking)}"
        except TrackingError as error:
            raise _Bad(str(error), "check MLFLOW_TRACKING_URI and the server's own artifact store") from None

    def _weights(self) -> str | None:
        try:
            wrong = describe_missing_weights(self.needs.weights)
        except WeightsError as error:
            wrong = [str(error)]
        if wrong:
            raise _Bad(
                "; ".join(wrong), "corun-ray weights fetch JOB.yaml, or put the files there and `weights add` them"
            )
        files = [name for wanted in self.needs.weights.values() for name in wanted]
        return f"{', '.join(files)}: there, and as their checksums say" if files else None

    def _clock(self) -> str:
        offsets = measure_server_clocks(self.needs.storage, self.needs.tracking)
        if self.nodes is not None:
            offsets |= self.nodes.clocks()
        wrong = {name: offset_s for name, offset_s in offsets.items() if abs(offset_s) > MAX_CLOCK_S}
        if wrong:
            said = ", ".join(f"{name} {offset_s:+.0f} s" for name, offset_s in wrong.items())
            raise _Bad(
                f"apart from the clock here: {said}", "let every machine take its time from NTP (chronyc tracking)"
            )
        most = max(map(abs, offsets.values()), default=0.0)
        return f"{', '.join(offsets) or 'this machine'}: at most {most:.1f} s apart"
