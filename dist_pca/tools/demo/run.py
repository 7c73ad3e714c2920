"""The demonstration: draw, build shards, train without and with adaptation, score all, show pictures."""

import time
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from rich.console import Console

from dist_pca.config import load_config
from dist_pca.console import plain_console
from dist_pca.data.stream import evaluation_stream
from dist_pca.errors import UserError
from dist_pca.evaluation.evaluate import evaluate
from dist_pca.evaluation.inference import predict
from dist_pca.evaluation.load import load_run
from dist_pca.evaluation.report import Scores
from dist_pca.files import write_whole
from dist_pca.resilience.launch import launch, launch_command, quote_command
from dist_pca.resources import resource
from dist_pca.shards.build import build_shards
from dist_pca.shards.manifest import load_manifest
from dist_pca.tools.demo.comparison import Row, compare_table, comparison_picture
from dist_pca.tools.demo.streets import DAY, NIGHT, write_streets

SETS = {"day_train": (DAY, 0, 160), "night_train": (NIGHT, 160, 160), "night_test": (NIGHT, 320, 48)}
"""Look, first street and number of streets of each shard set; no street is in two of them."""
RUNS = {
    "source_only": ("objective.adapt=false",),
    "without_association": ("objective.association.weight=0",),
    "adapted": (),
}
"""What sets each run apart from configs/demo.yaml: the last column less the one before is what association adds."""
TITLES = ["source only", "adapted without association", "adapted"]
DIFFERENCES = [("adaptation adds", 0, 2), ("association adds", 1, 2)]
"""Columns of the table, each the difference of two runs."""
PICTURES = 6


def run_demo(out: Path, overrides: Sequence[str] = ()) -> dict[str, Scores]:
    """Make whatever of the demonstration is not there yet, and print all runs' scores on the test streets at night.

    Raises:
        UserError: a run's training failed, or a run in the folder was made with other settings.
    """
    console = plain_console(soft_wrap=True)
    started = time.perf_counter()
    data = out / "data"
    for name, (look, first, count) in SETS.items():
        if not (data / name / "manifest.json").is_file():
            write_streets(out / "raw" / name, look, split=name, indices=range(first, first + count), seed=0)
            build_shards("folder", out / "raw" / name, data / name, unlabelled=name == "night_train")
    console.print(f"data     {data}: " + ", ".join(f"{count} {name} streets" for name, (_, _, count) in SETS.items()))

    scores = {}
    for name, switches in RUNS.items():
        _train(console, out, name, (*switches, *overrides))
        scores[name] = _score(out, name)
    console.print(compare_table(list(zip(TITLES, scores.values(), strict=True)), DIFFERENCES))
    picture = out / "before_and_after.png"
    _draw(out).save(picture)
    console.print(f"pictures {picture}")
    console.print(f"took     {(time.perf_counter() - started) / 60:.1f} minutes")
    return scores


def _train(console: Console, out: Path, name: str, overrides: Sequence[str]) -> None:
    config = str(resource("configs", "demo"))
    settings = [
        f"name={name}",
        f"output={out}",
        f"data.source={out}/data/day_train",
        f"data.target={out}/data/night_train",
        *overrides,
    ]
    wanted = load_config(Path(config), settings)
    made = wanted.folder / "config.yaml"
    checkpoint = wanted.folder / "checkpoints" / f"step-{wanted.training.steps:08d}"
    if made.is_file() and load_config(made) != wanted:
        raise UserError(f"{wanted.folder}: was trained with other settings; remove it, or choose another --out")
    if checkpoint.is_dir():
        console.print(f"trained  {wanted.folder} (already there)")
        return
    command = launch_command(config, settings)
    console.print(f"train    {quote_command(command)}", style="dim")
    if code := launch(command, wanted.folder):
        raise UserError(f"{wanted.folder}: training ended with exit code {code}; its output above says why")


def _score(out: Path, name: str) -> Scores:
    cached = out / name / "scores.json"
    if cached.is_file():
        return Scores.from_json(cached.read_text())
    config, classes, model = load_run(out / name)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    scores = evaluate(model.to(device), load_manifest(out / "data" / "night_test"), classes, config, device=device)
    write_whole(cached, scores.to_json())
    return scores


def _draw(out: Path) -> Image.Image:
    runs = [load_run(out / name) for name in RUNS]
    config, classes, _ = runs[0]
    rows: list[Row] = []
    for sample in evaluation_stream(load_manifest(out / "data" / "night_test"), 0, 1, classes=classes, workers=0):
        pixels = torch.from_numpy(sample.image).permute(2, 0, 1)[None]
        size = config.input_size(*sample.image.shape[:2])
        predictions = [predict(model, pixels, size, sample.image.shape[:2])[0].numpy() for _, _, model in runs]
        rows.append((sample.image, sample.label, predictions))
        if len(rows) == PICTURES:
            break
    return comparison_picture(rows, classes, TITLES)
