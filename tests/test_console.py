"""Names are printed as they are, whatever rich would read in them."""

import re
from pathlib import Path

import pytest
from rich.table import Table

import dist_pca
from dist_pca.console import plain_console

NAMES = ["marking [/dashed]", "data/val[a]", "[red]", "[link=x]y[/link]", "\\[bold]", ":car:", "[", "{0}"]
PACKAGE = Path(dist_pca.__file__).parent


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("stderr", [True, False])
def test_messages_titles_headings_and_cells_hold_names_as_they_are(
    name: str, stderr: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    table = Table(name, title=name)
    table.add_row(name)
    plain_console(stderr=stderr).print(f"message {name}", table, style="red")
    printed = capsys.readouterr()
    assert (printed.err if stderr else printed.out).count(name) == 4


def test_every_console_of_the_package_is_made_in_one_place() -> None:
    made = {
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*.py")
        if re.search(r"(?<!def plain_console)(?<!\w)(?:Console\(|rich\.print|rich import print)", path.read_text())
    }
    assert made == {"console.py"}
