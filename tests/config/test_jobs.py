"""The schema: defaults by kind, and what it refuses."""

import pytest
from pydantic import ValidationError

from corun_ray.config.jobs import ColabatorJob, EvaluateJob, PretrainJob
from corun_ray.config.loading import JobFileError, build_job
from corun_ray.core.choices import CLARITY_NAMES, QUALITY_NAMES

PRETRAIN = {"kind": "pretrain", "name": "p", "data": {"clear": "clear"}}
COLABATOR = {"kind": "colabator", "name": "c", "data": {"clear": "clear", "hazy": "hazy"}}
EVALUATE = {"kind": "evaluate", "name": "e", "evaluate": {"hazy": "hazy"}}


def test_defaults_of_pretraining() -> None:
    job = PretrainJob.model_validate(PRETRAIN)
    assert (job.seed, job.storage) == (0, "runs")
    assert (job.train.steps, job.train.batch_per_worker) == (30_000, 2)
    assert (job.optim.lr, job.optim.min_lr, job.optim.schedule_steps) == (1e-4, 1e-4, 30_000)
    assert (job.data.random_resize, job.data.patch_px) == (False, 288)
    assert (job.data.depth, job.data.validation) == (None, None)
    assert (job.haze.beta, job.haze.airlight, job.haze.airlight_tint) == ((0.2, 2.8), (0.25, 1.0), 0.025)


def test_defaults_of_colabator() -> None:
    job = ColabatorJob.model_validate(COLABATOR)
    assert (job.train.steps, job.train.batch_per_worker) == (5_000, 1)
    assert (job.optim.lr, job.optim.min_lr, job.optim.schedule_steps) == (5e-5, 1e-6, 50_000)
    assert job.data.random_resize
    assert (job.pool.shards, job.pool.encoding, job.coherence.block_px) == (1, "uint8", 32)
    assert job.coherence.clarity in CLARITY_NAMES
    assert job.coherence.quality in QUALITY_NAMES


def test_lowest_learning_rate_follows_the_first() -> None:
    assert PretrainJob.model_validate(PRETRAIN | {"optim": {"lr": 3e-4}}).optim.min_lr == 3e-4
    assert ColabatorJob.model_validate(COLABATOR | {"optim": {"lr": 3e-4}}).optim.min_lr == 1e-6
    assert ColabatorJob.model_validate(COLABATOR | {"optim": {"lr": 1e-7}}).optim.min_lr == 1e-7


def test_metrics_are_those_that_can_be_measured() -> None:
    assert EvaluateJob.model_validate(EVALUATE).evaluate.metrics == ("fade",)
    with_truth = EVALUATE | {"evaluate": {"hazy": "hazy", "clear": "truth"}}
    assert EvaluateJob.model_validate(with_truth).evaluate.metrics == ("psnr", "ssim", "fade")


def test_jobs_and_their_sections_are_frozen() -> None:
    job = ColabatorJob.model_validate(COLABATOR)
    for part, name in [(job, "seed"), (job.optim, "lr"), (job.data, "clear"), (job.pool, "shards")]:
        with pytest.raises(ValidationError, match="frozen"):
            setattr(part, name, 1)


def mistake(section: str, values: dict, job: dict = COLABATOR) -> str:
    """What is said of a job with these values in a section."""
    kind = ColabatorJob if job["kind"] == "colabator" else PretrainJob
    with pytest.raises(ValidationError) as refusal:
        kind.model_validate(job | {section: job.get(section, {}) | values})
    error = refusal.value.errors()[0]
    cause = error["ctx"]["error"]
    return f"{getattr(cause, 'key', '.'.join(map(str, error['loc'])))}: {cause}"


def test_published_loss_weights_are_the_defaults() -> None:
    """The published recipe (arXiv 2406.07966)."""
    loss = PretrainJob.model_validate(PRETRAIN).loss
    assert (loss.pixel_weight, loss.scattering_weight, loss.perceptual_weight, loss.contrastive_weight) == (
        *(1.0, 0.01),
        *(0.0, 1.0),
    )
    published = ColabatorJob.model_validate(COLABATOR).loss
    assert (published.pixel_weight, published.scattering_weight) == (5.0, 0.01)
    assert (published.perceptual_weight, published.contrastive_weight) == (0.2, 1.0)
    assert published.haze_density_weight == 0


