"""Options that several commands take."""

from pathlib import Path
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

Launcher = Annotated[
    str | None,
    typer.Option(
        help="Accelerate's YAML file, or one that comes with dist-pca, for example accelerate/gpu_zero3.",
        show_default="one process per GPU, two on a CPU",
    ),
]
Processes = Annotated[int | None, typer.Option(min=1, help="Processes on this machine.")]

Partition = Annotated[str | None, typer.Option(help="SLURM's.", show_default="the cluster's")]
Account = Annotated[str | None, typer.Option(help="SLURM's.", show_default="yours")]
QualityOfService = Annotated[str | None, typer.Option("--qos", help="SLURM's.", show_default="the account's")]
CpusPerNode = Annotated[
    int | None, typer.Option(min=1, help="Cores of each machine under SLURM.", show_default="8 for each process")
]
FurtherDirectives = Annotated[
    list[str] | None,
    typer.Option("--sbatch", metavar="KEY[=VALUE]", help="Any other option of sbatch. Repeatable."),
]
BatchScript = Annotated[
    Path | None,
    typer.Option(
        exists=True,
        dir_okay=False,
        help="Your copy of launch/slurm/train.sbatch, with modules, container and network of your cluster.",
        show_default="the one that comes with dist-pca, with the Python that runs now",
    ),
]
