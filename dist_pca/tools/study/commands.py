"""`dist-pca study`: parsing and printing."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from dist_pca.console import plain_console
from dist_pca.errors import UserError
from dist_pca.options import (
    Account,
    BatchScript,
    CpusPerNode,
    FurtherDirectives,
    Launcher,
    Partition,
    Processes,
    QualityOfService,
)
from dist_pca.resources import names, resource
from dist_pca.tools.study.select_command import app as select_app

if TYPE_CHECKING:
    from collections.abc import Mapping

    from dist_pca.shards.manifest import Manifest
    from dist_pca.tools.study.design import Study

app = typer.Typer(rich_markup_mode="rich")
app.add_typer(select_app)

_STUDY_EXAMPLES = """
[bold]Examples[/]

dist-pca study camvid --test data/camvid/test --grid objective.association.weight=0,0.01 --seeds 0,1,2

dist-pca study camvid --test data/camvid/test --variant 'source: objective.adapt=false' --variant 'adapted:'

dist-pca study my_run.yaml --test data/mine/test --test data/mine/dusk --grid optimizer.lr=3e-4,1e-3 --set seed=1

dist-pca study my_study.yaml --dry-run

dist-pca study studies/camvid/study.yaml --collect --json

dist-pca study my_study.yaml --slurm --nodes 1 --gpus-per-node 8 --time 12:00:00 --at-once 4

[bold]my_study.yaml[/], a study that is kept beside its config

config: camvid.yaml

test: data/camvid/test

seeds: [0, 1, 2]

variants: {source: {objective.adapt: false}, adapted: }

grid: {optimizer.lr: [3e-4, 6e-4]}

set: {training.steps: 400}

