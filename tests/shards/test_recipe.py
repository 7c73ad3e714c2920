from pathlib import Path

import pytest
from pydantic import ValidationError

from dist_pca.classes import LABEL_SETS
from dist_pca.errors import UserError
from dist_pca.resources import names
from dist_pca.shards.images import ValueRange
from dist_pca.shards.recipe import Recipe, Split, load_recipe

RECIPE = """
name: mine
version: 1
classes:
  - {name: road, color: [1, 2, 3]}
  - {name: sky, color: [4, 5, 6]}
coding:
  kind: index
  ids: {7: road, 8: sky, 9: ignore}
splits:
  all:
    images: ['*.png']
    label: {match: '(.+)\\.png', replace: '\\1_label.png'}
"""


def _write(folder: Path, text: str) -> Path:
    path = folder / "mine.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("name", names("shards"))
def test_shipped_recipes_load_and_bear_their_file_name(name: str) -> None:
    assert load_recipe(name).name == name


@pytest.mark.parametrize(
    ("name", "label_set"),
    [
        ("gta5", "cityscapes_19"),
        ("cityscapes", "cityscapes_19"),
        ("kitti", "cityscapes_19"),
        ("synthia", "synthia_16"),
    ],
)
def test_every_class_of_a_label_set_has_exactly_one_raw_id(name: str, label_set: str) -> None:
    assert sorted(load_recipe(name).coding.class_names) == sorted(LABEL_SETS[label_set])


def test_a_recipe_is_read_from_a_path(tmp_path: Path) -> None:
    recipe = load_recipe(_write(tmp_path, RECIPE))
    assert [info.name for info in recipe.class_table(tmp_path)] == ["road", "sky"]


def test_an_unknown_recipe_names_the_nearest() -> None:
    with pytest.raises(UserError, match="nearest is cityscapes"):
        load_recipe("cityscape")


def test_a_missing_recipe_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"mine\.yaml: no such file"):
        load_recipe(tmp_path / "mine.yaml")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("replace:", "replase:", r"splits\.all\.label\.replase: unknown key; the nearest is splits.all.label.replace"),
        ("color: [1", "colour: [1", r"classes\.0\.colour: unknown key; the nearest is classes.0.color"),
        ("kind: index", "kind: indices", r"coding\.kind: .*'indices'"),
        ("version: 1", "", "version: required and missing"),
        ("version: 1", "version: one", "version: .*got 'one'"),
        ("8: sky", "8: skie", "no class 'skie'; the nearest is 'sky'"),
        ("8: sky", "7: sky", "duplicate key 7"),
        ("8: sky", "70000: sky", "70000 does not fit in 16 bits"),
        ("{name: sky", "{name: road", "'road' is listed twice"),
        ("[1, 2, 3]", "[1, 2, 300]", r"classes\.0\.color\.2: .*got 300"),
        ("kind: index", "kind: color", "kind `color` takes its table from `colors`"),
        ("(.+)", "(.+", r"splits\.all\.label\.match: not a regular expression"),
        ("classes:", "label_set: cityscapes_19\nclasses:", "give one of label_set, classes and classes_file"),
        ("name: mine", "name: [mine", "not readable as YAML"),
        ("7: road", "[7]: road", "not readable as YAML .*unhashable key"),
        ("[1, 2, 3]", "[" * 1000, "not readable as YAML .*recursion"),
    ],
)
def test_a_faulty_recipe_is_refused_with_file_and_key(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in RECIPE
    with pytest.raises(UserError, match=message) as caught:
        load_recipe(_write(tmp_path, RECIPE.replace(old, new, 1)))
    assert "mine.yaml" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_no_recipe_is_refused_with_what_it_holds(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"mine\.yaml: expected a table of keys and values, got nothing"):
        load_recipe(_write(tmp_path, "# nothing yet"))


def test_an_unknown_label_set_names_the_nearest(tmp_path: Path) -> None:
    text = RECIPE[: RECIPE.index("classes:")] + "label_set: cityscape19\n" + RECIPE[RECIPE.index("coding:") :]
    with pytest.raises(UserError, match="no set 'cityscape19'; the nearest is cityscapes_19"):
        load_recipe(_write(tmp_path, text))


def test_the_only_split_needs_no_name_and_several_do() -> None:
    assert load_recipe("gta5").split(None) == "all"
    with pytest.raises(UserError, match="splits, train, val, test; choose one with --split"):
        load_recipe("cityscapes").split(None)
    with pytest.raises(UserError, match="no split 'vall'; the nearest is val"):
        load_recipe("cityscapes").split("vall")


def test_a_missing_class_table_says_what_to_write(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"classes\.yaml: no such file; write the class table there"):
        load_recipe("folder").class_table(tmp_path)
    assert load_recipe("folder").class_table(tmp_path, required=False) == ()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- {name: a}", r"classes\.yaml: 0\.color: required and missing"),
        ("- {name: a, color: [0, 0, 0]}\n- {name: a, color: [1, 1, 1]}", "'a' is listed twice"),
        ("[]", "0 classes where 1 to 254 can be"),
    ],
)
def test_a_faulty_class_table_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "classes.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        load_recipe("folder").class_table(tmp_path)


@pytest.mark.parametrize("pattern", ["/data/*", "", ".", "./", "../*.png", "a/../../b", "a\0b", "a\nb"])
def test_a_glob_that_is_none_below_the_root_is_refused(pattern: str) -> None:
    with pytest.raises(ValidationError, match="is no glob below the root"):
        Split(images=("images/*", pattern))


@pytest.mark.parametrize("bounds", [(1, 0), (1, 1), (0, float("inf")), (float("nan"), 1)])
def test_a_range_runs_from_a_lower_number_to_a_higher_one(bounds: tuple[float, float]) -> None:
    recipe = load_recipe("folder").model_dump()
    with pytest.raises(ValidationError, match="give two numbers, the lower one first"):
        Recipe.model_validate(recipe | {"range": bounds})
    values = Recipe.model_validate(recipe | {"range": (0, 4095), "clip": True}).reading.values
    assert values == (ValueRange(0, 4095, clip=True),)
