"""Local folders on a cluster of several nodes: every node must see the same files in them.

A folder of one machine alone fails late and in Ray's words: workers of other nodes write checkpoints into a folder of
their own, or find no image. So the driver leaves a mark, and every other node looks for it before any work begins.
"""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from corun_ray.config.jobs import ColabatorJob, DehazeJob, DepthJob, Job, TrainingJob, TuneJob
from corun_ray.service.cluster.connect import ClusterError, format_nodes
from corun_ray.service.cluster.paths import list_folders
from corun_ray.service.cluster.submission import SQLITE
from corun_ray.service.storage import Location, locate
from corun_ray.service.waiting import FIRST_WORD_S, WORD_EVERY_S, Say

ANSWER_TIMEOUT_S = 180.0
"""A node that is busy takes long to start a process."""
MARK_BYTES = 16
ADVICE = "expected a URI (s3://…) or a folder that all nodes share"
DRIVER_KEYS = ("storage", "evaluate.boxes", "depth.weights")
"""Places that the driver alone uses, but for the `storage` of a training."""
WRITTEN_KEYS = {TrainingJob: "storage", DehazeJob: "dehaze.output", DepthJob: "depth.output"}
"""The place that the nodes write, by kind of job."""


class Mark(NamedTuple):
    """A file by which a node shows that it sees a place as the driver does."""

    key: str
    place: str
    path: str
    size_bytes: int


def refuse_unshared(job: Job, say: Say, more: Mapping[str, str]) -> None:
    """Refuse a job with local places that some node of the connected cluster does not see.

    `more` are places that its nodes read and no key of `paths.FOLDER_KEYS` names, by the key to report.

    Raises `ClusterError` and `StorageError`.
    """
    # A pool's shards run on any node, also on those that run no other work.
    nodes = list_other_nodes(has_pool=isinstance(job, ColabatorJob | TuneJob))
    written, read = list_places(job)
    refuse_unshared_places(nodes, written, read | dict(more), say)


def list_places(job: Job) -> tuple[dict[str, str], dict[str, str]]:
    """Return the places that a job's processes on the nodes write, and those that they read, by key."""
    written, read = {}, {}
    written_key = next((key for kind, key in WRITTEN_KEYS.items() if isinstance(job, kind)), None)
    for key, place in list_folders(job):
        if key == written_key:
            written[key] = place
        elif key not in DRIVER_KEYS:
            # Of the folders among which a search chooses, each is looked at.
            read[key if key not in read else f"{key} ({place})"] = place

    # The trials of a search write to MLflow from any node.
    if isinstance(job, TuneJob) and job.tracking.uri.startswith(SQLITE):
        written["tracking.uri"] = os.path.dirname(job.tracking.uri.removeprefix(SQLITE)) or "."
    return written, read


def list_other_nodes(has_pool: bool = False) -> dict[str, str]:
    """Return the nodes beside the driver's that may run work: id → address."""
    here = ray.get_runtime_context().get_node_id()
    nodes = {}
    for node in ray.nodes():
        works = has_pool or any(node["Resources"].get(kind) for kind in ("CPU", "GPU"))
        if node["Alive"] and works and node["NodeID"] != here:
            nodes[node["NodeID"]] = node["NodeManagerAddress"]
    return nodes


def refuse_unshared_places(
    nodes: Mapping[str, str], written: Mapping[str, str], read: Mapping[str, str], say: Say
) -> None:
    """Refuse local places, by key, that one of the nodes (id → address) does not see.

    Raises `ClusterError` and `StorageError`.
    """
    if not nodes:
        return

    # Leave a file in what is written, and take one that is there of what is read.
    marks = list(_find_marks(read))
    left: list[Location] = []
    try:
        for key, place in written.items():
            if locate(place).is_local:
                file = locate(place).child(f".corun-probe-{os.urandom(6).hex()}")
                file.write(bytes(MARK_BYTES))
                left.append(file)
                marks.append(Mark(key, place, file.path, MARK_BYTES))
        unseen = _ask_nodes(nodes, marks, say) if marks else {}
    finally:
        for file in left:
            file.delete()

    lines = describe_unseen(unseen, marks)
    if lines:
        raise ClusterError("\n".join(lines))


def describe_unseen(unseen: Mapping[str, list[int]], marks: list[Mark]) -> list[str]:
    """Return a line for each place that some node does not see.

    `unseen` are the numbers of the marks by the node's address.
    """
    lines = []
    for number, mark in enumerate(marks):
        addresses = [address for address, numbers in unseen.items() if number in numbers]
        if addresses:
            node = addresses[0] if len(addresses) == 1 else f"{addresses[0]} and {len(addresses) - 1} more nodes"
            lines.append(f"{mark.key}: {mark.place} is not the same folder on {node}; {ADVICE}")
    return lines


def find_unseen(marks: list[Mark]) -> list[int]:
    """Return the numbers of the marks that this machine does not see."""
    unseen = []
    for number, mark in enumerate(marks):
        try:
            is_same = os.stat(mark.path).st_size == mark.size_bytes
        except OSError:
            is_same = False
        if not is_same:
            unseen.append(number)
    return unseen


def _find_marks(places: Mapping[str, str]) -> Iterator[Mark]:
    """Yield a file of each local place that has any."""
    for key, uri in places.items():
        place = locate(uri)
        file = _find_file(Path(place.path)) if place.is_local else None
        if file is not None:
            yield Mark(key, uri, str(file), file.stat().st_size)


def _find_file(path: Path) -> Path | None:
    """Return a file at a path or below, if there is any."""
    if path.is_file():
        return path
    for folder, _, names in os.walk(path):
        for name in names:
            file = Path(folder, name)
            if file.is_file():
                return file
    return None


def _ask_nodes(nodes: Mapping[str, str], marks: list[Mark], say: Say) -> dict[str, list[int]]:
    """Let each node look for the marks; return the numbers of those that it does not see, by its address.

    Raises `ClusterError` for a node that does not answer.
    """
    # No CPU is asked for: nodes that are busy look, too.
    answers = {}
    for node_id, address in nodes.items():
        there = NodeAffinitySchedulingStrategy(node_id, soft=False)
        answers[address] = ray.remote(find_unseen).options(num_cpus=0, scheduling_strategy=there).remote(marks)
    _await_answers(list(answers.values()), say)

    unseen = {}
    for address, answer in answers.items():
        try:
            unseen[address] = ray.get(answer, timeout=0)
        except RayError:
            raise ClusterError(
                f"{address}: the node has not looked at the job's local folders; see ray status"
            ) from None
    return unseen


def _await_answers(answers: list["ray.ObjectRef[list[int]]"], say: Say) -> None:
    """Wait for the answers of all nodes, with words, for some minutes at most."""
    waited_s, pause_s = 0.0, FIRST_WORD_S
    pending = answers
    while pending and waited_s < ANSWER_TIMEOUT_S:
        _, pending = ray.wait(answers, num_returns=len(answers), timeout=pause_s)
        waited_s, pause_s = waited_s + pause_s, WORD_EVERY_S
        if pending:
            nodes = format_nodes(len(pending))
            say(f"  waiting for {nodes} to look at the job's local folders: {waited_s:.0f} s")
