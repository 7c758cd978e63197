"""What Ray's Prometheus endpoint served over HTTP while a Colabator job ran, and the log lines that the job left."""

import shutil

import pytest

from corun_ray.config.tasks import DehazeSection
from corun_ray.service.inference.dehaze import dehaze
from corun_ray.service.models.sources import fetch_model
from corun_ray.service.models.tracking import get_tracking_uri
from corun_ray.service.runs.record import list_checkpoint_steps
from corun_ray.service.storage import locate
from corun_ray.service.telemetry.prometheus import DECLARED
from tests.cluster.promql import queries, uses
from tests.cluster.test_dashboard import OURS, RAY_GPU
from tests.service.scraping import Scraper, log_lines


@pytest.fixture(scope="module")
def scraper(watched_colabator, dataset, tmp_path_factory) -> Scraper:
    """What was seen of the training, and of a dehazing job by its model."""
    job, uri, scraper, _ = watched_colabator
    photos = tmp_path_factory.mktemp("photos")
    shutil.copy(dataset / "hazy" / "photo_0.png", photos)
    (photos / "broken.png").write_text("no picture")
    section = DehazeSection(input=str(photos), output=str(photos / "out"), model=uri)
    with Scraper() as dehazing:
        assert dehaze(section, fetch_model(uri, get_tracking_uri(job)), job_name="dehazing").written == 1
    scraper.samples |= {name: samples for name, samples in dehazing.samples.items() if "dehazed" in name}
    return scraper


def test_every_metric_of_dashboard_and_alerts_was_served_with_its_labels(scraper):
    """All but those that only a GPU has: `Metric.needs_gpu`, and Ray's own in `RAY_GPU`."""
    without_gpu = RAY_GPU | {name for name, metric in OURS.items() if metric.needs_gpu}
    asked = {use for _, expression in queries() for use in uses(expression)}
    assert len({use.metric for use in asked}) > 40
    for use in asked:
        if use.metric in without_gpu:
            continue
        samples = scraper.samples.get(use.metric) or scraper.samples.get(f"{use.metric}_bucket")
        assert samples, f"{use.metric} was not served"
        for labels in samples:
            assert use.labels <= dict(labels).keys(), f"{use} has the labels {labels}"


def test_legends_of_ray_s_own_metrics_name_labels_that_they_have(scraper):
    for name in ("ray_node_cpu_utilization", "ray_node_network_send_speed", "ray_node_disk_utilization_percentage"):
        assert all("ip" in dict(labels) for labels in scraper.samples[name])
    locations = {dict(labels)["Location"] for labels in scraper.samples["ray_object_store_memory"]}
    assert locations >= {"MMAP_SHM", "SPILLED"}
    states = {dict(labels)["State"] for labels in scraper.samples["ray_spill_manager_objects_bytes"]}
    assert states >= {"Spilled", "Restored"}


def test_what_was_served_is_what_happened(scraper, watched_colabator):
    name = watched_colabator.job.name

    def values(metric, /, **labels):
        found = scraper.of_job(f"ray_{metric}", name)
        return [value for mine, value in found if labels.items() <= mine.items()]

    assert values("corun_steps_total", rank="0") == values("corun_steps_total", rank="1") == [6]
    assert sum(values("corun_images_total")) == 12
    assert sum(values("corun_samples_total")) >= 12
    assert values("corun_step_seconds_count", rank="0") == [6]
    assert values("corun_pool_labels") == values("corun_step") == values("corun_steps_planned") == [6]
    assert values("corun_workers") == [2] and values("corun_restarts") == values("corun_bad_images") == [0]
    assert values("corun_pool_restores_total") == [1]
    (offers,), (wins,) = values("corun_pool_offers_total"), values("corun_pool_wins_total")
    assert offers >= wins >= 6
    reads = [sum(values("corun_label_reads_total", rank=rank)) for rank in "01"]
    assert reads == [6 + 2, 6], "rank 0 also pictures two labels at each of two validations, in one read"
    for metric in ("corun_scoring_seconds_total", "corun_data_wait_seconds_total", "corun_pause_seconds_total"):
        assert 0 < sum(values(metric)) < 60, metric
    assert 0 < values("corun_validation", set="val", metric="ssim")[0] <= 1
    dehazed = scraper.of_job("ray_corun_dehazed_images_total", "dehazing")
    assert {labels["outcome"]: value for labels, value in dehazed} == {"written": 1, "left_out": 1}
    assert [value for _, value in scraper.of_job("ray_corun_dehazed_pixels_total", "dehazing")] == [60 * 80]


def test_labels_are_few(scraper, watched_colabator):
    """No metric of a job names an image, a path or a step."""
    jobs = {watched_colabator.job.name, "dehazing"}
    for name, metric in DECLARED.items():
        for samples in (scraper.samples.get(f"ray_{name}", {}), scraper.samples.get(f"ray_{name}_bucket", {})):
            mine = {
                tuple(dict(labels).get(label) for label in metric.labels)
                for labels in samples
                if jobs & set(dict(labels).values())
            }
            assert len(mine) <= 20
            assert not any("/" in value for values in mine for value in values if value and not value.startswith("val"))


def test_a_run_s_log_lines_say_what_happened_to_whom_and_when(watched_colabator):
    job = watched_colabator.job
    lines = log_lines(job=job.name, kind="colabator")
    assert all({"run", "component", "job_id", "node_id", "asctime", "levelname"} <= line.keys() for line in lines)
    ranks = {rank: [(line["message"], line["step"]) for line in lines if line.get("rank") == rank] for rank in (0, 1)}
    assert ranks[1] == [("worker started", 0), ("worker finished", 6)]
    saved = [("checkpoint saved", step) for step in (3, 6)]
    assert set(ranks[0]) == {*ranks[1], *saved} and len(ranks[0]) == 4
    run = locate(job.storage).child(lines[0]["run"])
    assert max(list_checkpoint_steps(run)) == 6
    driver = [(line["message"], line.get("step")) for line in lines if line["component"] == "driver"]
    told = [("training started", None), ("workers started", 0), ("validated", 3), ("validated", 6)]
    assert driver == [*told, ("training ended", None)]
    (validated, _) = (line for line in lines if line["message"] == "validated")
    assert 0 < validated["val/ssim"] <= 1
    (restored,) = (line for line in lines if line["component"] == "shard")
    assert (restored["message"], restored["shard"], restored["labels"]) == ("label pool restored", 0, 0)
