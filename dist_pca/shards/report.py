"""Tables that the shards commands print: a plan, skipped samples, problems."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Group
from rich.table import Table
from rich.text import Text

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
    facts = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    facts.add_column(style="bold")
    facts.add_column()
    facts.add_row("recipe", f"{plan.recipe.name}, version {plan.recipe.version}")
    others = f", of {', '.join(plan.recipe.splits)}" if len(plan.recipe.splits) > 1 else ""
    facts.add_row("split", f"{plan.split}{others}")
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
    table = Table(title=title, title_justify="left")
    for name in ("samples", "shards", "MB", "seconds", "images/s"):
        table.add_column(name, justify="right")
    table.add_row(f"{samples:,}", f"{shards:,}", f"{stored / 1e6:,.1f}", f"{seconds:.1f}", speed)
    return table


def skipped_table(skipped: Sequence[Skipped]) -> Group:
    """Table of the samples that a build skipped, with reasons."""
    table = Table("file", "reason", title="skipped", title_justify="left")
    for sample in skipped[:_ROWS]:
        table.add_row(Text(sample.image), Text(sample.reason))
    return Group(table, *_more(len(skipped)))


def problem_table(found: Verification) -> Group:
    """Table of the problems that a verification found."""
    table = Table("file", "sample", "problem", title=found.folder, title_justify="left")
    for problem in found.problems[:_ROWS]:
        table.add_row(Text(problem.file), Text(problem.key), Text(problem.problem))
    return Group(table, *_more(len(found.problems)))


def _more(count: int) -> list[str]:
    return [f"and {count - _ROWS} more"] if count > _ROWS else []
