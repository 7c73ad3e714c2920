"""Old names of keys and fields: they still work, a line names the new one, and nothing is given by both."""

import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from dist_pca.config import RunConfig, load_config, save_config, validate_config
from dist_pca.config.aliases import KEY_ALIASES, METRIC_ALIASES, PHASE_ALIASES, KeyAlias, rename_keys, rename_metrics
from dist_pca.errors import UserError
from dist_pca.tools.study.design import Variant, build_study
from dist_pca.tools.study.training import refuse_changed_settings
from dist_pca.training.metrics import METRICS, PHASES

BASE: dict[str, Any] = {
    "name": "any",
    "data": {"source": "a", "target": "b", "shorter_edge": [8, 8], "crop": [8, 8]},
    "model": {"backbone": "test_resnet"},
    "training": {"steps": 3},
}
VALUES: dict[str, list[Any]] = {
    "objective.association.exchange": ["auto", "gather", "ring"],
    "objective.association.wire_dtype": ["fp32", "bf16"],
    "objective.association.position_budget": [None, 7, 4096],
    "objective.association.position_sampling": ["grid", "balanced"],
    "training.accumulation_pool": ["micro_batch", "update"],
    "training.max_bad_steps": [1, 9],
}
"""Values that are not all the default, by old key."""
every_alias = pytest.mark.parametrize("alias", KEY_ALIASES, ids=lambda alias: alias.old)
given_keys = st.fixed_dictionaries({}, optional={key: st.sampled_from(values) for key, values in VALUES.items()})


def nested(values: dict[str, Any]) -> dict[str, Any]:
    """The base config with values by dotted key."""
    tree = copy.deepcopy(BASE)
    for key, value in values.items():
        *sections, last = key.split(".")
        inner = tree
        for section in sections:
            inner = inner.setdefault(section, {})
        inner[last] = value
    return tree


def written(folder: Path, values: dict[str, Any]) -> Path:
    file = folder / "run.yaml"
    file.write_text(yaml.safe_dump(nested(values)))
    return file


def overrides(values: dict[str, Any]) -> list[str]:
    return [f"{key}={json.dumps(value)}" for key, value in values.items()]


def in_new_words(values: dict[str, Any]) -> dict[str, Any]:
    aliases = {alias.old: alias for alias in KEY_ALIASES}
    return {aliases[key].new: aliases[key].values.get(value, value) for key, value in values.items()}


def value_of(config: RunConfig, key: str) -> Any:
    found: Any = config
    for part in key.split("."):
        found = getattr(found, part)
    return found


def test_every_alias_has_values_to_try_and_names_a_key_that_there_is() -> None:
    assert VALUES.keys() == {alias.old for alias in KEY_ALIASES}
    config = validate_config(nested({}), "here")
    for alias in KEY_ALIASES:
        value_of(config, alias.new)
        with pytest.raises(AttributeError):
            value_of(config, alias.old)


@every_alias
def test_an_old_key_means_what_the_new_one_means_in_a_file_and_in_an_override(tmp_path: Path, alias: KeyAlias) -> None:
    seen = set()
    for value in VALUES[alias.old]:
        old, new = {alias.old: value}, in_new_words({alias.old: value})
        expected = load_config(written(tmp_path, new))
        assert load_config(written(tmp_path, old)) == expected
        assert load_config(written(tmp_path, {}), overrides(old)) == expected
        assert load_config(written(tmp_path, {}), overrides(new)) == expected
        assert validate_config(nested(old), "here") == expected
        seen.add(value_of(expected, alias.new))
    assert len(seen) == len(VALUES[alias.old])


@every_alias
def test_an_override_wins_over_a_file_that_has_the_other_name(tmp_path: Path, alias: KeyAlias) -> None:
    first, last = ({alias.old: VALUES[alias.old][index]} for index in (0, -1))
    expected = load_config(written(tmp_path, in_new_words(last)))
    assert load_config(written(tmp_path, first), overrides(in_new_words(last))) == expected
    assert load_config(written(tmp_path, in_new_words(first)), overrides(last)) == expected


@every_alias
@pytest.mark.parametrize("place", ["file", "overrides", "values"])
def test_a_key_under_both_names_is_refused_and_both_are_named(tmp_path: Path, alias: KeyAlias, place: str) -> None:
    value = VALUES[alias.old][0]
    both = {alias.old: value, **in_new_words({alias.old: value})}
    read: dict[str, Callable[[], RunConfig]] = {
        "file": lambda: load_config(written(tmp_path, both)),
        "overrides": lambda: load_config(written(tmp_path, {}), overrides(both)),
        "values": lambda: validate_config(nested(both), "here"),
    }
    with pytest.raises(UserError) as refused:
        read[place]()
    message = str(refused.value)
    assert alias.old in message
    assert alias.new in message
    assert "\n" not in message


