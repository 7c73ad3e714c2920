"""Tables, lines, JSON and CSV of judged matches."""

import csv
import io
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.table import Table

from dist_pca.classes import ClassInfo
from dist_pca.config import Level
from dist_pca.files import write_whole
from dist_pca.tools.bench.report import rich_table
from dist_pca.tools.matches.judge import Summary, correct_ratio

UNKNOWN = "no label"
"""True class of target pixels that have none."""
CSV_COLUMNS = ("checkpoint", "level", "scope", "source_class", "true_class", "matches", "kept", "weight")


class Block(NamedTuple):
    """One level of one checkpoint."""

    checkpoint: str
    """Name of the checkpoint."""
    level: Level
    scope: str
    summary: Summary


def class_rows(summary: Summary, classes: Sequence[ClassInfo]) -> list[dict[str, Any]]:
    """What became of each source class: its matches, how many are right, and the wrong class that it meets most."""
    rows = []
    for index, info in enumerate(classes):
        matches, kept = summary.matches[index], summary.kept[index]
        wrong = kept[:-1].clone()
        wrong[index] = 0
        worst = int(wrong.argmax())
        rows.append(
            {
                "class": info.name,
                "matches": int(matches.sum()),
                "kept": int(kept.sum()),
                "correct_ratio": _none(_correct_of(matches, index)),
                "kept_correct_ratio": _none(_correct_of(kept, index)),
                "worst_class": classes[worst].name if wrong[worst] else None,
                "worst_share": float(wrong[worst] / kept[:-1].sum()) if wrong[worst] else None,
                "weight": float(summary.weight[index].sum()),
            }
        )
    return rows


def _correct_of(row: torch.Tensor, index: int) -> float:
    known = float(row[:-1].sum())
    return float(row[index]) / known if known else math.nan


def table(block: Block, classes: Sequence[ClassInfo]) -> Table:
    """One row for each source class that has matches, most matched first, and one for all of them."""
    rows = [row for row in class_rows(block.summary, classes) if row["matches"]]
    shown = [
        {
            "class": row["class"],
            "matches": f"{row['matches']:,}",
            "kept": f"{row['kept']:,}",
            "correct": _percent(row["correct_ratio"]),
            "of kept": _percent(row["kept_correct_ratio"]),
            "most wrong": row["worst_class"] or "",
            "share": _percent(row["worst_share"]),
            "loss": _percent(row["weight"]),
        }
        for row in sorted(rows, key=lambda row: -row["matches"])
    ]
    summary = block.summary
    total = {
        "class": "all",
        "matches": f"{int(summary.matches.sum()):,}",
        "kept": f"{int(summary.kept.sum()):,}",
        "correct": _percent(_none(summary.correct_ratio)),
        "of kept": _percent(_none(summary.kept_correct_ratio)),
    }
    return rich_table(f"{block.checkpoint}, {block.level}, scope {block.scope}, shares in per cent", [*shown, total])


def overview(blocks: Sequence[Block], classes: Sequence[ClassInfo]) -> Table:
    """One row for each checkpoint of each level, so that matches are seen over training."""
    names, rows = [info.name for info in classes], []
    for block in sorted(blocks, key=lambda block: block.level):
        summary = block.summary
        pulls = _wrong_pulls(summary, names)
        rows.append(
            {
                "level": block.level,
                "checkpoint": block.checkpoint,
                "correct": _percent(_none(summary.correct_ratio)),
                "of kept": _percent(_none(summary.kept_correct_ratio)),
                "wrong": _percent(sum(share for _, share in pulls)),
                "covered": _percent(summary.cover_ratio),
                "worst pull": f"{pulls[0][0]} {_percent(pulls[0][1])}" if pulls else "",
            }
        )
    return rich_table(f"over training, scope {blocks[0].scope}, shares in per cent", rows)


