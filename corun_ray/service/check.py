"""`corun-ray check`: look at everything a job would use, and start nothing."""

from collections.abc import Iterator, Sequence

from corun_ray.config.jobs import ColabatorJob, DehazeJob, DepthJob, EvaluateJob, Job, ServeJob, TrainingJob, TuneJob
from corun_ray.config.tasks import EvaluateSection
from corun_ray.config.trials import choose_example_job
from corun_ray.core.choices import QUALITY_NAMES, SHIPPED_MODELS
from corun_ray.core.errors import UserError
from corun_ray.core.metrics.catalog import OWN_METRICS, TRANSMISSION_METRICS
from corun_ray.service.cluster.gpus import count_driver_gpus
from corun_ray.service.cluster.ports import read_ray_address
from corun_ray.service.data.manifest import (
    Manifest,
    build_manifest,
    list_images,
    list_validation_sets,
    pair_validation_images,
    refuse_misfits,
    refuse_other_sizes,
)
from corun_ray.service.data.results import REGISTRY_SCHEMES, find_results, holds_results
from corun_ray.service.storage import locate

SUBJECT_CHARACTERS = 9
"""Width of the first column of the notes."""

Notes = Iterator[tuple[str, str]]
"""What a check yields: subject and text of each note. A check raises `UserError` for a mistake."""


class _Mistake(UserError):
    pass


def check_job(job: Job, earlier: Sequence[Job]) -> tuple[list[str], list[str]]:
    """Return notes and mistakes of a job, one a line.

    Notes tell what the job would use. `earlier` are the jobs before it in its file: models that they will register do
    not exist yet.
    """
    # A search is checked by the files of its first trial, and by the storage and machines of all trials.
    trial = choose_example_job(job)
    checks = [
        _check_data(trial),
        _check_models(trial, earlier),
        _check_weights(trial),
        _check_storage(job),
        _check_machines(job),
    ]

    found = []
    if isinstance(job, TuneJob):
        found.append(("trials", f"{job.tune.num_trials} of {job.train.steps} steps; the first one's files:"))

    # A mistake ends its own check alone: the user sees the mistakes of all checks at once.
    mistakes = []
    for check in checks:
        try:
            for note in check:
                found.append(note)
        except UserError as error:
            mistakes += str(error).splitlines()

    notes = [f"{subject:<{SUBJECT_CHARACTERS}} {text}" for subject, text in found]
    return notes, mistakes


def _check_data(job: Job) -> Notes:
    """Check that the job's images can be listed and paired."""
    if isinstance(job, TrainingJob):
        manifest = build_manifest(job)
        yield "data", f"{_describe_clear_images(manifest)}, {len(manifest.hazy)} real hazy"
        for uri, reason in manifest.skipped.items():
            yield "skipped", f"{uri}: {reason}"

        validation_sets = list_validation_sets(job)
        for images in validation_sets:
            yield "validate", f"{len(images.pairs)} images, measured as {images.prefix}/..."

        # Beyond this fraction, the job itself would fail.
        if len(manifest.skipped) > job.data.max_bad_fraction * manifest.num_images:
            share = f"{len(manifest.skipped)} of {manifest.num_images}"
            raise _Mistake(f"data.max_bad_fraction: {share} files are skipped, more than {job.data.max_bad_fraction:g}")
        refuse_other_sizes(job, manifest, validation_sets)
    elif isinstance(job, EvaluateJob):
        pairs = pair_validation_images(job.evaluate, "evaluate")
        refuse_misfits(job.evaluate, pairs, "evaluate")
        yield "data", f"{len(pairs)} images to measure on"
        for name, results in find_results(job.evaluate, [hazy for hazy, _ in pairs]).items():
            yield "results", f"{name}: {len(results.images)} images in {results.root}"
        if job.evaluate.detector is not None:
            yield "boxes", _describe_boxes(job.evaluate, [key for key, _ in pairs])
    elif isinstance(job, DehazeJob):
        images_to_dehaze = list_images(job.dehaze.input, "dehaze.input")
        yield "data", f"{len(images_to_dehaze)} images to dehaze"
    elif isinstance(job, DepthJob):
        photographs = list_images(job.depth.input, "depth.input")
        yield "data", f"{len(photographs)} photographs whose depth is estimated"


def _describe_boxes(section: EvaluateSection, images: Sequence[str]) -> str:
    """Return the boxes that a detector is to find, as text; raises `AnnotationError`."""
    # torchvision takes seconds to import.
    from corun_ray.core.metrics.detector import list_detector_classes
    from corun_ray.service.data.annotations import read_truth

    assert section.detector is not None
    classes = list_detector_classes(section.detector, section.detector_classes)
    return read_truth(section, images, classes).describe()


