"""One line of a diagnosis."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

Verdict = Literal["pass", "warn", "fail"]
VERSIONS = "versions"
"""The check that must find the same on all ranks."""
_ORDER: tuple[Verdict, ...] = ("pass", "warn", "fail")


class Check(NamedTuple):
    """What was looked at, what was found, and what to do about it."""

    name: str
    verdict: Verdict
    found: str
    remedy: str = ""


def merge(by_rank: Sequence[Sequence[Check]], hosts: Sequence[str]) -> list[Check]:
    """The checks that every rank made of its own machine as one list; the worst verdict of each name counts.

    What all ranks found alike is said once; what differs names the ranks.

    Args:
        by_rank: Each rank's checks; all have the same names in the same order.
        hosts: Each rank's host.
    """
    merged: list[Check] = []
    for position, own in enumerate(by_rank[0]):
        rows = [checks[position] for checks in by_rank]
        verdict = max((row.verdict for row in rows), key=_ORDER.index)
        worst = [row for row in rows if row.verdict == verdict]
        if own.name == VERSIONS and verdict == "pass" and any(row != own for row in rows):
            verdict = "fail"
            worst = rows = [row._replace(verdict=verdict, remedy="use one environment on all machines") for row in rows]
        if all(row == rows[0] for row in rows):
            merged.append(own)
            continue
        ranks: dict[str, list[int]] = {}
        for rank, row in enumerate(rows):
            if row.verdict == verdict:
                ranks.setdefault(row.found, []).append(rank)
        found = "; ".join(f"{name_ranks(members, hosts)}: {text}" for text, members in ranks.items())
        merged.append(Check(own.name, verdict, found, worst[0].remedy))
    return merged


def name_ranks(ranks: Sequence[int], hosts: Sequence[str]) -> str:
    """Ranks, the first eight by number, and the hosts they are on.

    Args:
        ranks: At least one.
        hosts: Each rank's host, of all ranks.
    """
    there = sorted({hosts[rank] for rank in ranks})
    numbers = ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
    return f"rank{'s' * (len(ranks) > 1)} {numbers} on {', '.join(there)}"
