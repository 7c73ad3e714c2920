"""`dist-pca submit` and `status`: parsing and printing."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from dist_pca.console import plain_console
from dist_pca.options import Account, BatchScript, CpusPerNode, FurtherDirectives, Partition, QualityOfService, Resume
from dist_pca.resources import names, resource

app = typer.Typer(rich_markup_mode="rich")

_SUBMIT_EXAMPLES = """
[bold]Examples[/]

dist-pca submit gta5_to_cityscapes --nodes 1 --gpus-per-node 8 --time 12:00:00 --dry-run

dist-pca submit gta5_to_cityscapes training.{source,target}_batch=16 --nodes 2 --gpus-per-node 8 --time 1-00

dist-pca submit my_run.yaml --nodes 1 --gpus-per-node 4 --time 90 --sbatch constraint=a100 --sbatch exclusive

dist-pca submit my_run.yaml --nodes 2 --gpus-per-node 8 --time 12:00:00 --script our_cluster.sbatch
"""

_STATUS_EXAMPLES = """
[bold]Examples[/]

dist-pca status runs/gta5_to_cityscapes

dist-pca status runs/* --json

watch -n 30 dist-pca status runs/gta5_to_cityscapes
"""


@app.command("submit", epilog=_SUBMIT_EXAMPLES)
def submit(
    config: Annotated[
        str, typer.Argument(help=f"A YAML file, or one that comes with dist-pca: {', '.join(names('configs'))}.")
    ],
    nodes: Annotated[int, typer.Option(min=1, help="Machines.", show_default=False)],
    gpus_per_node: Annotated[
        int,
        typer.Option(min=0, help="GPUs of each; 0 trains on CPUs, one process on each machine.", show_default=False),
    ],
    time: Annotated[
        str,
        typer.Option(
            help="Time limit as SLURM writes it: minutes, [D-]HH:MM:SS or D-HH. A run that needs longer saves before "
            "it is over, and is queued again.",
            show_default=False,
        ),
    ],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, for example training.steps=100")] = None,
    partition: Partition = None,
    account: Account = None,
    qos: QualityOfService = None,
    cpus_per_node: CpusPerNode = None,
    further: FurtherDirectives = None,
    script: BatchScript = None,
    resume: Resume = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the script and submit nothing.")] = False,
) -> None:
    """Train under SLURM: fill in the batch script, check the run, submit it, and say how to follow it.

    The script is printed, and saved in the run folder. Errors are reported now, and not hours later in the queue. A run
    resumes from its newest checkpoint, whatever stopped it.
    """
    from dist_pca.tools.cluster.status import saved_step
    from dist_pca.tools.cluster.submit import check_run, render, train_directives
    from dist_pca.tools.cluster.submit import submit as hand_over
    from dist_pca.train import resolve_config

    run = resolve_config(config, overrides or [])
    processes = max(1, gpus_per_node)
    directives = train_directives(
        name=run.name,
        folder=run.folder,
        nodes=nodes,
        gpus_per_node=gpus_per_node,
        cpus_per_node=cpus_per_node or 8 * processes,
        time=time,
        partition=partition,
        account=account,
        qos=qos,
        further=further or (),
    )
    text = render(
        (script or resource("launch", "slurm/train", ".sbatch")).read_text(),
        directives,
        [config, *(overrides or []), *(() if resume is None else ("--resume",) if resume else ("--no-resume",))],
        python=sys.executable if script is None else None,
    )
    check_run(run, world_size=nodes * processes, gpus=gpus_per_node > 0, resume=resume)
    typer.echo(text)
    console = plain_console(stderr=True, soft_wrap=True)
    for warning in run.unused_terms():
        console.print(f"warning: {warning}", markup=False)
    if dry_run:
        return
    if run.training.steps <= saved_step(run.folder):
        console.print(f"{run.folder}: all {run.training.steps} steps are made already", markup=False)
        return
    job = hand_over(text, run.folder)
    console.print(f"job {job} is queued; follow it with", style="bold", markup=False)
    for line in (
        f"dist-pca status {run.folder}",
        f"squeue --job {job} --start",
        f"tail -F {run.folder}/slurm/{job}*",
        f"scancel --signal=INT {job}    # to save and exit; the same command resumes from there",
    ):
        console.print(f"  {line}", markup=False)


@app.command("status", epilog=_STATUS_EXAMPLES)
def status(
    runs: Annotated[list[Path], typer.Argument(help="Run folders.", show_default=False)],
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list, with every metric.")] = False,
) -> None:
    """Show the status of runs from their folders: state, step, time left, last metrics, restarts.

    [bold]queued[/] waits to be started or resumed, [bold]stopped[/] has saved and resumes when it is restarted,
    [bold]stale[/] has neither recorded an end nor written anything for a while.
    """
    from dist_pca.tools.cluster.status import read_status, remarks, table, to_json

    statuses = [read_status(run) for run in runs]
    if as_json:
        typer.echo(to_json(statuses))
        return
    console = plain_console(soft_wrap=True)
    console.print(table(statuses), soft_wrap=False)
    for line in remarks(statuses):
        console.print(line)
