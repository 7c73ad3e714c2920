"""Imports run one way: from the doors down to what needs nothing, without a circle."""

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import dist_pca

PACKAGE = Path(dist_pca.__file__).parent
ROOMS = (
    *("errors", "console", "classes", "cores", "options", "files", "owner_file", "distributed", "resources"),
    *("config", "association", "shards", "data", "model", "objective"),
    *("resilience", "training", "evaluation"),
    *("train", "tools", "doctor", "cluster", "cli"),
)
"""From the lowest to the highest; each may import those before it."""


def imports() -> Iterator[tuple[str, str]]:
    """Pairs of modules of the package of which the first imports the second, inside functions too."""
    names = {".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts) for path in PACKAGE.rglob("*.py")}
    for path in sorted(PACKAGE.rglob("*.py")):
        module = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("dist_pca."):
                for name in node.names:
                    inner = f"{node.module}.{name.name}"
                    found = inner if inner in names else node.module
                    yield module, found if found in names else f"{found}.__init__"


def room(module: str) -> str:
    return module.split(".")[1]


def test_a_room_imports_only_rooms_below_it() -> None:
    pairs = [(a, b) for a, b in imports() if room(a) != "__init__" and room(a) != room(b)]
    assert len(pairs) > 100
    # A folder's barrier is imported where it is entered, so that building shards does not import torch.
    up = [(a, b) for a, b in pairs if ROOMS.index(room(b)) > ROOMS.index(room(a)) and a != "dist_pca.files"]
    assert not up


def test_no_module_imports_itself_by_way_of_others() -> None:
    graph: dict[str, set[str]] = {}
    for module, imported in imports():
        if module != imported:
            graph.setdefault(module, set()).add(imported)
    assert len(list(TopologicalSorter(graph).static_order())) > 100
