"""A short run of a large network on drawn streets, for what a GPU does in a step; prints JSON of `bench`'s shape."""

import json
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from dist_pca.tools.bench.demonstration import train_demonstration
from dist_pca.tools.bench.report import Record, to_json

SETTINGS: dict[str, object] = {
    "model.backbone": "resnet101",
    "model.head": "deeplab_v2",
    "model.output_stride": 8,
    "model.association_stride": "null",
    "data.shorter_edge": "[730,768]",
    "data.crop": "[730,730]",
    "data.workers": 6,
    "training.precision": "bf16",
    "evaluation.input_size": "null",
}
STEPS = 40
FIGURES = (
    *("loss", "seconds_per_step", "images_per_second", "flop_utilisation", "peak_memory_bytes", "data_wait_share"),
    "seconds",
)


def measure_run(folder: Path, settings: Mapping[str, object], steps: int) -> list[Record]:
    """Train for some steps, and give the figures of the last line of metrics.

    Args:
        folder: An empty folder.
        settings: Keys of the run, in full.
        steps: Steps of the run; the line is about the second half.

    Raises:
        UserError: the run fails.
    """
    run = train_demonstration(folder, settings=settings, steps=steps, log_every=steps // 2, checkpoint_every=steps)
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    records: list[Record] = [{"name": "steps", "value": last["step"]}]
    for name in FIGURES:
        found = last.get(name)
        parts = {f"{name}_{part}": value for part, value in found.items()} if isinstance(found, dict) else {name: found}
        records += [{"name": key, "value": value} for key, value in parts.items()]
    return records


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        sys.stdout.write(to_json(measure_run(Path(name), SETTINGS, STEPS)) + "\n")