@pytest.mark.parametrize(
    ("section", "values", "said"),
    [
        ("coherence", {"clarity": "daclip"}, "coherence.weights: missing (clarity daclip needs its weights)"),
        ("coherence", {"degradations": ("rainy",)}, "coherence.degradations: only used by daclip, not by contrast"),
        (
            "coherence",
            {"quality": "musik"},
            "neither of clean, unclipped, reference nor a metric of pyiqa that rates single images (did you",
        ),
        ("coherence", {"quality": "psnr"}, 'coherence.quality: "psnr" is neither of'),
        ("coherence", {"quality": "pi"}, "coherence.quality_range: missing (pyiqa gives pi no range)"),
        ("loss", {"perceptual": "vgg19"}, "loss.weights: missing (perceptual vgg19 needs its weights)"),
        ("network", {"type": "NAFNet", "stages": 4}, "network.stages: only used by corun; NAFNet takes network.args"),
        ("network", {"args": {"width": 3}}, "network.args: not used by corun, which has stages and width"),
        ("network", {"type": "a b"}, 'network.type: "a b" is neither corun, an architecture of spandrel nor'),
        ("data", {"paired": {"hazy": "a", "clear": "b"}}, "data.clear: not used together with data.paired"),
        ("data", {"clear": None}, "data.clear: missing (folder, pack or URI of clear images; or give data.paired)"),
        ("data", {"mixup": 1.2}, "data.mixup: mixes the images of a batch, and batch_per_worker is 1"),
        (
            "data",
            {"clear": None, "paired": {"hazy": "a", "clear": "b"}, "synthesis": "worker"},
            "data.synthesis: worker, but data.paired has hazy images, so that no haze is made",
        ),
    ],
)
def test_what_does_not_go_together_is_told_with_its_key(section: str, values: dict, said: str) -> None:
    assert said in mistake(section, values)


def test_only_vgg19_needs_weights_of_features() -> None:
    for values in ({"perceptual": "laplacian"}, {"perceptual": "laplacian", "weights": "w"}, {"weights": "w"}):
        assert PretrainJob.model_validate(PRETRAIN | {"loss": values}).loss.model_dump().items() >= values.items()


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"clear": None, "paired": {"hazy": "a", "clear": "b"}}, "needs data.clear"),
        ({"mixup": 1.2}, "not used together with data.mixup"),
    ],
)
def test_only_haze_that_is_laid_here_has_a_true_transmission(data: dict, said: str) -> None:
    job = PRETRAIN | {"loss": {"transmission": 0.2}, "train": {"batch_per_worker": 2}}
    assert f"loss.transmission: {said}" in mistake("data", data, job)


@pytest.mark.parametrize(
    ("section", "values", "key"),
    [
        ("data", {"clear": "s3://AKIA:word@bucket/clear"}, "data.clear"),
        ("tracking", {"uri": "postgresql://me:word@db/mlflow"}, "tracking.uri"),
        ("network", {"init": "s3://bucket/a.pth?secret_key=word"}, "network.init"),
    ],
)
def test_credentials_in_a_job_are_refused_and_not_repeated(section: str, values: dict, key: str) -> None:
    said = mistake(section, values)
    assert said.startswith(f"{key}: ") and "holds credentials" in said and "word" not in said


def test_progressive_phases_rise_and_lie_within_the_run() -> None:
    phase = {"from_step": 20, "patch_px": 64, "batch_per_worker": 1}
    twice = {"steps": 100, "progressive": (phase, phase)}
    assert "from_step must rise" in mistake("train", twice, PRETRAIN)
    late = {"steps": 10, "progressive": (phase,)}
    assert mistake("train", late, PRETRAIN) == "train.progressive: from_step 20 is not before train.steps (10)"
    ok = PretrainJob.model_validate(PRETRAIN | {"train": {"steps": 100, "progressive": (phase,)}})
    assert ok.train.progressive[0].patch_px == 64


@pytest.mark.parametrize(
    ("train", "sets", "said"),
    [
        ({"best": "val/psnr"}, {}, "train.best: val/psnr is not measured (validation gives val/fade)"),
        ({"best": "psnr"}, {"clear": "c"}, "train.best: psnr is not measured (validation gives val/fade, val/psnr, "),
        ({"validation_metrics": ("psnr",)}, {}, "train.validation_metrics: psnr needs data.validation.clear, which is"),
        (
            {"validation_metrics": ("transmission_rank",)},
            {"clear": "c"},
            "train.validation_metrics: transmission_rank needs data.validation.transmission",
        ),
        (
            {"validation_metrics": ("brisqu",)},
            {},
            'train.validation_metrics.0: "brisqu" is neither of psnr, ssim, fade, transmission_rank nor a metric of '
            "pyiqa for images (did you mean brisque?)",
        ),
    ],
)
def test_a_validation_that_cannot_be_measured_so_is_refused(train: dict, sets: dict, said: str) -> None:
    job = PRETRAIN | {"data": {"clear": "clear", "validation": {"hazy": "hazy"} | sets}}
    assert mistake("train", train, job).startswith(said)