def _describe_clear_images(manifest: Manifest) -> str:
    if manifest.paired_hazy is not None:
        return f"{len(manifest.clear)} pairs of degraded and clean images"
    depth = "procedural depth" if manifest.depth is None else "a depth map each"
    return f"{len(manifest.clear)} clear images with {depth}"


def _check_models(job: Job, earlier: Sequence[Job]) -> Notes:
    """Check that the models which the job uses exist.

    Models of a registry are looked up when the job starts.
    """
    # An earlier job of the file may register a model under any alias.
    future_models = []
    for other in earlier:
        if other.tracking.register:
            future_models.append(f"models:/{other.tracking.register}@")

    for key, source in _list_model_sources(job).items():
        if source.startswith(tuple(future_models)):
            yield "model", f"{source}, from an earlier job of this file"
        elif source.startswith(REGISTRY_SCHEMES):
            yield "model", f"{source}, looked up when the job starts"
        elif source in SHIPPED_MODELS:
            yield "model", f"{source}, which comes with this package"
        elif isinstance(job, EvaluateJob) and holds_results(source):
            continue  # Told with the data.
        elif locate(source).exists():
            yield "model", source
        else:
            expected = f"a checkpoint folder, a .pth, an MLflow URI or {' or '.join(SHIPPED_MODELS)}"
            raise _Mistake(f"{key}: nothing at {source} (expected {expected})")


def _list_model_sources(job: Job) -> dict[str, str]:
    """Return the sources of the job's models, by key."""
    if isinstance(job, TrainingJob) and job.network.init:
        return {"network.init": job.network.init}
    if isinstance(job, EvaluateJob):
        return {f"evaluate.models.{name}": source for name, source in job.evaluate.models.items()}
    if isinstance(job, DehazeJob):
        return {"dehaze.model": job.dehaze.model}
    if isinstance(job, ServeJob):
        return {"serve.model": job.serve.model}
    return {}


def _check_weights(job: Job) -> Notes:
    """Check the files of pretrained weights."""
    if not _may_need_weights(job):
        return
    from corun_ray.service.weights.needed import describe_missing_weights, find_needed_files

    needed = find_needed_files(job)
    for folder, files in needed.items():
        yield "weights", f"{', '.join(files)} in {folder}"

    missing = describe_missing_weights(needed)
    if missing:
        raise _Mistake("\n".join(missing))


def _may_need_weights(job: Job) -> bool:
    """Return whether the job may need files of weights.

    To find out which ones takes seconds of imports.
    """
    if isinstance(job, EvaluateJob):
        return job.evaluate.detector is not None or not set(job.evaluate.metrics) <= OWN_METRICS.keys()
    if isinstance(job, ColabatorJob):
        coherence = job.coherence
        if coherence.clarity == "daclip" or coherence.quality not in QUALITY_NAMES:
            return True
    if isinstance(job, DepthJob):
        return True
    if not isinstance(job, TrainingJob):
        return False
    validation_metrics = set(job.train.validation_metrics or ())
    return job.loss.weights is not None or not validation_metrics <= OWN_METRICS.keys() | TRANSMISSION_METRICS.keys()


def _check_storage(job: Job) -> Notes:
    """Check the storage; tell where MLflow's records go."""
    storage = locate(job.storage)
    state = "exists" if storage.exists() else "will be made"
    yield "storage", f"{storage.uri} ({state})"
    yield "mlflow", f"{job.tracking.uri or 'mlflow.db in the storage folder'}, experiment {job.tracking.experiment}"


def _check_machines(job: Job) -> Notes:
    """Tell which machines the job needs.

    Without a cluster, this machine must have the GPUs.
    """
    cluster = read_ray_address()
    where = cluster or "a local Ray"
    if isinstance(job, EvaluateJob | DehazeJob | DepthJob):
        yield "machines", f"every GPU, else every CPU, of {where}"
        return

    who, key, work = "workers", "cluster.gpus_per_worker", "train"
    if isinstance(job, ServeJob):
        who, key, work = "replicas", "serve.gpus_per_replica", "serve"
        yield "serves", f"{job.serve.host}, port {job.serve.port}, path {job.serve.path}"

    # An elastic job runs with its fewest workers, so it needs no more than they do.
    size = job.whole_cluster
    cpus = size.min_workers * size.cpus_per_worker + size.data_cpus
    gpus = size.min_workers * size.gpus_per_worker
    needs = f"{cpus:g} CPUs and {gpus:g} GPUs in all"
    if size.is_elastic:
        needs = f"at least {needs}"
    yield "machines", f"{size.workers_text} {who}; {needs}, on {where}"

    # A cluster is not asked for its GPUs: this check starts and joins nothing.
    if gpus and not cluster and gpus > count_driver_gpus():
        raise _Mistake(
            f"{key}: {gpus:g} GPUs in all, but this machine has {count_driver_gpus()} "
            f"(set RAY_ADDRESS to use a cluster, or 0 to {work} on the CPU)"
        )
