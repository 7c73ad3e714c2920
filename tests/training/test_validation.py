"""A run that is scored while it trains keeps its best checkpoint, with the score that `dist-pca evaluate` gives."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.runs import build_streets, launch

pytestmark = [pytest.mark.slow, pytest.mark.exhaustive]


def evaluated(run: Path, shards: Path, *options: str) -> float:
    command = [sys.executable, "-m", "dist_pca.cli", "evaluate", str(run), "--shards", str(shards), "--json", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return float(json.loads(done.stdout)["mean_iou"])


@pytest.mark.parametrize("stage", [2, 3])
def test_the_best_checkpoint_has_the_score_that_evaluation_gives_it(tmp_path: Path, stage: int) -> None:
    build_streets(tmp_path)
    validation = [f"data.validation={tmp_path}/dusk", "training.validate_every=2", "training.ema_decay=0.9"]
    options = ("--zero_stage", str(stage))
    done = launch(tmp_path, "run", *validation, f"training.zero_stage={stage}", launcher_options=options)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "runs" / "run"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    scores = {
        line["step"]: line["validation_mean_iou"] for line in lines if line.get("validation_mean_iou") is not None
    }
    assert list(scores) == [2, 4, 6]
    best = max(scores, key=lambda step: scores[step])
    assert (run / "checkpoints" / "best").read_text() == f"step-{best:08d}\n"
    assert evaluated(run, tmp_path / "dusk", "--checkpoint", "best") == pytest.approx(scores[best], abs=1e-6)
    assert evaluated(run, tmp_path / "dusk") == pytest.approx(scores[6], abs=1e-6)
    trained = evaluated(run, tmp_path / "dusk", "--weights", "trained")
    assert trained != pytest.approx(scores[6], abs=1e-9)
