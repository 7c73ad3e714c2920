"""Options that several commands take."""

from typing import Annotated

import typer

Resume = Annotated[
    bool | None,
    typer.Option(
        "--resume/--no-resume",
        help="Go on in a run folder also where keys differ, or refuse one that holds a run.",
        show_default="go on with the same run",
    ),
]
