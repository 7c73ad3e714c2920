import json
import shlex
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from dist_pca.config import load_config
from dist_pca.errors import UserError
from dist_pca.resources import resource
from dist_pca.tools.study.design import (
    Study,
    Variant,
    build_study,
    is_study_file,
    parse_grid,
    parse_seeds,
    parse_variant,
    read_study_file,
    save_study,
    split_values,
    value_text,
)

words = st.text(st.characters(codec="ascii", categories=["L"]), min_size=1, max_size=5)
scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | words
awkward = st.text(st.sampled_from(list("ab,:[]{}'\"# -")), max_size=6)
trees = st.recursive(
    scalars | awkward, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=2)
)
keys = st.sampled_from(["optimizer.lr", "training.log_every", "objective.association.ramp_steps"])


@given(st.lists(trees, min_size=1, max_size=4))
def test_values_are_split_at_the_commas_between_them_alone(values: list[object]) -> None:
    texts = [json.dumps(value) for value in values]
    assert split_values(",".join(texts)) == [text.strip() for text in texts]


@given(trees)
def test_a_values_text_reads_as_the_value(value: object) -> None:
    assert OmegaConf.to_container(OmegaConf.from_dotlist([f"key={value_text(value)}"])) == {"key": value}


@pytest.mark.parametrize("written", [",", "1,,2", "[1,2", "1]", "'a", "{a: 1", "a #b"])
def test_values_that_cannot_be_split_are_refused(written: str) -> None:
    with pytest.raises(UserError, match="values with commas between them"):
        split_values(written)


def test_a_quote_inside_a_word_is_a_character() -> None:
    assert split_values("it's,that's") == ["it's", "that's"]


@settings(max_examples=15)
@given(st.dictionaries(keys, st.lists(st.integers(1, 9), min_size=1, max_size=2, unique=True), min_size=1))
def test_a_grid_makes_every_combination_once(grid: dict[str, list[int]]) -> None:
    written = [f"{key}={','.join(map(str, values))}" for key, values in grid.items()]
    made = build("out", grid=parse_grid(written))
    combinations = {variant.overrides for variant in made.variants}
    count = 1
    for values in grid.values():
        count *= len(values)
    assert len(combinations) == len(made.variants) == count
    assert len({run.folder for run in made.runs}) == count * len(made.seeds)
    for variant in made.variants:
        assert [override.partition("=")[0] for override in variant.overrides] == list(grid)
        for override in variant.overrides:
            key, _, value = override.partition("=")
            assert int(value) in grid[key]


@given(words, st.dictionaries(keys, words | st.just("a b, [c]"), max_size=3))
def test_a_variant_is_read_as_it_was_written(name: str, overrides: dict[str, str]) -> None:
    words = tuple(f"{key}={value}" for key, value in overrides.items())
    assert parse_variant(f"{name}: {shlex.join(words)}") == Variant(name, words)


@pytest.mark.parametrize("written", ["name", "a=b", "a: b", "optimizer.lr=1: 2", "a: b='c"])
def test_what_is_no_variant_is_refused(written: str) -> None:
    with pytest.raises(UserError, match="--variant"):
        parse_variant(written)


def test_seeds_are_whole_numbers() -> None:
    assert parse_seeds("3, 1,0") == (3, 1, 0)
    for written in ("", "a", "1,", "-1", "1.5"):
        with pytest.raises(UserError, match="--seeds"):
            parse_seeds(written)


def build(out: str, **keys: object) -> Study:
    return build_study("demo", out=Path(out), tests=("t",), **keys)  # type: ignore[arg-type]


def test_variants_are_crossed_with_the_grid_and_a_config_alone_is_one_variant() -> None:
    crossed = build(
        "out",
        variants=[Variant("a", ()), Variant("b", ("data.flip=0",))],
        grid={"optimizer.lr": ["1e-4", "3e-4"], "data.crop": ["[64, 96]"]},
    )
    assert [variant.name for variant in crossed.variants] == [
        *("a,lr=1e-4,crop=64_96", "a,lr=3e-4,crop=64_96", "b,lr=1e-4,crop=64_96", "b,lr=3e-4,crop=64_96")
    ]
    last = crossed.runs[-1]
    config = crossed.resolve(last)
    assert (config.optimizer.lr, config.data.crop, config.data.flip, config.seed) == (3e-4, (64, 96), 0.0, 2)
    assert config.folder == last.folder == Path("out/runs/b,lr=3e-4,crop=64_96-seed2")
    assert crossed.baseline == "a,lr=1e-4,crop=64_96"
    assert build("out").variants == (Variant("demo", ()),)


