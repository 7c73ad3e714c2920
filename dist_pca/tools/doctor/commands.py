"""`dist-pca doctor`: parsing and printing."""

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from dist_pca.console import plain_console, print_error
from dist_pca.errors import UserError
from dist_pca.resources import names

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dist_pca.tools.doctor.check import Check

app = typer.Typer(rich_markup_mode="rich")

_EXAMPLES = """
[bold]Examples[/]

dist-pca doctor

dist-pca doctor gta5_to_cityscapes data.source=data/gta5 --shared runs

accelerate launch --config_file launch/accelerate/cpu.yaml -m dist_pca.doctor demo --shared runs

accelerate launch --config_file launch/accelerate/multi_node_cpu.yaml --main_process_ip HOST -m dist_pca.doctor
"""
_COLOURS = {"pass": "green", "warn": "yellow", "fail": "red"}


@app.command("doctor", epilog=_EXAMPLES)
def doctor(
    config: Annotated[
        str | None,
        typer.Argument(help=f"A YAML file, or one that comes with dist-pca: {', '.join(names('configs'))}."),
    ] = None,
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, for example data.source=data/gta5")] = None,
    shared: Annotated[
        Path | None,
        typer.Option(help="Folder that all nodes should see.", show_default="the config's output"),
    ] = None,
    wait: Annotated[float, typer.Option(min=1, help="Seconds after which a rank that has not come is missing.")] = 60.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")] = False,
) -> None:
    """Look whether this machine, or all that a launcher started it on, is fit to train on.

    Each line passes, warns or fails, with the remedy; a fail makes the exit code 1. Under [bold]accelerate launch -m
    dist_pca.doctor[/] all ranks take part, and rank 0 prints: bandwidth, shared folder and clocks need several.
    """
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    checks, hosts, speaks = _diagnose(config, overrides or [], shared, wait)
    # All ranks have the same outcome; the exit code of one is enough for the launcher.
    if speaks:
        _print(checks, hosts, as_json)
        sys.stdout.flush()
        if any(check.verdict == "fail" for check in checks):
            raise typer.Exit(1)


def main() -> int:
    """The command as a process that a launcher started."""
    try:
        app(prog_name="dist_pca.doctor")
    except UserError as error:
        print_error(str(error))
        return UserError.EXIT_CODE
    return 0


def _diagnose(
    config: str | None, overrides: list[str], shared: Path | None, wait: float
) -> "tuple[list[Check], list[str], bool]":
    """The checks, the host of each rank that came, and whether this process is the one to print them."""
    from dist_pca.tools.doctor import ranks as meeting
    from dist_pca.tools.doctor.check import Check
    from dist_pca.tools.doctor.machine import machine_checks
    from dist_pca.train import resolve_config

    run = None if config is None else resolve_config(config, overrides)
    folder = shared or (None if run is None else Path(run.output))
    first = int(os.environ.get("RANK", "0")) == 0
    own = machine_checks(run, int(os.environ.get("WORLD_SIZE", "1")), folder or Path())
    try:
        ranks = meeting.join(wait)
    except meeting.SomeAreMissing as missing:
        return [*own, missing.check], missing.hosts, first or missing.by_all
    try:
        return meeting.common_checks(ranks, own, folder, wait), ranks.hosts, first
    except RuntimeError as error:
        lost = Check(
            "ranks",
            "fail",
            f"a rank was lost while all exchanged: {str(error).splitlines()[0]}",
            "look into the logs of all machines for the one that ended first",
        )
        return [*own, lost], ranks.hosts, first


def _print(checks: "Sequence[Check]", hosts: list[str], as_json: bool) -> None:
    if as_json:
        result = {
            "fit": all(check.verdict != "fail" for check in checks),
            "ranks": int(os.environ.get("WORLD_SIZE", "1")),
            "present": len(hosts),
            "hosts": hosts,
            "checks": [check._asdict() for check in checks],
        }
        typer.echo(json.dumps(result, indent=2))
        return
    table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    for _ in range(2):
        table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for check in checks:
        table.add_row(Text(check.verdict, _COLOURS[check.verdict]), check.name, check.found)
        if check.verdict != "pass" and check.remedy:
            table.add_row("", "", Text.assemble(("->", "bold"), f" {check.remedy}"))
    plain_console().print(table)
