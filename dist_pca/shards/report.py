"""Tables that the shards commands print: a plan, a check of raw data, skipped samples, problems.

Names of files, classes and recipes are `Text`: in a plain string rich would read [red] as a colour.
"""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Group
from rich.table import Column, Table
from rich.text import Text

from dist_pca.shards.check import Check, SplitCheck
from dist_pca.shards.plan import Plan, raw_bytes
from dist_pca.shards.verify import Verification
from dist_pca.shards.writer import Skipped

_PAIRS = 5
_ROWS = 50


def plan_tables(plan: Plan, out: Path) -> Group:
    """Tables of what a build would write, and from which files."""
    stored = sum(raw_bytes(sizes) for sizes in plan.sizes)
    counts = [shard.stop - shard.start for shard in plan.shards]
    per_shard = f"{min(counts)} to {max(counts)}" if min(counts) < max(counts) else str(counts[0])
    facts = Table(Column(style="bold"), Column(), show_header=False, box=None, padding=(0, 2, 0, 0))
    facts.add_row("recipe", Text(f"{plan.recipe.name}, version {plan.recipe.version}"))
    others = f", of {', '.join(plan.recipe.splits)}" if len(plan.recipe.splits) > 1 else ""
    facts.add_row("split", Text(f"{plan.split}{others}"))
    facts.add_row("samples", f"{len(plan.samples):,}{'' if plan.labelled else ', without labels'}")
    facts.add_row("raw files", f"{stored / 1e6:,.1f} MB")
    facts.add_row("shards", f"{len(counts):,}, each of {per_shard} samples")
    facts.add_row("out", Text(f"{out} (nothing is written now)"))
    pairs = Table("key", "image", "label", title="first samples", title_justify="left")
    for sample in plan.samples[:_PAIRS]:
        pairs.add_row(Text(sample.key), Text(sample.image), Text(sample.label or "none"))
    classes = Table("id", "class", "colour", title="classes", title_justify="left")
    for index, info in enumerate(plan.classes):
        color = ",".join(map(str, info.color))
        classes.add_row(str(index), Text(info.name), Text.assemble(("  ", f"on rgb({color})"), f" {color}"))
    return Group(facts, pairs, classes) if plan.classes else Group(facts, pairs)


def summary_table(title: str, *, samples: int, shards: int, stored: int, seconds: float, speed: str) -> Table:
    """Table with one row about what was built."""
    columns = (Column(name, justify="right") for name in ("samples", "shards", "MB", "seconds", "images/s"))
    table = Table(*columns, title=Text(title), title_justify="left")
    table.add_row(f"{samples:,}", f"{shards:,}", f"{stored / 1e6:,.1f}", f"{seconds:.1f}", speed)
    return table


def skipped_table(skipped: Sequence[Skipped]) -> Group:
    """Table of the samples that a build skipped, with reasons."""
    return _table("skipped", ("file", "reason"), [(sample.image, sample.reason) for sample in skipped])


def problem_table(found: Verification) -> Group:
    """Table of the problems that a verification found."""
    rows = [(problem.file, problem.key, problem.problem) for problem in found.problems]
    return _table(found.folder, ("file", "sample", "problem"), rows)


def check_tables(found: Check) -> Group:
    """Tables of what a raw data set is, what a build would refuse, and warnings."""
    parts: list[Table | Text | Group] = []
    for split in found.splits:
        parts.append(_split_table(split))
        if split.label_values:
            parts.append(_label_table(split))
    if found.problems:
        rows = [(problem.split, problem.file, problem.problem) for problem in found.problems]
        parts.append(_table("what a build would refuse", ("split", "file", "problem"), rows))
    parts += [Text(f"warning: {line}", style="yellow") for line in found.warnings]
    return Group(*parts)


def _split_table(split: SplitCheck) -> Table:
    facts = Table(Column(style="bold"), Column(), show_header=False, box=None, padding=(0, 2, 0, 0))
    facts.title, facts.title_justify = Text(f"split {split.name}"), "left"
    facts.add_row("images", f"{split.images:,}{'' if split.labelled else ', without labels'}")
    facts.add_row("formats", ", ".join(f"{count:,} {kind}" for kind, count in split.formats.items()))
    if split.smallest is not None and split.largest is not None:
        bounds = " to ".join(dict.fromkeys(f"{width} x {height}" for width, height in (split.smallest, split.largest)))
        facts.add_row("sizes", bounds if split.sizes <= 2 else f"{bounds}, {split.sizes:,} different ones")
    facts.add_row("8-bit values", f"{split.darkest} to {split.brightest}")
    if split.orientations:
        turned = ", ".join(f"{count:,} of {tag}" for tag, count in sorted(split.orientations.items()))
        facts.add_row("EXIF orientation", turned)
    if split.passed_over:
        facts.add_row("passed over", Text(split.passed_over))
    if split.empty_classes:
        facts.add_row("classes without a pixel", Text(", ".join(split.empty_classes)))
    return facts


def _label_table(split: SplitCheck) -> Table:
    numbers = (Column(name, justify="right") for name in ("share of pixels", "images with it"))
    table = Table("label value", "meaning", *numbers, title_justify="left")
    for entry in split.label_values[:_ROWS]:
        table.add_row(Text(entry.value), Text(entry.meaning), f"{entry.share:.2%}", f"{entry.images:,}")
    return table


def _table(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> Group:
    """Table of the first rows, and the number of the others."""
    table = Table(*headings, title=Text(title), title_justify="left")
    for row in rows[:_ROWS]:
        table.add_row(*map(Text, row))
    return Group(table, f"and {len(rows) - _ROWS:,} more") if len(rows) > _ROWS else Group(table)