baseline: source,lr=3e-4
"""


@app.command("study", epilog=_STUDY_EXAMPLES)
def study(
    config: Annotated[
        str,
        typer.Argument(
            help="A config: a YAML file, or one that comes with dist-pca ("
            f"{', '.join(names('configs'))}). Or a study's YAML file, with the keys config, test, seeds, variants, "
            "grid, set, baseline and out.",
            show_default=False,
        ),
    ],
    test: Annotated[
        list[str] | None,
        typer.Option(metavar="SHARDS", help="Labelled shards to score on. Repeatable: one table for each."),
    ] = None,
    grid: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=A,B",
            help="Values of a key, as YAML: lists in brackets are one value. Repeatable: every combination is made.",
        ),
    ] = None,
    variant: Annotated[
        list[str] | None,
        typer.Option(
            metavar="'NAME: KEY=VALUE ...'", help="A setting with a name. Repeatable; crossed with the grid, if any."
        ),
    ] = None,
    seeds: Annotated[str | None, typer.Option(help="Seeds of every variant.", show_default="0,1,2")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="A key of all runs. Repeatable.")
    ] = None,
    baseline: Annotated[
        str | None, typer.Option(help="Variant that the others are compared with.", show_default="the first")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the study.", show_default="studies/ and the config's name")
    ] = None,
    launcher: Launcher = None,
    processes: Processes = None,
    keep_going: Annotated[
        bool, typer.Option("--keep-going/--stop", help="Whether runs after one that failed are made.")
    ] = True,
    collect: Annotated[
        bool, typer.Option("--collect", help="Train nothing: score what is trained, and make the table.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the runs and their commands, or SLURM's scripts; start nothing.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
    slurm: Annotated[
        bool,
        typer.Option("--slurm", help="Submit an array, one task for each run, and a job after it that scores them."),
    ] = False,
    nodes: Annotated[int, typer.Option(min=1, help="With --slurm: machines of each run.")] = 1,
    gpus_per_node: Annotated[
        int | None, typer.Option(min=0, help="With --slurm: GPUs of each machine; 0 trains on CPUs.")
    ] = None,
    time: Annotated[
        str | None, typer.Option(help="With --slurm: time limit of a job, in minutes, [D-]HH:MM:SS or D-HH.")
    ] = None,
    at_once: Annotated[int | None, typer.Option(min=1, help="With --slurm: most runs at the same time.")] = None,
    partition: Partition = None,
    account: Account = None,
    qos: QualityOfService = None,
    cpus_per_node: CpusPerNode = None,
    further: FurtherDirectives = None,
    script: BatchScript = None,
) -> None:
    """Train and score a grid of runs, and compare its variants with a baseline, seed by seed.

    Runs are ordinary run folders in OUT/runs. Finished training and evaluation is not repeated, and a run that was
    stopped is resumed, so the same command finishes an interrupted study. OUT gets study.csv, summary.csv, summary.md,
    study.png, and study.yaml, which this command takes in place of the config. Runs of other settings are refused.

    Ctrl-C saves the run at work, and shows the table of what is there.

    Exit codes: 0 all runs are trained and evaluated, 1 a run failed or, with --collect, is not done, 2 an error that
    you can fix, 75 checkpoint saved and the study must be restarted, 130 checkpoint saved after Ctrl-C.
    """
    from dist_pca.resilience.launch import process_count, quote_command
    from dist_pca.tools.cluster.submit import train_directives
    from dist_pca.tools.study.array import submit_study
    from dist_pca.tools.study.design import save_study
    from dist_pca.tools.study.training import (
        check_study,
        command_of,
        open_tests,
        refuse_changed_settings,
        score_study,
        train_study,
    )

    console = plain_console(stderr=True, soft_wrap=True)

    def say(message: str) -> None:
        console.print(message, style="dim", markup=False)

    wanted = _design(config, test, grid, variant, seeds, settings, baseline, out)
    commands = [command_of(wanted, run, launcher=launcher, processes=processes) for run in wanted.runs]
    world_size = process_count(commands[0])
    if slurm:
        if gpus_per_node is None or time is None:
            raise UserError("--slurm: needs --gpus-per-node and --time; see dist-pca submit --help")
        directives = train_directives(
            name=wanted.out.name,
            folder=wanted.out,
            nodes=nodes,
            gpus_per_node=gpus_per_node,
            cpus_per_node=cpus_per_node or 8 * max(1, gpus_per_node),
            time=time,
            partition=partition,
            account=account,
            qos=qos,
            further=further or (),
        )
        open_tests(wanted)
        submit_study(
            wanted,
            wanted.out / "study.yaml" if dry_run else save_study(wanted),
            (script or resource("launch", "slurm/train", ".sbatch")).read_text(),
            directives,
            own_script=script is not None,
            world_size=nodes * max(1, gpus_per_node),
            gpus=gpus_per_node > 0,
            at_once=at_once,
            dry_run=dry_run,
            say=typer.echo,
        )
        return
    if dry_run:
        refuse_changed_settings(wanted)
        for run, command in zip(wanted.runs, commands, strict=True):
            typer.echo(f"{run.folder}\n  {quote_command(command)}")
        return
    manifests = open_tests(wanted)
    if collect:
        refuse_changed_settings(wanted)
    else:
        check_study(wanted, manifests, world_size=world_size)
    save_study(wanted)
    try:
        code = (
            score_study(wanted, manifests, say=say)
            if collect
            else train_study(wanted, manifests, launcher=launcher, processes=processes, keep_going=keep_going, say=say)
        )
    except KeyboardInterrupt:
        code = 130
    _show(wanted, manifests, console, as_json=as_json)
    sys.exit(code)


def _design(
    config: str,
    test: list[str] | None,
    grid: list[str] | None,
    variant: list[str] | None,
    seeds: str | None,
    settings: list[str] | None,
    baseline: str | None,
    out: Path | None,
) -> "Study":
    """The study of a config or a study's file, and of options, which win over the file's keys or add to them."""
    from dist_pca.tools.study.design import (
        SEEDS,
        StudyFile,
        Variant,
        build_study,
        is_study_file,
        parse_grid,
        parse_seeds,
        parse_variant,
        read_study_file,
        value_text,
    )

    path = Path(config)
    file = read_study_file(path) if is_study_file(path) else StudyFile(config=config, seeds=SEEDS)
    axes = {key: [value_text(value) for value in values] for key, values in file.grid.items()} | parse_grid(grid or ())
    if "seed" in axes:
        if seeds is not None:
            raise UserError("--grid seed: is given by --seeds too; leave one of them out")
        seeds = ",".join(axes.pop("seed"))
    return build_study(
        file.config,
        out=out or Path(file.out or f"studies/{path.stem}"),
        tests=test or file.test,
        seeds=file.seeds if seeds is None else parse_seeds(seeds),
        variants=[
            *(Variant(name, overrides) for name, overrides in file.variants.items()),
            *map(parse_variant, variant or ()),
        ],
        grid=axes,
        settings=(*file.set, *(settings or ())),
        baseline=baseline or file.baseline,
    )


def _show(study: "Study", manifests: "Mapping[str, Manifest]", console: Console, *, as_json: bool) -> None:
    """Write and print what is there."""
    from dist_pca.tools.study import tables
    from dist_pca.tools.study.picture import draw
    from dist_pca.tools.study.results import collect, summarise, to_json, write_results

    results = collect(study, manifests)
    summaries = summarise(study, results)
    write_results(study, results, summaries)
    tables.write_markdown(study, results, summaries)
    drawn = draw(study, results, summaries)
    if as_json:
        typer.echo(to_json(study, results, summaries))
    else:
        for table in tables.rich_tables(study, summaries):
            plain_console().print(table)
        for line in tables.notes(study, results):
            console.print(line, style="dim", markup=False)
    written = ("study.csv", "summary.csv", "summary.md", *(("study.png",) if drawn else ()))
    console.print(f"{study.out}: {', '.join(written)}", markup=False)
    if not drawn:
        console.print("no study.png: it needs matplotlib, pip install 'dist-pca[plot]'", style="dim", markup=False)