def test_metrics_without_a_validation_set_are_refused() -> None:
    said = "train.validation_metrics: fade, but there is no data.validation"
    assert mistake("train", {"validation_metrics": ("fade",)}, PRETRAIN) == said
    said = "train.best: val/fade is not measured (validation gives nothing: there is no data.validation)"
    assert mistake("train", {"best": "val/fade"}, PRETRAIN) == said


def test_validation_gives_the_metrics_of_the_job_or_what_each_set_has_the_truth_for() -> None:
    sets = {"validation": {"hazy": "h"}, "validation_sets": {"fog": {"hazy": "h", "clear": "c", "transmission": "t"}}}
    job = PretrainJob.model_validate(PRETRAIN | {"data": {"clear": "clear"} | sets})
    fog = [f"val/fog/{name}" for name in ("fade", "psnr", "ssim", "transmission_rank")]
    assert job.measured_metrics == ["val/fade", *fog]
    chosen = {"validation_metrics": ("nima", "brisque"), "best": "val/fog/nima"}
    job = PretrainJob.model_validate(PRETRAIN | {"data": {"clear": "clear"} | sets, "train": chosen})
    assert job.measured_metrics == ["val/nima", "val/brisque", "val/fog/nima", "val/fog/brisque"]


def test_other_networks_have_arguments_instead_of_stages() -> None:
    job = PretrainJob.model_validate(PRETRAIN | {"network": {"type": "mine.net:Net", "args": {"depth": 3}}})
    assert (job.network.stages, job.network.width, job.network.args) == (None, None, {"depth": 3})


def test_a_shipped_model_to_start_from_sets_the_size() -> None:
    job = PretrainJob.model_validate(PRETRAIN | {"network": {"init": "corun-small"}})
    assert (job.network.stages, job.network.width) == (2, 8)
    folder = PretrainJob.model_validate(PRETRAIN | {"network": {"init": "./corun-small"}})
    assert (folder.network.stages, folder.network.width) == (4, 30)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"stages": 4}, "network.stages: 4, but corun-small has 2"),
        ({"width": 30}, "network.width: 30, but corun-small has 8"),
    ],
)
def test_another_size_than_that_of_a_shipped_model_is_refused(given: dict, said: str) -> None:
    assert mistake("network", {"init": "corun-small"} | given) == said


@pytest.mark.parametrize(
    ("keys", "lines"),
    [
        (
            {"match": "^([^_]+"},
            ["match: ^([^_]+ is no regular expression (missing ), unterminated subpattern"],
        ),
        (
            {"match": "^.+_"},
            ["match: ^.+_ has no group (the text of its one group is what pairs two files"],
        ),
        (
            {"match": "^(a)(b)"},
            [
                "match: ^(a)(b) has 2 groups, none of them (?P<key>...) "
                "(the text of its one group is what pairs two files, as in ^([^_]+))"
            ],
        ),
        ({"match": "^(a|b)(?P<key>.)"}, []),
        ({"match": "^(a)", "match_clear": "^b"}, ["match_clear: ^b has no group"]),
        ({"match_clear": "^(b)"}, ["match_clear: not used without match"]),
        ({"match": "^(a)", "clear": "d/"}, ["match_clear: missing (hazy and clear are one folder"]),
        ({"match": "^(a)", "clear": None}, ["match: not used without clear"]),
        ({"crop_truth": True, "clear": None}, ["crop_truth: not used without clear"]),
        ({"match": "", "crop_truth": False, "clear": None}, []),
    ],
)
def test_patterns_that_cannot_pair_are_refused(keys, lines) -> None:
    truth = {"hazy": "d", "clear": "e"} | keys
    trees = {
        "evaluate.": EVALUATE | {"evaluate": truth},
        "data.validation.": PRETRAIN | {"data": {"clear": "c", "validation": truth}},
        "data.validation_sets.far.": PRETRAIN | {"data": {"clear": "c", "validation_sets": {"far": truth}}},
    }
    if truth["clear"] is not None:
        trees["data.paired."] = PRETRAIN | {"data": {"paired": truth}}
    for section, tree in trees.items():
        try:
            build_job(tree)
            found = []
        except JobFileError as error:
            found = error.lines
        assert len(found) == len(lines)
        assert all(one.startswith(section + line) for one, line in zip(found, lines, strict=True)), found
