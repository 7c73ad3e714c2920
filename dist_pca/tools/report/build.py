"""Build a report with everything that it can show: what run folders hold, and what their networks give."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from dist_pca.data.addresses import redact
from dist_pca.data.cache import cache_settings, open_manifest
from dist_pca.errors import UserError
from dist_pca.evaluation.load import find_checkpoint
from dist_pca.evaluation.run_report.page import Block, Section
from dist_pca.evaluation.run_report.record import RunRecord, read_run_folder
from dist_pca.evaluation.run_report.report import report_html
from dist_pca.evaluation.run_report.summary import unique_names
from dist_pca.files import write_whole
from dist_pca.shards.manifest import Manifest
from dist_pca.tools.matches.crops import open_domains, take_batches
from dist_pca.tools.matches.measure import measure, with_options
from dist_pca.tools.report.cycles import cycle_blocks
from dist_pca.tools.report.targets import Column, predict_targets, target_section
from dist_pca.training.checkpoint import whole_checkpoints

MOST_CROPS = 6
"""Crops of each domain in a drawing of cycles."""


def build_report(runs: Sequence[Path], baseline: Path | None, target: str | None, out: Path, *, pictures: int) -> str:
    """Write the report of runs into a file, and return a line that names it.

    Args:
        runs: Run folders.
        baseline: Run folder that the others are compared with; it is the first column.
        target: Target shards; None takes those of the first run's config, for pictures alone.
        out: The file.
        pictures: Target images shown; 0 runs no network.

    Raises:
        UserError: a folder is no run, the shards that were asked for cannot be used, or the file cannot be written.
    """
    folders = list(dict.fromkeys([*([baseline] if baseline else []), *runs]))
    records = [read_run_folder(folder) for folder in folders]
    notes: list[str] = []
    sections: list[Section] = []
    if pictures:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        records, sections = _pictured(records, target, pictures, notes, device)
    html = report_html(records, baseline=None if baseline is None else 0, pictures=sections, notes=notes)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_whole(out, html)
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written ({error}); give another file") from error
    return f"{out}: {len(records)} run{'s' * (len(records) != 1)}, {len(html.encode()) / 1e6:.1f} MB"


def _pictured(
    records: list[RunRecord], target: str | None, pictures: int, notes: list[str], device: str
) -> tuple[list[RunRecord], list[Section]]:
    """Run the networks; returns the records with new scores, and sections of target images and cycles."""
    names = unique_names(records)
    columns = _columns(records, names, notes)
    sections = []
    try:
        manifest = _open_target(records, target)
        predicted = [predict_targets(column, manifest, pictures, device) for column in columns]
    except UserError as error:
        # Shards that were asked for are an error; those of a config may have been moved since.
        if target is not None:
            raise
        notes.append(f"Target images: {error}.")
        predicted = []
    if predicted:
        scored = {column.run: each.score for column, each in zip(columns, predicted, strict=True) if each.score}
        records = [replace(r, scores=[scored[r.folder]]) if r.folder in scored else r for r in records]
        sections.append(target_section(columns, predicted, redact(manifest.location)))
    # Where labels of the target are there, the drawings show the true class of each match.
    labelled = target if predicted and manifest.labelled else None
    blocks: list[Block] = []
    for record, name in zip(records, names, strict=True):
        try:
            blocks += _cycles(record, name if len(records) > 1 else "", labelled, device)
        except UserError as error:
            notes.append(f"Cycles of {name}: {error}.")
    intro = (
        "Cycles of the newest checkpoint on a batch of training crops. A match may lie in any target image among the "
        "candidates, those of other ranks too. Dots have the colour of their class, white where it is not known."
    )
    return records, [*sections, Section("Cycles", blocks, intro)]


def _open_target(records: Sequence[RunRecord], target: str | None) -> Manifest:
    config = next((record.config for record in records if record.config is not None), None)
    if config is None:
        raise UserError("no run has a config.yaml that can be read; restore one")
    location = target or config.data.validation or next(iter(config.data.folders("target")), None)
    if location is None:
        raise UserError("the runs name neither data.validation nor data.target; give --target SHARDS")
    return open_manifest(location, cache_settings(config.data.cache))


def _columns(records: Sequence[RunRecord], names: Sequence[str], notes: list[str]) -> list[Column]:
    """The newest checkpoint of each run; of a single run the oldest one too, which shows what training changed."""
    columns = []
    for record, name in zip(records, names, strict=True):
        try:
            newest = find_checkpoint(record.folder)
        except UserError as error:
            notes.append(f"Images and cycles of {name}: {error}.")
            continue
        oldest = whole_checkpoints(newest.parent)[0]
        if len(records) == 1 and oldest.name != newest.name:
            columns.append(Column(f"step {int(oldest.name.rpartition('-')[2]):,}", record.folder, oldest.name, False))
        columns.append(Column(name, record.folder, newest.name, True))
    return columns


def _cycles(record: RunRecord, name: str, target: str | None, device: str) -> list[Block]:
    """Drawings of the cycles on the run's first batch, one for each level; none if it does not associate.

    Args:
        record: The run.
        name: Begins the titles; empty where there is one run.
        target: Target shards; None takes the run's.
        device: Where its network runs.

    Raises:
        UserError: its shards or its checkpoint cannot be read.
    """
    if record.config is None or not record.config.objective.adapt or record.config.objective.association.weight == 0:
        return []
    config = with_options(record.config, target=target)
    domains = open_domains(config.data, record.classes, target_labels=False)
    images = min(config.training.source_batch, config.training.target_batch, MOST_CROPS)
    (batch,) = take_batches(config, *domains, batches=1, images=images, whole=False)
    ranks = record.environment.get("world_size", 1)
    # Fewer crops than the batch has are all of the first ranks.
    ranks = ranks if isinstance(ranks, int) and images == config.training.source_batch else 1
    found = measure(record.folder, find_checkpoint(record.folder).name, config, [batch], device=device)
    blocks: list[Block] = []
    for level, (candidate_sets,) in found.items():
        title = ", ".join(filter(None, (name, f"cycles of {level}")))
        blocks += cycle_blocks(title, batch, candidate_sets, record.classes, ranks)
    return blocks
