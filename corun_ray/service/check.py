"""`corun-ray check`: look at everything a job would use, and start nothing."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from corun_ray.config.jobs import ColabatorJob, DehazeJob, DepthJob, EvaluateJob, Job, ServeJob, TrainingJob, TuneJob
from corun_ray.config.tasks import EvaluateSection
from corun_ray.config.trials import list_data_examples, list_example_trials
from corun_ray.core.choices import QUALITY_NAMES, SHIPPED_MODELS
from corun_ray.core.errors import UserError
from corun_ray.core.metrics.catalog import OWN_METRICS, TRANSMISSION_METRICS
from corun_ray.service.cluster.compilers import refuse_impossible_compiling
from corun_ray.service.cluster.gpus import count_driver_gpus
from corun_ray.service.cluster.ports import read_ray_address
from corun_ray.service.data.inspection import Inspection, Inspector, find_largest_patch_px, refuse_unusable
from corun_ray.service.data.listing import IMAGE_SUFFIXES, Listing
from corun_ray.service.data.manifest import (
    Manifest,
    ManifestError,
    build_manifest,
    list_image_folder,
    list_validation_sets,
    pair_validation_images,
    refuse_misfits,
    refuse_other_sizes,
    use_folders,
)
from corun_ray.service.data.results import REGISTRY_SCHEMES, find_results, holds_results
from corun_ray.service.storage import locate

SAMPLING = Inspector()
"""Opens a sample of each kind of image."""
SUBJECT_CHARACTERS = 9
"""Width of the first column of the notes."""

Notes = Iterator[tuple[str, str]]
"""What a check yields: subject and text of each note. A check raises `UserError` for a mistake."""


class _Mistake(UserError):
    pass


def check_job(
    job: Job, earlier: Sequence[Job], folder: Path = Path(), inspector: Inspector = SAMPLING
) -> tuple[list[str], list[str]]:
    """Return notes and mistakes of a job, one a line.

    Notes tell what the job would use. `earlier` are the jobs before it in its file: models that they will register do
    not exist yet. A network's own class may lie in `folder`. `inspector` opens the job's images.
    """
    # A search is checked by all trials that differ in what a check looks at, and by the storage and machines of all.
    checks = [_check_images(example, job, inspector) for example in list_data_examples(job)]
    checks += [_check_models(example, earlier, folder) for example in _list_examples(job, "network", "data")]
    checks += [_check_weights(example) for example in _list_examples(job, "coherence", "loss", "train")]
    checks += [_check_schedule(example) for example in _list_examples(job, "optim", "train")]
    checks += [_check_compiler(example) for example in _list_examples(job, "optim")]
    checks += [_check_storage(job), _check_machines(job)]

    found = []
    if isinstance(job, TuneJob):
        found.append(("trials", f"{job.tune.num_trials} of {job.train.steps} steps; what they use:"))

    # A mistake ends its own check alone: the user sees the mistakes of all checks at once.
    mistakes: list[str] = []
    for check in checks:
        try:
            for note in check:
                found.append(note)
        except UserError as error:
            mistakes += str(error).splitlines()

    # What trials have in common is told once.
    notes = [f"{subject:<{SUBJECT_CHARACTERS}} {text}" for subject, text in dict.fromkeys(found)]
    return notes, list(dict.fromkeys(mistakes))


def _list_examples(job: Job, *sections: str) -> Sequence[Job]:
    """Return a search's trials that differ in these sections; another job alone."""
    return list_example_trials(job, *sections) if isinstance(job, TuneJob) else [job]


# --- Images ---


