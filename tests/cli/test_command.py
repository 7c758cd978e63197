"""What the parser makes of words: values, one-line mistakes, plain help. Nothing is run."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
from typer.main import get_command

from corun_ray.cli.app import app, main, parse
from corun_ray.core.errors import UserError


def test_options_of_several_values() -> None:
    values = parse(["bench", "scaling", "--gpus", "8", "64", "--no-check", "--link-gbit", "25", "--gpus", "9"]).params
    assert (values["gpus"], values["link_gbit"], values["no_check"]) == ([8, 64, 9], [25.0], True)
    assert values["processes"] == [2, 4], "the default"
    assert parse(["bench", "dehaze", "--sizes", "12mp", "64x48"]).params["sizes"] == [(3008, 4000), (48, 64)]
    assert parse(["bench", "pool", "--shards=1", "--shards", "2", "4"]).params["shards"] == [1, 2, 4]
    assert parse(["weights", "fetch", "here", "vgg19", "musiq"]).params["what"] == ["vgg19", "musiq"]


def test_options_that_are_repeated() -> None:
    values = parse(["evaluate", "photos", "--model", "a=x.pth", "--model=y.pth", "--baselines", ""]).params
    assert (values["models"], values["baselines"], values["metrics"]) == (["a=x.pth", "y.pth"], "", None)
    values = parse(["run", "--set", "a=1", "job.yaml", "--set", "b=--x"]).params
    assert (values["overrides"], values["job"]) == (["a=1", "b=--x"], Path("job.yaml"))
    assert parse(["run", "job.yaml"]).params["overrides"] == []


def test_values_of_other_kinds(monkeypatch: pytest.MonkeyPatch) -> None:
    assert parse(["serve", "x.pth", "--replicas", "1,4"]).params["replicas"] == (1, 4)
    assert parse(["serve", "x.pth", "--replicas", "2"]).params["replicas"] == 2
    assert parse(["serve", "--name", "a", "--", "-x.pth"]).params["model"] == "-x.pth"
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert parse(["pull", "a", "b"]).params["tracking"] == "sqlite:///runs/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow")
    assert parse(["pull", "a", "b"]).params["tracking"] == "http://mlflow"
    assert parse(["pull", "a", "b", "--tracking", "x"]).params["tracking"] == "x"


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("evalute x", "corun-ray: no command 'evalute'; did you mean evaluate?"),
        ("jobs lst", "corun-ray jobs: no command 'lst'; did you mean ls?"),
        ("qqqq", "corun-ray: no command 'qqqq'; --help lists them"),
        ("pool", "corun-ray pool: expected a command: ls, show, export, review, diff"),
        ("--resume run x", "corun-ray: no option --resume; --help lists them"),
        ("run x.yaml --resum", "corun-ray run: no option --resum; did you mean --resume?"),
        ("run x.yaml -r", "corun-ray run: no option -r; --help lists them"),
        ("run", "corun-ray run: missing argument JOB.yaml"),
        ("run x.yaml y.yaml", "corun-ray run: unexpected argument 'y.yaml'"),
        ("run x.yaml --set", "corun-ray run: --set: expected key.path=value"),
        ("run x.yaml --set --resume", "corun-ray run: --set: expected key.path=value"),
        ("submit x.yaml --resume=1", "corun-ray submit: option '--resume' does not take a value"),
        ("dehaze a b", "corun-ray dehaze: missing option --model SOURCE"),
        ("bench stream --depth-kind x", "corun-ray bench stream: --depth-kind: expected inverse or metres, got x"),
        ("dehaze a --model x b --format g", "corun-ray dehaze: --format: expected keep, png, jpg, tif or webp, got g"),
        ("dehaze a b --model x --memory-mib 1.5", "corun-ray dehaze: --memory-mib: expected a whole number, got 1.5"),
        ("serve x --replicas few", "corun-ray serve: --replicas: expected a whole number, got few"),
        ("serve x --timeout-s soon", "corun-ray serve: --timeout-s: expected a number, got soon"),
        ("bench step --stages 1", "corun-ray bench step: --stages: 1 is too few (at least 2)"),
        ("bench step --size 100", "corun-ray bench step: --size: expected a multiple of 32, got 100"),
        ("bench pool --shards 1 none", "corun-ray bench pool: --shards: expected a whole number, got none"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line(words: str, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(words.split())
    assert end.value.code == 2
    assert capsys.readouterr() == ("", f"{line}\n")


def list_commands() -> Iterator[list[str]]:
    """Yield the words of every command and group."""
    waiting = [([], get_command(app))]
    while waiting:
        words, command = waiting.pop()
        yield words
        waiting += [([*words, name], one) for name, one in getattr(command, "commands", {}).items()]


@pytest.mark.parametrize("words", list(list_commands()), ids=" ".join)
def test_help_is_plain_and_80_columns_wide(
    words: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(typer.Exit) as end:
        parse([*words, "--help"])
    assert end.value.exit_code == 0

    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(" ".join(["usage: corun-ray", *words]))
    assert [line for line in lines if len(line) > 80] == []
    assert not any(character in "".join(lines) for character in "─│╭\x1b\b")
    # Every parameter is there.
    command = get_command(app)
    for word in words:
        command = command.commands[word]
    for parameter in command.params:
        assert any((parameter.metavar or parameter.opts[0]) in line for line in lines), parameter.name


def test_a_command_is_parsed_without_heavy_imports() -> None:
    heavy = "torch", "ray", "numpy", "pydantic", "rich"
    program = (
        "import sys\nfrom corun_ray.cli.app import parse\nparse(['dehaze', 'a', 'b', '--model', 'c'])\n"
        f"print([name for name in {heavy} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_what_is_wrong_is_an_error_of_the_user() -> None:
    with pytest.raises(UserError, match="no command"):
        parse(["none"])
