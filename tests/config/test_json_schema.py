"""The JSON schema of job files against the files and mistakes of this project."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft7Validator

from corun_ray.config.jobs import KINDS
from corun_ray.config.json_schema import build_schema, format_schema
from corun_ray.config.loading import dump_job
from corun_ray.config.yaml_reader import Loader
from tests import ROOT
from tests.jobtexts import COLABATOR, DEHAZE, DEPTH, EVALUATE, PRETRAIN, TUNE, load

JOBS = sorted((ROOT / "jobs").glob("*.yaml"))
MODELINE = "# yaml-language-server: $schema=schema.json"


def wrong(text: str) -> list[str]:
    """Where the schema finds something wrong."""
    validator = Draft7Validator(build_schema())
    documents = json.loads(json.dumps(list(yaml.load_all(text, Loader))))
    return [error.json_path for document in documents for error in validator.iter_errors(document)]


def test_it_is_a_schema_of_every_kind() -> None:
    schema = build_schema()
    Draft7Validator.check_schema(schema)
    assert schema["properties"]["kind"]["enum"] == [*KINDS]


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.stem)
def test_job_files_follow_it_and_name_it_in_every_document(path: Path) -> None:
    text = path.read_text()
    assert wrong(text) == []
    headers = text.split("\n---\n")
    assert all(MODELINE in document.splitlines()[: 1 + (number == 0)] for number, document in enumerate(headers))


def test_the_file_beside_the_jobs_is_what_the_command_prints() -> None:
    assert (JOBS[0].parent / "schema.json").read_text() == format_schema(), "write it again: corun-ray schema"


@pytest.mark.parametrize("text", [PRETRAIN, COLABATOR, TUNE, EVALUATE, DEHAZE, DEPTH])
def test_a_resolved_job_follows_it(tmp_path: Path, text: str) -> None:
    assert wrong(text) == []
    (job,) = load(tmp_path, text)
    assert wrong(dump_job(job)) == []


@pytest.mark.parametrize(
    ("lines", "path"),
    [
        ("optim: {learning_rate: 1.0e-4}", "$.optim"),
        ("data: {clear: c, hazy: h, patch_px: 300}", "$.data.patch_px"),
        ("network: {stages: many}", "$.network.stages"),
        ("train: {steps: 0}", "$.train.steps"),
        ("cluster: {workers: [4]}", "$.cluster.workers"),
        ("cluster: {workers: 0}", "$.cluster.workers"),
        ("coherence: {clarity: dense}", "$.coherence.clarity"),
        ("tune: {search: {}}", "$"),
        ("data: {clear: c}", "$.data"),
    ],
)
def test_mistakes_are_found_where_they_are(lines: str, path: str) -> None:
    sections: dict[str, Any] = yaml.load(COLABATOR, Loader) | yaml.load(lines, Loader)
    assert any(found == path or found.startswith(f"{path}.") for found in wrong(yaml.safe_dump(sections)))


def test_variables_stand_for_any_value() -> None:
    assert wrong(f"{COLABATOR}train: {{steps: '${{STEPS:-5000}}'}}\ncluster: {{workers: '${{N}}'}}\n") == []
    assert wrong(f"{COLABATOR}train: {{steps: '$STEPS'}}\n") != []


def test_a_search_takes_lists_ranges_and_sections() -> None:
    head = TUNE[: TUNE.index("tune:")]
    for search in (
        "network.stages: [2, 3]",
        "optim.lr: {low: 1.0e-5, high: 1.0e-4, log: true}",
        "network: {width: [8]}",
    ):
        assert wrong(f"{head}tune: {{search: {{{search}}}}}\n") == [], search