@given(values=given_keys)
def test_any_mixture_of_old_keys_is_the_config_of_the_new_ones(values: dict[str, Any]) -> None:
    old, new = nested(values), nested(in_new_words(values))
    untouched = copy.deepcopy(old)
    assert rename_keys(old, "here") == new
    assert old == untouched
    assert rename_keys(new, "here") == new
    assert validate_config(old, "here") == validate_config(new, "here")


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(
            st.sampled_from(["objective", "association", "training", "steps", "weight"]), inner, max_size=3
        )
    ),
    max_leaves=8,
)


@given(values=anything)
def test_what_has_no_old_key_stays_as_it_is(values: Any) -> None:
    assert rename_keys(values, "here") == values


@pytest.mark.parametrize("wrong", ["objective.association.exchang=ring", "training.accumulation_pol=update"])
def test_an_unknown_key_is_answered_with_new_names_alone(tmp_path: Path, wrong: str) -> None:
    with pytest.raises(UserError, match="unknown key; the nearest is") as refused:
        load_config(written(tmp_path, {}), [wrong])
    suggested = str(refused.value).rpartition("the nearest is ")[2]
    assert suggested not in VALUES
    value_of(load_config(written(tmp_path, {})), suggested)


def test_a_wrong_value_of_an_old_key_is_refused_under_its_new_name(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"training\.grad_cache: .*got 'world'"):
        load_config(written(tmp_path, {"training.accumulation_pool": "world"}))


LOAD = "import sys; from pathlib import Path; from dist_pca.config import load_config; file = Path(sys.argv[1])"


@pytest.mark.parametrize("rank", [None, "0", "1"])
def test_each_old_key_is_one_line_on_stderr_once_and_on_rank_0_alone(tmp_path: Path, rank: str | None) -> None:
    file = written(tmp_path, {key: values[-1] for key, values in VALUES.items()})
    environment = {key: value for key, value in os.environ.items() if key != "RANK"}
    script = f"{LOAD}; load_config(file); load_config(file, sys.argv[2:])"
    done = subprocess.run(
        [sys.executable, "-c", script, str(file), "objective.association.exchange=gather"],
        env=environment | ({} if rank is None else {"RANK": rank}),
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    assert len(lines) == (0 if rank == "1" else len(KEY_ALIASES))
    for alias, line in zip(KEY_ALIASES, lines, strict=False):
        assert line.startswith(f"config {file}: {alias.old}")
        assert alias.new in line
        assert "0.3" in line


def test_a_config_without_old_names_warns_of_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    load_config(written(tmp_path, in_new_words({key: values[-1] for key, values in VALUES.items()})))
    assert caplog.messages == []


def test_a_study_of_the_old_names_is_that_of_the_new_ones(tmp_path: Path) -> None:
    file = written(tmp_path, {})
    old = build_study(
        str(file),
        out=tmp_path / "study",
        tests=["shards"],
        variants=[Variant("a", ("training.max_bad_steps=7",))],
        grid={"objective.association.exchange": ["ring", "gather"]},
        settings=["objective.association.wire_dtype=bf16"],
    )
    for run, communication in zip(old.runs, ("ring", "gather"), strict=False):
        config = old.resolve(run)
        assert config.objective.association.communication == communication
        assert config.objective.association.comm_dtype == "bf16"
        assert config.training.max_non_finite_steps == 7
        # What the version before has started under these names goes on.
        run.folder.mkdir(parents=True)
        save_config(config, run.folder / "config.yaml")
        saved: Any = OmegaConf.to_container(OmegaConf.load(run.folder / "config.yaml"))
        saved["objective"]["association"]["exchange"] = saved["objective"]["association"].pop("communication")
        (run.folder / "config.yaml").write_text(yaml.safe_dump(saved))
    refuse_changed_settings(old)


def test_metrics_have_new_names_and_the_same_values() -> None:
    record = {name: float(number) for number, name in enumerate(METRIC_ALIASES)}
    line = {"step": 3, **record, "seconds": {"data": 1.0, "exchange": 2.0}}
    renamed = rename_metrics(line)
    assert renamed == {
        "step": 3,
        **{METRIC_ALIASES[name]: value for name, value in record.items()},
        "seconds": {"data": 1.0, "communication": 2.0},
    }
    assert rename_metrics(renamed) == renamed
    documented = {name.replace("LEVEL", level) for name in METRICS for level in ("features", "predictions")}
    assert set(METRIC_ALIASES.values()) <= documented
    assert not METRIC_ALIASES.keys() & documented
    assert set(PHASE_ALIASES.values()) <= set(PHASES)
