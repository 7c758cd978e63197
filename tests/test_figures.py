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
            assert (ROOT / figures.command.split()[1]).exists(), figures
            names.append(figures.name)
    assert len(set(names)) == len(names) >= 5
