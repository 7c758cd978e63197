"""Tune jobs: what may be searched, what the trials' jobs are, and what is said of searches that cannot work."""

from pathlib import Path

import pytest

from corun_ray.config.jobs import Job, TuneJob
from corun_ray.config.loading import dump_job, load_jobs
from corun_ray.config.tasks import RangeSection
from corun_ray.config.trials import build_pretraining_job, build_trial_job, choose_example_job, list_corners
from tests.jobtexts import COLABATOR, TUNE, load, mistakes

TUNING = TUNE.partition("tune: ")[0]


def search(text: str, more: str = "") -> str:
    return f"{TUNING}tune: {{search: {text}{more}}}\n"


def tune_job(folder: Path, text: str, *settings: str) -> TuneJob:
    (job,) = load(folder, text, *settings)
    assert isinstance(job, TuneJob)
    return job


def test_lists_ranges_and_log_ranges(tmp_path: Path) -> None:
    text = search("{network.stages: [2, 3], optim.lr: {low: 1e-5, high: 1e-3, log: true}, seed: {low: 1, high: 9}}")
    job = tune_job(tmp_path, text)
    assert job.tune.search["network.stages"] == (2, 3)
    rate, seed = job.tune.search["optim.lr"], job.tune.search["seed"]
    assert isinstance(rate, RangeSection) and rate.log and not rate.is_whole
    assert isinstance(seed, RangeSection) and seed.is_whole and not seed.log
    assert job.tune.num_trials == 2


def test_sections_may_be_written_as_sections_and_set(tmp_path: Path) -> None:
    text = search("{network: {stages: [2, 3], width: [8, 16]}, optim.lr: {low: 1e-5, high: 1e-4}}", ", samples: 5")
    job = tune_job(tmp_path, text, "tune.search.network.width=[4]")
    assert list(job.tune.search) == ["network.stages", "network.width", "optim.lr"]
    assert job.tune.search["network.width"] == (4,) and job.tune.num_trials == 10


def test_the_dump_reads_back(tmp_path: Path) -> None:
    job = tune_job(tmp_path, search("{network.stages: [2, 3], optim.lr: {low: 1e-5, high: 1e-3, log: true}}"))
    path = tmp_path / "dump.yaml"
    path.write_text(dump_job(job))
    assert load_jobs(path) == [job]


def test_a_trial_is_a_colabator_job_with_the_values_in_place(tmp_path: Path) -> None:
    job = tune_job(tmp_path, search("{network.stages: [2, 3], data.patch_px: [64, 96]}"))
    assert [tuple(values.values()) for values in list_corners(job)] == [(2, 64), (2, 96), (3, 64), (3, 96)]
    (plain,) = load(tmp_path, COLABATOR)
    trial = build_trial_job(job, {"network.stages": 3, "data.patch_px": 96})
    assert (trial.kind, trial.network.stages, trial.data.patch_px) == ("colabator", 3, 96)
    assert trial.loss == plain.loss and trial.optim == plain.optim  # type: ignore[attr-defined]
    assert choose_example_job(job) == build_trial_job(job, {"network.stages": 2, "data.patch_px": 64})
    assert choose_example_job(plain) is plain


def test_the_pretraining_of_a_trial_has_its_network_and_data(tmp_path: Path) -> None:
    job = tune_job(tmp_path, search("{network.stages: [2, 3]}"))
    before = build_pretraining_job(build_trial_job(job, {"network.stages": 3}), 70)
    assert (before.kind, before.network.stages, before.train.steps, before.optim.schedule_steps) == (
        "pretrain",
        3,
        70,
        70,
    )
    assert before.data.clear == job.data.clear and before.name == "t-pretrained"


def test_the_pretraining_learns_from_the_true_transmission_as_its_trial_does(tmp_path: Path) -> None:
    job = tune_job(tmp_path, search("{network.stages: [2, 3]}"), "loss.transmission=0.2", "optim.clip_norm=0.3")
    before = build_pretraining_job(build_trial_job(job, {"network.stages": 3}), 70)
    assert (before.loss.transmission, before.optim.clip_norm) == (0.2, 0.3)
    assert before.loss.pixel_weight == 1.0, "the published weight of pre-training, not of Colabator"


def test_trials_that_run_at_once_need_room_at_once(tmp_path: Path) -> None:
    job: Job = tune_job(tmp_path, search("{network.stages: [2, 3]}", ", trials_at_once: 3"), "cluster.workers=2")
    assert job.whole_cluster.workers == (6, 6) and job.whole_cluster.data_cpus == 3 * job.cluster.data_cpus


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("{}", "tune.search: empty (a mapping such as network.stages: [2, 3, 4])"),
        ("{network.stages: []}", "tune.search: network.stages has nothing to choose from"),
        ("{network.stage: [2]}", "tune.search.network.stage: unknown key (did you mean network.stages?)"),
        ("{train.progressive: [2]}", "tune.search.train.progressive: not used by a colabator job"),
        ("{network: [2]}", "tune.search.network: a section, not a value"),
        ("{name: [a, b]}", "tune.search.name: not to be searched: it belongs to the search itself"),
        ("{network.stages: [2, 0]}", "tune.search.network.stages: 0 is too few (at least 2)"),
        ("{optim.lr: [fast]}", 'tune.search.optim.lr: "fast" is not a number'),
        ("{data.patch_px: [64, 80]}", "tune.search.data.patch_px: 80 is not a multiple of coherence.block_px (32)"),
    ],
)
def test_mistakes_of_a_search_are_told_before_it_starts(tmp_path: Path, text: str, line: str) -> None:
    assert mistakes(tmp_path, search(text)) == [line]


@pytest.mark.parametrize(
    ("setting", "gives"),
    [
        ("data.validation=null", "nothing: there is no data.validation"),
        ("data.validation_sets.fog={hazy: f, clear: c}", "val/fade, val/fog/fade, val/fog/psnr, val/fog/ssim"),
    ],
)
def test_a_metric_that_no_validation_has_is_told(tmp_path: Path, setting: str, gives: str) -> None:
    line = f"tune.metric: val/psnr is not measured (validation gives {gives})"
    assert mistakes(tmp_path, search("{network.stages: [2]}", ", metric: val/psnr"), setting) == [line]


@pytest.mark.parametrize(
    ("tune", "mode"), [("", "min"), (", metric: val/psnr", "max"), (", metric: val/psnr, mode: min", "min")]
)
def test_the_direction_of_a_search_is_its_metrics(tmp_path: Path, tune: str, mode: str) -> None:
    job = tune_job(tmp_path, search("{network.stages: [2]}", tune), "data.validation={hazy: h, clear: c}")
    assert job.tune.mode == mode


def test_a_range_must_be_one(tmp_path: Path) -> None:
    for text, part in [("{low: 2, high: 1}", "low 2 is not less than high 1"), ("{low: 1}", "missing")]:
        (line,) = mistakes(tmp_path, search(f"{{optim.lr: {text}}}"))
        assert line.startswith("tune.search.optim.lr") and part in line