def lines(block: Block, classes: Sequence[ClassInfo]) -> list[str]:
    """What a table of classes does not show: hubs, edges, coverage, and which classes wrong matches pull where."""
    summary, names = block.summary, [*(info.name for info in classes), UNKNOWN]
    hubs = [
        f"{names[index]} {_percent(float(summary.hub_classes[index]))}"
        for index in summary.hub_classes.argsort(descending=True).tolist()[:3]
        if summary.hub_classes[index] > 0
    ]
    found = [
        f"hubs: 1 % of the target's pixels receive {_percent(_none(summary.hub_share)) or '0.0'} % of the matches"
        + (f" ({', '.join(hubs)})" if hubs else ""),
        f"edges: the outermost ring of pixels, {_percent(summary.edge_pixels)} % of the target's, receives "
        f"{_percent(_none(summary.edge_share)) or '0.0'} %",
        f"{_percent(summary.cover_ratio)} % of the target's pixels are matched; "
        f"{_percent(_none(summary.consistent_ratio)) or '0.0'} % of the cycles are consistent",
    ]
    if pulls := _wrong_pulls(summary, names):
        wrong = sum(share for _, share in pulls)
        most = ", ".join(f"{pair} {_percent(share)}" for pair, share in pulls[:4])
        found.append(
            f"wrong matches carry {_percent(wrong)} % of the loss, a true class pulled towards another: {most}"
        )
    return found


def _wrong_pulls(summary: Summary, names: Sequence[str]) -> list[tuple[str, float]]:
    """Pairs of a target's true class and the source class it is pulled towards, by share of the loss.

    Shares are of the loss at target pixels whose true class is known.
    """
    known = summary.weight[:, :-1]
    wrong = (known / known.sum().clamp(min=1e-9)).fill_diagonal_(0)
    order = wrong.flatten().argsort(descending=True, stable=True).tolist()
    pairs = [divmod(cell, wrong.shape[1]) for cell in order]
    return [(f"{names[j]} → {names[i]}", float(wrong[i, j])) for i, j in pairs if wrong[i, j] > 0]


def to_json(blocks: Sequence[Block], classes: Sequence[ClassInfo], images: int) -> str:
    """JSON of all blocks, with null where there is nothing to judge.

    Args:
        blocks: Levels of checkpoints.
        classes: The run's.
        images: Images of each domain that were looked at.
    """
    names = [*(info.name for info in classes), UNKNOWN]
    found = [
        {
            "checkpoint": block.checkpoint,
            "level": block.level,
            "scope": block.scope,
            "matches": int(block.summary.matches.sum()),
            "kept": int(block.summary.kept.sum()),
            "correct_ratio": _none(block.summary.correct_ratio),
            "kept_correct_ratio": _none(block.summary.kept_correct_ratio),
            "consistent_ratio": _none(block.summary.consistent_ratio),
            "cover_ratio": block.summary.cover_ratio,
            "hubs": {
                "share": _none(block.summary.hub_share),
                "classes": {
                    name: share
                    for name, share in zip(names, block.summary.hub_classes.tolist(), strict=True)
                    if share > 0
                },
            },
            "edges": {"share": _none(block.summary.edge_share), "pixels": block.summary.edge_pixels},
            "wrong_weight": _none(1 - correct_ratio(block.summary.weight)),
            "classes": class_rows(block.summary, classes),
        }
        for block in blocks
    ]
    return json.dumps({"images": images, "blocks": found}, indent=2)


def write_csv(file: Path, blocks: Sequence[Block], classes: Sequence[ClassInfo]) -> None:
    """Write one row for each pair of a source class and a true class that has a match."""
    names = [*(info.name for info in classes), UNKNOWN]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    for block in blocks:
        summary = block.summary
        for i, j in summary.matches.nonzero().tolist():
            counts = int(summary.matches[i, j]), int(summary.kept[i, j]), f"{float(summary.weight[i, j]):.6g}"
            writer.writerow([block.checkpoint, block.level, block.scope, names[i], names[j], *counts])
    write_whole(file, text.getvalue())


def _none(value: float) -> float | None:
    return None if math.isnan(value) else value


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}"
