"""The YAML of job files: scalars, the environment, and what is no job at all."""

from pathlib import Path

import pytest

from tests.jobtexts import PRETRAIN, load_training, mistakes


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("", "1: empty, not a mapping of keys (kind, name, ...)"),
        ("# nothing\n---\n", "1: empty, not a mapping of keys (kind, name, ...)"),
        ("# list\n- a\n- b\n", "2: a list, not a mapping of keys (kind, name, ...)"),
        ("some words", "1: a single value, not a mapping of keys (kind, name, ...)"),
        ("kind: pretrain\nname: a: b\n", "2: not valid YAML (mapping values are not allowed here)"),
        ("a: 1\n\tb: 2\n", "2: not valid YAML (found character '\\t' that cannot start any token)"),
        ("a: 1\nb: !shell x\n", "2: not valid YAML (unknown tag !shell)"),
        ("a: 1\nb: !!int x\n", "2: not valid YAML (not a valid int)"),
        ("a: 1\n? [b]\n: 2\n", "2: not valid YAML (a key must be a word)"),
        ("a: 1\nb: \x01\n", "2: not valid YAML (special characters are not allowed)"),
    ],
)  # fmt: skip
def test_no_job_at_all_is_one_line_with_its_place(tmp_path: Path, text: str, line: str) -> None:
    assert mistakes(tmp_path, text) == [f"{tmp_path / 'job.yaml'}:{line}"]


def test_a_list_that_holds_itself_is_refused(tmp_path: Path) -> None:
    assert mistakes(tmp_path, "a: &a [*a]") == [f"{tmp_path / 'job.yaml'}: nested too deeply"]


def test_scalars_are_those_of_yaml_1_2(tmp_path: Path) -> None:
    job = load_training(
        tmp_path,
        "kind: pretrain\nname: 2024-01-01\ndata: {clear: no, depth: 1:30}\n"
        "optim: {lr: 5e-5}\ntrain: {steps: 3e3}\nseed: 1_000\ntracking:\n",
    )
    assert (job.name, job.data.clear, job.data.depth) == ("2024-01-01", "no", "1:30")
    assert (job.optim.lr, job.train.steps, job.seed) == (5e-5, 3000, 1000)


def test_environment_fills_in_values_with_their_type(tmp_path: Path) -> None:
    text = """
kind: pretrain                     # a comment may say ${ANYTHING}
name: run-${RUN}-${RUN}
storage: ${STORAGE:-runs}
data: {clear: "${ROOT}/clear", depth: ${DEPTH:-}, validation: ${NONE:-null}}
train: {steps: ${STEPS:-20}, log_every: "${LOG:-5}"}
optim: {lr: ${LR}, compile: ${COMPILE:-true}}
tracking: {uri: ${URI:-}, experiment: ${EXPERIMENT:-a, b: [c}}
"""
    env = {"RUN": "7", "ROOT": "s3://b", "LR": "3e-4", "STORAGE": ""}
    job = load_training(tmp_path, text, env=env)
    assert (job.name, job.storage, job.data.clear) == ("run-7-7", "runs", "s3://b/clear")
    assert (job.data.depth, job.data.validation) == (None, None)
    assert (job.train.steps, job.train.log_every, job.optim.lr, job.optim.compile) == (20, 5, 3e-4, True)
    assert (job.tracking.uri, job.tracking.experiment) == ("", "a, b: [c")
    assert load_training(tmp_path, text, env=env | {"STEPS": "30"}).train.steps == 30
    assert mistakes(tmp_path, text, env=env | {"STEPS": "[1, 2]", "LR": "fast"}) == [
        'optim.lr: "fast" is not a number',
        'train.steps: "[1, 2]" is not a whole number',
    ]


def test_environment_cannot_add_keys(tmp_path: Path) -> None:
    env = {"CLEAR": "a\nseed: 5", "NESTED": "${OTHER}"}
    job = load_training(tmp_path, PRETRAIN.replace("{clear: clear}", "{clear: ${CLEAR}, depth: ${NESTED}}"), env=env)
    assert (job.seed, job.data.clear, job.data.depth) == (0, "a\nseed: 5", "${OTHER}")


def test_missing_variables_name_key_and_variable(tmp_path: Path) -> None:
    text = PRETRAIN.replace("clear: clear", "clear: '${ROOT}/x'")
    text += "train: {steps: ${STEPS}}\nhaze: {beta: [0.1, ${B}]}\n"
    assert mistakes(tmp_path, text + "seed: ${1A}") == [
        "seed: ${1A} is neither ${VAR} nor ${VAR:-default}",
        "data.clear: environment variable ROOT is not set",
        "haze.beta: environment variable B is not set",
        "train.steps: environment variable STEPS is not set",
    ]
    overrides = "data.clear=a", "train.steps=3", "haze.beta=[1, 2]"
    assert load_training(tmp_path, text, *overrides).train.steps == 3
