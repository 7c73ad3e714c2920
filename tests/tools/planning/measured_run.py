"""`dist_pca.train` that also writes `measured-RANK.json`: bytes alive and bytes sent, by step and phase.

Memory is the storages of all tensors that are alive, from before the network exists. Bytes are those of the tensors of
every collective that PyTorch dispatches, whoever calls it, as a ring of ranks sends them.
"""

import json
import os
import sys
from pathlib import Path

import typer

from dist_pca import train
from dist_pca.resilience.watchdog import Phase, Watchdog
from dist_pca.tools.planning.live import LiveBytes

PHASES = ("data", "teacher", "forward", "backward", "optimizer", "log", "checkpoint")


def main(config: str, overrides: list[str] = typer.Argument(None)) -> None:  # noqa: B008
    measured, latest = LiveBytes(), 0
    sound_enter = Watchdog.enter

    def enter(self: Watchdog, phase: Phase, step: int | None = None) -> None:
        nonlocal latest
        if phase in PHASES:
            latest = latest if step is None else step
            measured.begin(f"{latest} {phase}")
        sound_enter(self, phase, step)

    Watchdog.enter = enter  # type: ignore[method-assign]
    # The process would end here, before what was measured is written.
    vars(train)["exit_process"] = lambda folder, code: sys.exit(code)
    with measured:
        try:
            train.main(config, overrides)
        except SystemExit as leaving:
            if leaving.code:
                raise
    file = Path(train.resolve_config(config, overrides).output) / f"measured-{os.environ.get('RANK', '0')}.json"
    file.write_text(json.dumps({"peaks": measured.peaks, "sent": measured.sent}, indent=1))


if __name__ == "__main__":
    typer.run(main)
