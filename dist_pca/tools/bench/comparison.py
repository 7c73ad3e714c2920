"""Records of association beside each other: ratios to read them by, and how they grow with n."""

import math
from collections.abc import Iterable, Sequence

import numpy as np
from rich.table import Table

from dist_pca.tools.bench.report import Record, Value, markdown_table, rich_table

_NOT_IN_TERMINAL = ("n", "kept", "cover", "ranks", "value only", "sent")
_CAPTION = ("device", "torch", "world_size", "channels", "similarity", "data", "spread", "kept", "cover")
_SETTING = ("device", "world_size", "n_source", "n_target", "channels", "similarity", "data", "spread", "kept", "cover")


def compared(records: Sequence[Record]) -> list[dict[str, str]]:
    """One row of cells for each record, with its ratios to dense and to the bare product of the same size."""
    return [_cells(record, records) for record in records]


def terminal_tables(records: Sequence[Record]) -> list[Table]:
    """One table for each n, under what the data was like there."""
    tables = []
    for n in dict.fromkeys(record["n_source"] for record in records):
        same = [record for record in records if record["n_source"] == n]
        shown = [{name: cell for name, cell in row.items() if name not in _NOT_IN_TERMINAL} for row in compared(same)]
        known = next((record for record in same if record["kept_ratio"] is not None), None)
        data = "" if known is None else f": {_share(known['kept_ratio'])} of cycles hold, "
        data += "" if known is None else f"{_share(known['cover_ratio'])} of targets are matched"
        tables.append(rich_table(f"n = {n:,}{data}", shown))
    return tables


def _cells(record: Record, records: Sequence[Record]) -> dict[str, str]:
    beside = [other for other in records if all(other.get(name) == record.get(name) for name in _SETTING)]
    association = record["implementation"] != "matmul"
    dense = next((other for other in beside if other["implementation"] == "dense"), None) if association else None
    products = [other for other in beside if other["implementation"] == "matmul" and other["dtype"] == record["dtype"]]
    product = products[0] if products else None
    several = record["world_size"] != 1
    return {
        "implementation": str(record["implementation"]),
        "dtype": str(record["dtype"]),
        "communication": str(record["communication"] or ""),
        "ranks": str(record["world_size"]) if several else "",
        "n": f"{record['n_source']:,}",
        "time": _seconds(record["seconds"]),
        "value only": _seconds(record["seconds_value"]),
        "speed against dense": _times(_ratio(dense, record, "seconds")),
        "times product": _plain(_ratio(record, product, "seconds")),
        "at least": _plain(record.get("unavoidable_products") if product else None),
        "peak memory": _bytes(record["peak_bytes"]),
        "memory against dense": _part(_ratio(dense, record, "peak_bytes")),
        "loss error": _error(record["loss_error"]),
        "gradient error": _error(record["gradient_error"]),
        "kept": _share(record["kept_ratio"]),
        "cover": _share(record["cover_ratio"]),
        "sent": _bytes(record["communication_bytes"]),
        "note": str(record["note"] or ""),
    }


def _ratio(above: Record | None, below: Record | None, field: str) -> float | None:
    if above is None or below is None or above is below:
        return None
    numerator, denominator = above[field], below[field]
    if not isinstance(numerator, int | float) or not isinstance(denominator, int | float) or denominator == 0:
        return None
    return numerator / denominator


def series(records: Iterable[Record]) -> dict[tuple[str, str, str], list[Record]]:
    """Records by implementation, dtype and communication (empty for none), each list in order of n."""
    lines: dict[tuple[str, str, str], list[Record]] = {}
    for record in sorted(records, key=lambda r: int(r["n_source"] or 0)):
        key = (str(record["implementation"]), str(record["dtype"]), str(record["communication"] or ""))
        lines.setdefault(key, []).append(record)
    return lines


def points(records: Iterable[Record], field: str) -> tuple[list[int], list[float]]:
    """n and the field's value, where it is known and more than 0."""
    known = [(r["n_source"], r[field]) for r in records if isinstance(r[field], int | float) and r[field] != 0]
    return [int(n or 0) for n, _ in known], [float(value or 0) for _, value in known]


def power_law(n: Sequence[int], values: Sequence[float]) -> tuple[float, float] | None:
    """(a, b) of `a * n^b`, by least squares on logarithms; None for fewer than two sizes."""
    if len(n) < 2:
        return None
    exponent, intercept = np.polyfit(np.log(n), np.log(values), 1)
    return math.exp(intercept), float(exponent)


def growth(records: Iterable[Record]) -> list[dict[str, str]]:
    """One row of cells for each line of a sweep: the exponents of time and memory against n."""
    rows = []
    for (implementation, dtype, communication), line in series(records).items():
        fits = [power_law(*points(line, field)) for field in ("seconds", "peak_bytes")]
        cells = {"implementation": implementation, "dtype": dtype, "communication": communication}
        cells |= {
            name: "" if fit is None else f"n^{fit[1]:.2f}" for name, fit in zip(("time", "memory"), fits, strict=True)
        }
        sizes = points(line, "seconds")[0]
        rows.append(cells | {"from n": f"{min(sizes):,}", "to n": f"{max(sizes):,}"} if sizes else cells)
    return rows


def readme_tables(records: Sequence[Record]) -> str:
    """Markdown of saved records: one table for each device and setting, under a line that names them."""
    if not records:
        return "No measurements yet."
    groups: dict[tuple[Value, ...], list[Record]] = {}
    for record in records:
        groups.setdefault(tuple(record.get(name) for name in _CAPTION), []).append(record)
    return "\n\n".join(f"{_caption(group[0])}\n\n{markdown_table(compared(group))}" for group in groups.values())


def _caption(record: Record) -> str:
    setting = ", ".join(
        [
            f"C = {record['channels']}",
            str(record["similarity"]),
            f"{record['data']} data",
            *([f"{record['world_size']} ranks"] if record["world_size"] != 1 else []),
        ]
    )
    return f"{record['device']}, PyTorch {record['torch']}: {setting}"


def _seconds(value: Value) -> str:
    if not isinstance(value, int | float):
        return ""
    return f"{value * 1e3:.3g} ms" if value < 1 else f"{value:.3g} s"


def _bytes(value: Value) -> str:
    if not isinstance(value, int | float):
        return ""
    return f"{value / 2**20:,.0f} MiB" if value < 2**30 else f"{value / 2**30:.2f} GiB"


def _times(value: float | None) -> str:
    return "" if value is None else f"{value:.3g} x"


def _part(value: float | None) -> str:
    return "" if value is None else f"1/{value:.3g}"


def _plain(value: Value) -> str:
    return f"{value:.3g}" if isinstance(value, int | float) else ""


def _error(value: Value) -> str:
    return f"{value:.0e}" if isinstance(value, int | float) else ""


def _share(value: Value) -> str:
    return f"{value:.2f}" if isinstance(value, int | float) else ""
