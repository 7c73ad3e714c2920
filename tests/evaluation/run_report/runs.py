"""A run folder without checkpoints, as training leaves it, and a reader of the page that shows it."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from dist_pca.classes import ClassInfo
from dist_pca.config import save_config
from tests.support.networks import CLASSES, run_config

SCORES = {
    "classes": [info.name for info in CLASSES],
    "iou": [0.75, 0.5, None],
    "mean_iou": 0.625,
    "pixel_accuracy": 0.8,
    "images": 12,
    "label_sets": {},
}
VOID = {"meta", "img", "br", "path", "rect", "use", "line"}


def line(step: int, **more: Any) -> dict[str, Any]:
    """A line of metrics, whose steps take `step / 10` seconds, two thirds of them in backward."""
    pace = step / 10
    return {
        "step": step,
        "learning_rate": 0.1 / step,
        "loss": 10 / step,
        "association_features": 5.0,
        "association_predictions": None,
        "consistent_ratio_features": 0.25,
        "seconds_per_step": pace,
        "seconds": {"data": 0.0, "backward": pace * 2 / 3},
        "images_per_second": 8.0,
        "peak_memory_bytes": 2**30,
        **more,
    }


def write_folder(
    folder: Path, name: str = "tiny", *, classes: Sequence[ClassInfo] = CLASSES, scores: Any = SCORES, **keys: Any
) -> Path:
    """A finished run of 25 steps."""
    run = folder / name
    run.mkdir(parents=True)
    config = run_config(str(folder)).model_copy(update={"name": name, **keys})
    training = config.training.model_copy(update={"steps": 25})
    save_config(config.model_copy(update={"training": training}), run / "config.yaml")
    files: dict[str, Any] = {
        "classes": [asdict(info) for info in classes],
        "data": {
            domain: [{"folder": f"{domain} shards", "samples": 7, "sha256": "0"}] for domain in ("source", "target")
        },
        "environment": {"torch": "9.8.7", "device": "cpu", "world_size": 2, "command": ["train.py", "demo"]},
        "exit": {"code": 0, "message": "saved"},
        "scores": scores,
    }
    for file, content in files.items():
        (run / f"{file}.json").write_text(json.dumps(content))
    lines = [line(10), line(20), line(25, kept_per_class_features={info.name: 3.5 for info in classes})]
    (run / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines))
    return run


class Page(HTMLParser):
    """A page's elements and text; refuses one whose elements do not close in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags, self.ids = Counter[str](), list[str]()
        self.references, self.attributes = list[tuple[str, str]](), list[tuple[str, dict[str, str | None]]]()
        self.words, self._open = list[str](), list[str]()
        self.feed(html)
        self.close()
        assert not self._open, self._open

    @property
    def text(self) -> str:
        """Text of the page, spaces joined."""
        return " ".join(" ".join(self.words).split())

    def row(self, heading: str) -> list[str]:
        """Cells of the first table row with a heading."""
        return self.rows()[heading]

    def rows(self) -> dict[str, list[str]]:
        """Cells of all table rows by heading; the first one counts where there are several."""
        found: dict[str, list[str]] = {}
        for heading, cells in self._rows:
            found.setdefault(heading, cells)
        return found

    _rows: list[tuple[str, list[str]]]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        values = dict(attrs)
        self.attributes.append((tag, values))
        self.ids += [values["id"]] if values.get("id") else []  # type: ignore[list-item]
        self.references += [(name, value or "") for name, value in attrs if name in ("src", "href", "xlink:href")]
        if tag not in VOID:
            self._open.append(tag)
        if not hasattr(self, "_rows"):
            self._rows = []
        if tag == "tr":
            self._cells = list[str]()
        if tag in ("th", "td"):
            self._cell = len(self.words)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag, (tag, self._open[-3:])
        if tag in ("th", "td"):
            self._cells.append(" ".join(" ".join(self.words[self._cell :]).split()))
        if tag == "tr" and self._cells:
            self._rows.append((self._cells[0], self._cells[1:]))

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] != "style":
            self.words.append(data)
