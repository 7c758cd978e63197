"""The tables of the docs are what their commands print."""

from types import ModuleType

import pytest

from tests import ROOT
from tests.conftest import load_evidence

PAGE = """\
Text.

    python docs/evidence/one.py --size 2      # a minute
    corun-ray bench stream

<!-- figures: one -->
| old |
| --- |
<!-- end of figures -->

<!-- figures: two -->
<!-- end of figures -->
The end.
"""


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_evidence("figures")


def test_a_table_belongs_to_the_command_above_it(script):
    command = "python docs/evidence/one.py --size 2"
    assert script.find_figures(PAGE) == [script.Figures("one", command), script.Figures("two", command)]
    with pytest.raises(SystemExit, match="expected a command"):
        script.find_figures(PAGE.replace("python", "perl"))


def test_variables_before_a_command_are_the_command_s(script, monkeypatch):
    command = "ATEN_CPU_CAPABILITY=avx2 ONE=1 python docs/evidence/one.py --size 2"
    found = script.find_figures(PAGE.replace("python docs", "ATEN_CPU_CAPABILITY=avx2 ONE=1 python docs"))
    assert found[0].command == command
    assert script.split_variables(command)[0] == {"ATEN_CPU_CAPABILITY": "avx2", "ONE": "1"}
    assert "with the kernels of an AVX2 processor" in script.describe_machine(command)
    assert "kernels" not in script.describe_machine("python docs/evidence/one.py")

    # A script that prints what it was given.
    printing = ["-c", "import os, sys; print('|', os.environ['ONE'], sys.argv[1], '|')", "2"]
    monkeypatch.setattr(script.shlex, "split", lambda text: ["ONE=1", "python", *printing])
    assert script.run("any") == "| 1 2 |"


def test_a_table_is_replaced_and_the_rest_of_the_page_stays(script):
    page = script.replace_table(PAGE, "one", "| new |\n| --- |")
    assert page == PAGE.replace("old", "new")
    assert script.replace_table(page, "two", "| 2 |").endswith("two -->\n| 2 |\n<!-- end of figures -->\nThe end.\n")


def test_the_last_table_of_an_output_counts(script):
    assert script.take_last_table(["| a |", "", "| b |", "| c |", "", "machine"], "x") == "| b |\n| c |"
    with pytest.raises(SystemExit, match="x: expected a Markdown table"):
        script.take_last_table(["machine"], "x")


def test_every_marked_table_of_the_docs_has_its_command(script):
    names = []
    for page in sorted((ROOT / "docs").glob("*.md")):
        for figures in script.find_figures(page.read_text()):
            _, words = script.split_variables(figures.command)
            assert (ROOT / words[1]).exists(), figures
            names.append(figures.name)
    assert len(set(names)) == len(names) >= 5
