from pathlib import Path

import pytest

from dist_pca.shards.find import described, find_images
from tests.support.raw_data import random_image, save


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = tmp_path / "root"
    for name in ("a.png", "b/c.JPG", "b/d/e.webp"):
        save(random_image(0), root / name)
    return root


def found(root: Path, *patterns: str) -> list[str]:
    return [path.relative_to(root).as_posix() for path in find_images(root, patterns).images]


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("**/*", ["a.png", "b/c.JPG", "b/d/e.webp"]),
        ("**", ["a.png", "b/c.JPG", "b/d/e.webp"]),
        ("*.png", ["a.png"]),
        ("*/*", ["b/c.JPG"]),
        ("b/**/e.webp", ["b/d/e.webp"]),
        ("**/d/*", ["b/d/e.webp"]),
        ("b/?/*", ["b/d/e.webp"]),
        ("a.png", ["a.png"]),
        ("b", []),
        ("nowhere/*", []),
    ],
)
def test_globs_span_folders_as_in_pathlib(tree: Path, pattern: str, names: list[str]) -> None:
    assert found(tree, pattern) == names
    assert found(tree, pattern, pattern) == names


def test_linked_folders_are_followed_and_loops_end(tree: Path, tmp_path: Path) -> None:
    save(random_image(0), tmp_path / "elsewhere/f.png")
    (tree / "link").symlink_to(tmp_path / "elsewhere")
    (tree / "b/up").symlink_to(tree)
    (tree / "b/self").symlink_to("self")
    (tmp_path / "elsewhere/back").symlink_to(tree / "b")
    assert found(tree, "**/*") == [
        *("a.png", "b/c.JPG", "b/d/e.webp"),
        *("link/back/c.JPG", "link/back/d/e.webp", "link/f.png"),
    ]


def test_hidden_names_are_no_images(tree: Path) -> None:
    for name in ("._a.png", "b/.ipynb_checkpoints/c.png", ".cache/x.png"):
        save(random_image(0), tree / name)
    assert found(tree, "**/*", "*", ".*") == ["a.png", "b/c.JPG", "b/d/e.webp"]
    assert found(tree, ".cache/*") == [".cache/x.png"]


def test_what_is_passed_over_is_counted_by_reason_with_an_example(tree: Path) -> None:
    for name in ("x.heic", "b/y.heic", "notes"):
        (tree / name).touch()
    (tree / "gone.png").symlink_to("nowhere.png")
    result = find_images(tree, ["**/*"])
    assert described(result.passed_over, tree) == (
        "2 .heic file (b/y.heic, ...), 1 link to nothing (gone.png), 1 file without extension (notes)"
    )
    assert len(result.images) == 3