def test_a_variant_wins_over_what_all_runs_have() -> None:
    made = build(
        "out", settings=("optimizer.lr=1e-3",), variants=[Variant("a", ()), Variant("b", ("optimizer.lr=2e-3",))]
    )
    assert [made.resolve(run).optimizer.lr for run in made.runs[:2]] == [1e-3, 2e-3]


def test_keys_with_one_last_name_are_told_apart() -> None:
    made = build("out", grid={"objective.association.weight": ["0"], "objective.smoothness.weight": ["0"]})
    assert made.variants[0].name == "objective.association.weight=0,objective.smoothness.weight=0"


def test_seeds_come_one_after_another_and_each_has_all_variants() -> None:
    made = build("out", variants=[Variant("a", ()), Variant("b", ())], seeds=(5, 2))
    assert [(run.seed, run.variant) for run in made.runs] == [(5, "a"), (5, "b"), (2, "a"), (2, "b")]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"tests": ()}, "--test: no shards"),
        ({"seeds": (1, 1)}, "each seed once"),
        ({"settings": ("seed=3",)}, "--set seed: is the study's own; use --seeds"),
        ({"grid": {"name": ["a"]}}, "--grid name"),
        ({"variants": [Variant("a", ("output=b",))]}, "--variant a output"),
        ({"variants": [Variant("a", ("data.flip=0",))], "grid": {"data.flip": ["1"]}}, "is in --grid too"),
        ({"variants": [Variant("a", ()), Variant("a", ())]}, "two of that name"),
        ({"grid": {"data.flip": ["0", "'0'"]}}, "two of that name"),
        ({"variants": [Variant("a/b", ())]}, "not the name of a folder"),
        ({"variants": [Variant("", ())]}, "not the name of a folder"),
        ({"baseline": "demos"}, "the nearest is demo"),
        ({"grid": {"training.step": ["1"]}}, "the nearest is training.steps"),
        ({"settings": ("training.steps",)}, "write key=value"),
        ({"out": Path("a: b")}, "reads as|config"),
    ],
)
def test_a_design_that_cannot_be_made_names_what_is_wrong(keys: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_study("demo", **({"out": Path("out"), "tests": ("t",)} | keys))  # type: ignore[arg-type]


@pytest.mark.parametrize("axes", [["a"], ["=1"], ["a=1", "a=2"], ["a=1,,"]])
def test_an_axis_that_cannot_be_read_is_refused(axes: list[str]) -> None:
    with pytest.raises(UserError, match="--grid"):
        parse_grid(axes)


def test_a_file_may_write_values_as_yaml_and_name_a_config_beside_it(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(resource("configs", "demo").read_text())
    path = tmp_path / "study.yaml"
    path.write_text(
        "config: mine.yaml\nvariants: {plain: , flipped: {data.flip: 1.0, data.crop: [64, 96]}, "
        "listed: [optimizer.lr=1e-5]}\ngrid: {optimizer.weight_decay: [1e-4, 0]}\nset: {training.steps: 3}\ntest: t\n"
    )
    assert is_study_file(path)
    assert not is_study_file(tmp_path / "mine.yaml")
    assert not is_study_file(tmp_path / "none.yaml")
    file = read_study_file(path)
    assert file.config == str(tmp_path / "mine.yaml")
    assert file.variants == {
        "plain": (),
        "flipped": ("data.flip=1.0", "data.crop=[64, 96]"),
        "listed": ("optimizer.lr=1e-5",),
    }
    assert (file.set, file.test, file.seeds) == (("training.steps=3",), ("t",), (0, 1, 2))
    assert [value_text(value) for value in file.grid["optimizer.weight_decay"]] == ["1e-4", "0"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("config: demo\nseed: [1]", "seed: unknown key; the nearest is seeds"),
        ("config: demo\nseeds: [a]", "seeds.0"),
        ("config: demo\ngrid: {a: 1}", "grid.a"),
    ],
)
def test_a_file_with_a_wrong_key_names_it(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "study.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        read_study_file(tmp_path / "study.yaml")


def test_a_saved_design_reads_as_the_same_runs(tmp_path: Path) -> None:
    made = build(
        str(tmp_path / "out"), variants=[Variant("a", ("data.classes=[road, sky]",)), Variant("b", ())], baseline="b"
    )
    file = read_study_file(save_study(made))
    again = build_study(
        file.config,
        out=Path(file.out or ""),
        tests=file.test,
        seeds=file.seeds,
        variants=[Variant(*pair) for pair in file.variants.items()],
        settings=file.set,
        baseline=file.baseline,
    )
    assert again == made


def test_every_shipped_config_can_be_studied() -> None:
    for name in ("demo", "camvid"):
        made = build_study(name, out=Path("out"), tests=("t",))
        assert made.resolve(made.runs[0]).model == load_config(resource("configs", name)).model
