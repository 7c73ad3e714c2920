"""The report of runs, put together: from their folders alone, or with sections that a caller adds."""

from collections.abc import Sequence
from pathlib import Path

from dist_pca.evaluation.run_report.charts import has_matplotlib
from dist_pca.evaluation.run_report.curves import curve_sections
from dist_pca.evaluation.run_report.page import Section, Text, render
from dist_pca.evaluation.run_report.record import RunRecord, read_run_folder
from dist_pca.evaluation.run_report.scores import score_sections
from dist_pca.evaluation.run_report.summary import (
    environment_section,
    lead,
    settings_section,
    summary_section,
    time_section,
    unique_names,
)
from dist_pca.files import write_whole

FILE = "report.html"
_MOST_LEADS = 4
"""Runs that are summarised in a line each, above the table that has them all."""


def write_run_report(folder: Path) -> Path:
    """Write the report of a run into its folder, from the metrics and scores that are there; returns the file.

    Raises:
        UserError: the folder is not a run.
        OSError: the file cannot be written.
    """
    file = folder / FILE
    write_whole(file, report_html([read_run_folder(folder)]))
    return file


def report_html(
    records: Sequence[RunRecord],
    *,
    baseline: int | None = None,
    pictures: Sequence[Section] = (),
    notes: Sequence[str] = (),
) -> str:
    """Render the report of one run, or of several side by side.

    Args:
        records: The runs.
        baseline: Index of the run that the others are compared with; None compares with none.
        pictures: Sections that are shown after the scores.
        notes: Sentences about what else is left out.
    """
    names = unique_names(records)
    missing = [note for record in records for note in record.notes] + list(notes)
    if not has_matplotlib():
        missing.append("Curves: matplotlib is not installed; pip install 'dist-pca[plot]' and write the report again.")
    scores = score_sections(records, names, baseline)
    if not any(section.blocks for section in scores):
        missing.append("Scores: scores.json holds none; add --target SHARDS to have the newest checkpoint scored.")
    sections = [
        summary_section(records, names),
        *scores,
        *pictures,
        *curve_sections(records, names),
        time_section(records, names),
        settings_section(records, names),
        environment_section(records, names),
        Section("Left out", [Text(note) for note in missing]),
    ]
    title = f"Run {names[0]}" if len(records) == 1 else f"{len(records)} runs compared"
    leads = [lead(record, name) for record, name in zip(records, names, strict=True)]
    return render(title, leads if len(leads) <= _MOST_LEADS else [], sections)
