"""`dist_pca.train` whose rank 1 has another run folder than rank 0, as on machines that do not share it."""

import os
import sys

import typer

from dist_pca import train

if __name__ == "__main__":
    if os.environ["RANK"] == "1":
        sys.argv = [f"{word}/elsewhere" if word.startswith("output=") else word for word in sys.argv]
    typer.run(train.main)