def _check_images(example: Job, job: Job, inspector: Inspector) -> Notes:
    """Check that the job's images can be listed, paired and used.

    `example` is the job itself, or a trial of it.
    """
    if isinstance(example, TrainingJob):
        trials = [trial for trial in _list_examples(job, "data") if isinstance(trial, TrainingJob)]
        yield from _check_training_images(example, max(map(find_largest_patch_px, trials)), inspector)
    elif isinstance(example, EvaluateJob):
        yield from _check_evaluated_images(example.evaluate, example.storage, inspector)
    elif isinstance(example, DehazeJob):
        outputs = {"dehaze.output": example.dehaze.output}
        found = list_image_folder(example.dehaze.input, "dehaze.input", outputs)
        yield from _describe_folder(found, "images to dehaze")
        yield from _report([inspector.inspect_images(found.root, list(found.select(IMAGE_SUFFIXES)), "dehaze.input")])
    elif isinstance(example, DepthJob):
        outputs = {"depth.output": example.depth.output}
        found = list_image_folder(example.depth.input, "depth.input", outputs)
        yield from _describe_folder(found, "photographs whose depth is estimated")
        yield from _report([inspector.inspect_images(found.root, list(found.select(IMAGE_SUFFIXES)), "depth.input")])


def _describe_folder(found: Listing, what: str) -> Notes:
    """Tell what a folder of images holds; `what` is what the images are."""
    yield "data", f"{len(found.select(IMAGE_SUFFIXES))} {what}"
    for uri, reason in found.list_skipped(IMAGE_SUFFIXES).items():
        yield "skipped", f"{uri}: {reason}"
    others = found.count_others(IMAGE_SUFFIXES)
    if others:
        yield "others", f"passed over: {others}"


def _check_training_images(job: TrainingJob, patch_px: int, inspector: Inspector) -> Notes:
    """Check training images and validation sets; `patch_px` is the largest patch."""
    manifest = build_manifest(job)
    yield "data", f"{_describe_clear_images(manifest)}, {len(manifest.hazy)} real hazy"
    if job.data.synthesis == "worker":
        device = "GPUs" if job.cluster.gpus_per_worker else "CPUs"
        yield "synthesis", f"haze, noise, JPEG and strong views are made by the training workers, on their {device}"
    for uri, reason in manifest.skipped.items():
        yield "skipped", f"{uri}: {reason}"
    for uri, others in manifest.passed_over.items():
        yield "others", f"passed over: {others} in {uri}"

    validation_sets = list_validation_sets(job)
    for images in validation_sets:
        yield "validate", f"{len(images.pairs)} images, measured as {images.prefix}/..."

    # Open images, and tell of all of them before any mistake ends this check.
    training = inspector.inspect_training(job, manifest)
    validation = inspector.inspect_validation(job, validation_sets)
    for one in [*training, *validation]:
        yield from _describe_inspection(one)
    for one in training:
        smaller = one.describe_smaller(patch_px)
        if smaller is not None:
            yield "smaller", smaller

    # The job itself would refuse the same. Images of other sizes than their truths have a line of their own.
    refuse_other_sizes(job, manifest, validation_sets)
    mistakes = []
    for refuse in (
        lambda: refuse_unusable(job, manifest, training),
        *[one.refuse_if_nothing_is_usable for one in validation],
    ):
        try:
            refuse()
        except ManifestError as error:
            mistakes.append(str(error))
    if mistakes:
        raise _Mistake("\n".join(mistakes))


def _check_evaluated_images(section: EvaluateSection, storage: str, inspector: Inspector) -> Notes:
    """Check the images of an evaluation, their truths, results and boxes."""
    passed_over: dict[str, str] = {}
    pairs = pair_validation_images(section, "evaluate", storage, passed_over)
    section = section.model_copy(update=use_folders(section))
    refuse_misfits(section, pairs, "evaluate")
    yield "data", f"{len(pairs)} images to measure on"
    for uri, others in passed_over.items():
        yield "others", f"passed over: {others} in {uri}"
    inspections = [inspector.inspect_pairs(section, pairs, "evaluate.hazy")]

    for name, results in find_results(section, [hazy for hazy, _ in pairs]).items():
        yield "results", f"{name}: {len(results.images)} images in {results.root}"
        key = f"evaluate.models.{name}"
        inspections.append(inspector.inspect_results(section.hazy, results.root, results.images, key))
    if section.detector is not None:
        yield "boxes", _describe_boxes(section, [key for key, _ in pairs])
    yield from _report(inspections)


