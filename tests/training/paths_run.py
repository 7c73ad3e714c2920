"""Train a small run in this process, and print which files a step, a checkpoint and its restoring run through."""

import json
import sys
from contextlib import ExitStack
from pathlib import Path

import torch

from dist_pca.evaluation.validation import validate
from dist_pca.resilience.preemption import StopRequest
from dist_pca.train import resolve_config
from dist_pca.training.checkpoint_parts import restore
from dist_pca.training.prepare import prepare_run
from dist_pca.training.trainer import Trainer
from tests.support.files_run import files_run, recorded_files
from tests.support.runs import build_streets, overrides

SETTINGS = (
    *("training.ema_decay=0.9", "training.steps=4", "training.log_every=4", "training.checkpoint_every=4"),
    *("data.workers=0", "objective.self_training.start_step=0"),
)


class RecordedStop(StopRequest):
    """Records the files from the end of each step to the end of the next, and after the last until told."""

    def __init__(self) -> None:
        super().__init__()
        self.files: dict[int, set[str]] = {}
        self.recording = ExitStack()

    def any_rank(self, step: int, device: torch.device) -> bool:
        stopping = super().any_rank(step, device)
        self.recording.close()
        self.files[step] = self.recording.enter_context(recorded_files())
        return stopping


def main(folder: Path) -> None:
    """Print the three lists as JSON."""
    build_streets(folder)
    run, stop = resolve_config("demo", overrides(folder, "run", *SETTINGS)), RecordedStop()
    with Trainer(prepare_run(run, world_size=1, resume=None), stop, validate) as trainer:
        trainer.train()
        with trainer.checkpoints:
            pass  # Leaving its context waits for the last checkpoint.
        stop.recording.close()
        files = {"step": stop.files[2], "save": stop.files[4]}
        checkpoint = run.folder / "checkpoints" / "step-00000004"
        files["restore"] = files_run(lambda: restore(trainer.parts, checkpoint))
    print(json.dumps({name: sorted(found) for name, found in files.items()}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
