from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from dist_pca.errors import UserError
from dist_pca.evaluation.image_files import find_images, result_names


def image(path: Path, mode: str = "RGB", size: tuple[int, int] = (6, 4)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size).save(path)
    return path


def test_files_folders_and_globs_are_found_each_file_once(tmp_path: Path) -> None:
    first, second = image(tmp_path / "a" / "2.png"), image(tmp_path / "a" / "deep" / "1.JPG")
    odd = image(tmp_path / "b" / "3.png").rename(tmp_path / "b" / "named.odd")
    image(tmp_path / "a" / ".hidden" / "4.png")
    (tmp_path / "a" / "notes.txt").write_text("x")
    sources = [str(odd), f"{tmp_path}/a", f"{tmp_path}/**/*.png", str(first)]
    assert find_images(sources, tmp_path / "out").images == (odd, first, second)


def test_globs_keep_to_images_and_what_is_passed_over_is_counted(tmp_path: Path) -> None:
    first, second = image(tmp_path / "a" / "1.png"), image(tmp_path / "a" / "b" / "2.gif", "P")
    image(tmp_path / "a" / ".ipynb_checkpoints" / "1.png")
    image(tmp_path / "a" / "._1.png")
    (tmp_path / "a" / "classes.yaml").write_text("[]")
    (tmp_path / "a" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    for source in (f"{tmp_path}/a/**", f"{tmp_path}/a"):
        found = find_images([source], tmp_path / "out")
        assert found.images == (first, second)
        assert {reason: len(paths) for reason, paths in found.passed_over.items()} == {
            ".yaml file": 1,
            "link to nothing": 1,
        }


def test_a_folder_of_files_that_cannot_be_read_says_which(tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / f"{number}.heic").touch()
    with pytest.raises(UserError, match=r"no image there \(passed over: 3 \.heic file \(.*0\.heic, \.\.\.\)\)"):
        find_images([str(tmp_path)], tmp_path / "out")


def test_results_of_an_earlier_call_are_not_taken_for_images(tmp_path: Path) -> None:
    first = image(tmp_path / "1.png")
    image(tmp_path / "out" / "overlays" / "1.png")
    assert find_images([str(tmp_path)], tmp_path / "out").images == (first,)


@pytest.mark.parametrize("source", ["nowhere.png", "empty", "*.jpg"])
def test_what_means_no_image_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=f"^{source.replace('*', '[*]')}: no "):
        find_images([source], tmp_path / "out")


def test_names_are_paths_below_the_shared_folder(tmp_path: Path) -> None:
    names = result_names([tmp_path / "a" / "1.png", tmp_path / "b" / "1.png"])
    assert list(names.values()) == ["a/1", "b/1"]
    assert list(result_names([tmp_path / "a" / "1.v2.png"]).values()) == ["1.v2"]


def test_extensions_are_kept_where_they_tell_two_apart(tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("1.png", "1.jpg", "2.png")]
    assert list(result_names(files).values()) == ["1.png", "1.jpg", "2"]


parts = st.sampled_from(["a", "A", "1", "1.png", "1.png-2", "x"])
paths = st.builds(
    lambda folders, ext: Path("/d", *folders).with_name(folders[-1] + ext),
    st.lists(parts, min_size=1),
    st.sampled_from([".png", ".jpg", ".PNG", ""]),
)


@given(st.lists(paths, min_size=1, max_size=12, unique=True))
def test_no_two_names_are_the_same_on_any_file_system(files: list[Path]) -> None:
    names = result_names(files)
    assert list(names) == files
    assert len({name.casefold() for name in names.values()}) == len(files)
    assert not any(name.startswith("/") or ".." in Path(name).parts for name in names.values())
