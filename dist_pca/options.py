"""Command-line options shared by several commands."""

from pathlib import Path
from typing import Annotated

import typer

Resume = Annotated[
    bool | None,
    typer.Option(
        "--resume/--no-resume",
        help="Resume even if config keys differ from the run folder's, or refuse a folder that holds a run.",
        show_default="resume if the config is the same",
    ),
]

Launcher = Annotated[
    str | None,
    typer.Option(
        help="An Accelerate YAML file, or the name of one that comes with dist-pca, such as accelerate/gpu_zero3.",
        show_default="one process per GPU, two on a CPU",
    ),
]
Processes = Annotated[int | None, typer.Option(min=1, help="Number of processes on this machine.")]

MaxPixels = Annotated[
    int | None, typer.Option(min=1, help="Refuse images that have more pixels than this.", show_default="178956970")
]

Partition = Annotated[str | None, typer.Option(help="SLURM partition.", show_default="the cluster's")]
Account = Annotated[str | None, typer.Option(help="SLURM account.", show_default="yours")]
QualityOfService = Annotated[
    str | None, typer.Option("--qos", help="SLURM quality of service.", show_default="the account's")
]
CpusPerNode = Annotated[
    int | None, typer.Option(min=1, help="CPU cores per node under SLURM.", show_default="8 for each process")
]
FurtherDirectives = Annotated[
    list[str] | None,
    typer.Option("--sbatch", metavar="KEY[=VALUE]", help="Any other sbatch option. Repeatable."),
]
BatchScript = Annotated[
    Path | None,
    typer.Option(
        exists=True,
        dir_okay=False,
        help="Your copy of launch/slurm/train.sbatch, adapted to the modules, container and network of your cluster.",
        show_default="the shipped script, with the current Python",
    ),
]
