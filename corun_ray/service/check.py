"""`corun-ray check`: looks at everything a job would use, and starts nothing."""

import os
from collections.abc import Iterator, Sequence

from corun_ray.config.jobs import ColabatorJob, DehazeJob, EvaluateJob, Job, ServeJob, TrainingJob, TuneJob
from corun_ray.config.trials import example
from corun_ray.core.choices import QUALITY_NAMES
from corun_ray.core.errors import UserError
from corun_ray.core.metrics.catalog import OWN_METRICS
from corun_ray.service.cluster.gpus import count_driver_gpus
from corun_ray.service.data.manifest import (
    Manifest,
    build_manifest,
    list_images,
    list_validation_sets,
    pair_validation_images,
)
from corun_ray.service.storage import locate

REGISTRY_SCHEMES = ("models:/", "runs:/")


def check_job(job: Job, earlier: Sequence[Job]) -> tuple[list[str], list[str]]:
    """What the job would use, and what is wrong with it, a line each.

    `earlier` are the jobs before it in its file: models that they will register cannot be looked at yet.
    """
    notes, mistakes = [], []
    if isinstance(job, TuneJob):
        notes.append(f"trials    {job.tune.num_trials} of {job.train.steps} steps; the first one's files:")
    trial = example(job)
    for look, at in ((_data, trial), (_models, trial), (_weights, trial), (_storage, job), (_machines, job)):
        try:
            for note in look(at, earlier):
                notes.append(note)
        except UserError as error:
            mistakes += str(error).splitlines()
    return notes, mistakes


class _Mistake(UserError):
    pass


def _data(job: Job, earlier: Sequence[Job]) -> Iterator[str]:
    if isinstance(job, TrainingJob):
        manifest = build_manifest(job)
        yield f"data      {_pairs(manifest)}, {len(manifest.hazy)} real hazy"
        for uri, reason in manifest.skipped.items():
            yield f"set aside {uri}: {reason}"
        for held in list_validation_sets(job):
            yield f"held out  {len(held.pairs)} images, measured as {held.prefix}/..."
        if len(manifest.skipped) > job.data.max_bad_fraction * manifest.num_images:
            share = f"{len(manifest.skipped)} of {manifest.num_images}"
            raise _Mistake(
                f"data.max_bad_fraction: {share} files are set aside, more than {job.data.max_bad_fraction:g}"
            )
    elif isinstance(job, EvaluateJob):
        pairs = pair_validation_images(job.evaluate.hazy, job.evaluate.clear, "evaluate")
        yield f"data      {len(pairs)} images to measure on"
    elif isinstance(job, DehazeJob):
        yield f"data      {len(list_images(job.dehaze.input, 'dehaze.input'))} images to dehaze"


def _pairs(manifest: Manifest) -> str:
    if manifest.paired_hazy is not None:
        return f"{len(manifest.clear)} pairs of degraded and clean images"
    depth = "procedural depth" if manifest.depth is None else "a depth map each"
    return f"{len(manifest.clear)} clear images with {depth}"


def _models(job: Job, earlier: Sequence[Job]) -> Iterator[str]:
    sources = {}
    if isinstance(job, TrainingJob) and job.network.init:
        sources["network.init"] = job.network.init
    elif isinstance(job, EvaluateJob):
        sources = {f"evaluate.models.{name}": source for name, source in job.evaluate.models.items()}
    elif isinstance(job, DehazeJob):
        sources = {"dehaze.model": job.dehaze.model}
    elif isinstance(job, ServeJob):
        sources = {"serve.model": job.serve.model}
    made_here = tuple(f"models:/{other.tracking.register}@" for other in earlier if other.tracking.register)
    for key, source in sources.items():
        if made_here and source.startswith(made_here):
            yield f"model     {source}, from an earlier job of this file"
        elif source.startswith(REGISTRY_SCHEMES):
            yield f"model     {source}, looked up when the job starts"
        elif locate(source).exists():
            yield f"model     {source}"
        else:
            raise _Mistake(f"{key}: nothing at {source} (expected a checkpoint folder, a .pth or an MLflow URI)")


def _needs_weights(job: Job) -> bool:
    """Whether anything may need a file of weights; to find out which takes seconds."""
    if isinstance(job, EvaluateJob):
        return not set(job.evaluate.metrics) <= OWN_METRICS.keys()
    scored = isinstance(job, ColabatorJob) and (
        job.coherence.clarity == "daclip" or job.coherence.quality not in QUALITY_NAMES
    )
    return scored or (isinstance(job, TrainingJob) and job.loss.weights is not None)


def _weights(job: Job, earlier: Sequence[Job]) -> Iterator[str]:
    if not _needs_weights(job):
        return
    from corun_ray.service.weights.needed import describe_missing_weights, find_needed_files

    needed = find_needed_files(job)
    for folder, wanted in needed.items():
        yield f"weights   {', '.join(wanted)} in {folder}"
    if lines := describe_missing_weights(needed):
        raise _Mistake("\n".join(lines))


def _storage(job: Job, earlier: Sequence[Job]) -> Iterator[str]:
    storage = locate(job.storage)
    state = "exists" if storage.exists() else "will be made"
    yield f"storage   {storage.uri} ({state})"
    yield f"mlflow    {job.tracking.uri or 'mlflow.db in the storage folder'}, experiment {job.tracking.experiment}"


def _machines(job: Job, earlier: Sequence[Job]) -> Iterator[str]:
    if isinstance(job, EvaluateJob | DehazeJob):
        yield f"machines  every GPU, else every CPU, of {os.environ.get('RAY_ADDRESS') or 'a local Ray'}"
        return
    size = job.whole_cluster
    cpus = size.min_workers * size.cpus_per_worker + size.data_cpus
    gpus = size.min_workers * size.gpus_per_worker
    where = os.environ.get("RAY_ADDRESS")
    needs = f"{'at least ' if size.is_elastic else ''}{cpus:g} CPUs and {gpus:g} GPUs in all"
    who, key, work = ("workers", "cluster.gpus_per_worker", "train")
    if isinstance(job, ServeJob):
        who, key, work = ("replicas", "serve.gpus_per_replica", "serve")
        yield f"serves    {job.serve.host}, port {job.serve.port}, path {job.serve.path}"
    yield f"machines  {size.workers_text} {who}; {needs}, on {where or 'a local Ray'}"
    if gpus and not where and gpus > count_driver_gpus():
        raise _Mistake(
            f"{key}: {gpus:g} GPUs in all, but this machine has {count_driver_gpus()} "
            f"(set RAY_ADDRESS to use a cluster, or 0 to {work} on the CPU)"
        )