def _report(inspections: Sequence[Inspection]) -> Notes:
    """Tell what was found, and refuse images none of which can be used."""
    for one in inspections:
        yield from _describe_inspection(one)
    for one in inspections:
        one.refuse_if_nothing_is_usable()


def _describe_inspection(inspection: Inspection) -> Notes:
    """Tell how many images were opened, and which cannot be used."""
    share = f"{inspection.num_opened} of {inspection.num_images}" if inspection.is_sample else "all"
    yield "opened", f"{inspection.key}: {share}, {len(inspection.unusable) or 'none'} unusable"
    for uri, reason in inspection.unusable.items():
        yield "unusable", f"{uri}: {reason}"


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


# --- Models, weights and the learning rate ---


def _check_models(job: Job, earlier: Sequence[Job], folder: Path) -> Notes:
    """Check that the models which the job uses exist and can be loaded.

    Models of a registry are looked up when the job starts.
    """
    # An earlier job of the file may register a model under any alias.
    future_models = []
    for other in earlier:
        if other.tracking.register:
            future_models.append(f"models:/{other.tracking.register}@")

    mistakes = []
    for key, source in _list_model_sources(job).items():
        if source.startswith(tuple(future_models)):
            yield "model", f"{source}, from an earlier job of this file"
        elif source.startswith(REGISTRY_SCHEMES):
            yield "model", f"{source}, looked up when the job starts"
        elif source in SHIPPED_MODELS:
            yield "model", f"{source}, which comes with this package"
        elif isinstance(job, EvaluateJob) and holds_results(source):
            continue  # Told with the data.
        elif not locate(source).exists():
            expected = f"a checkpoint folder, a .pth, an MLflow URI or {' or '.join(SHIPPED_MODELS)}"
            mistakes.append(f"{key}: nothing at {source} (expected {expected})")
        else:
            mistake = _find_load_mistake(job, key, source, folder)
            if mistake is None:
                yield "model", source
            else:
                mistakes.append(mistake)

    # A network of another kind is built, even where no checkpoint is loaded into it.
    if isinstance(job, TrainingJob) and job.network.type != "corun" and job.network.init is None:
        mistake = _find_load_mistake(job, "network", job.network.type, folder)
        mistakes += [mistake] if mistake else []

    # One line for each model that is wrong.
    if mistakes:
        raise _Mistake("\n".join(mistakes))


def _find_load_mistake(job: Job, key: str, source: str, folder: Path) -> str | None:
    """Load a model as the job would; return why the job cannot, None if it can."""
    # torch takes seconds to import.
    from corun_ray.service.models.sources import fetch_model, load_starting_model

    try:
        if isinstance(job, TrainingJob):
            load_starting_model(job, folder)
        else:
            fetch_model(source, job.tracking.uri)
    except UserError as error:
        # Errors of a training name its key. Those of a file name the file once more.
        text = " ".join(str(error).split())
        return text if isinstance(job, TrainingJob) else f"{key}: {text}"
    return None


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


def _check_schedule(job: Job) -> Notes:
    """Check that the learning rate has not come to its end before the training."""
    if not isinstance(job, TrainingJob):
        return
    early_end = job.optim.describe_early_end(job.train.steps)
    if early_end is None:
        return

    # Cycles are written for one training. A schedule may be the default, or end early on purpose.
    if job.optim.cycles:
        raise _Mistake(early_end)
    yield "schedule", early_end


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


# --- Storage and machines ---


def _check_storage(job: Job) -> Notes:
    """Check the storage; tell where MLflow's records go."""
    storage = locate(job.storage)
    state = "exists" if storage.exists() else "will be made"
    yield "storage", f"{storage.uri} ({state})"
    yield "mlflow", f"{job.tracking.uri or 'mlflow.db in the storage folder'}, experiment {job.tracking.experiment}"


def _check_compiler(job: Job) -> Notes:
    """Check that a network which is to be compiled can be."""
    refuse_impossible_compiling(job)
    yield from ()


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
