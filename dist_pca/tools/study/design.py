"""The design of a study: its variants and seeds, from the command line or a YAML file, and the runs they make."""

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import product
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import yaml
from pydantic import BeforeValidator, ValidationError

from dist_pca.config import RunConfig
from dist_pca.config.section import NonNegative, Section
from dist_pca.errors import UserError, explain, nearest
from dist_pca.files import write_whole
from dist_pca.train import resolve_config

SEEDS = (0, 1, 2)
"""Seeds of a study that names none."""
_OWN_KEYS = {"name": "a run is called by its variant and seed", "output": "use --out", "seed": "use --seeds"}
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.,=+-]{0,119}")


class Variant(NamedTuple):
    """One setting that is compared."""

    name: str
    overrides: tuple[str, ...]
    """`key=value`s."""


class PlannedRun(NamedTuple):
    """One variant under one seed."""

    variant: str
    seed: int
    overrides: tuple[str, ...]
    """All `key=value`s of the run, its folder's too."""
    folder: Path


class Study(NamedTuple):
    """A comparison of variants over seeds."""

    config: str
    """A YAML file or a shipped config's name."""
    out: Path
    seeds: tuple[int, ...]
    variants: tuple[Variant, ...]
    settings: tuple[str, ...]
    """`key=value`s of all runs; those of a variant win over them."""
    tests: tuple[str, ...]
    """Labelled shard folders or URLs to score on."""
    baseline: str
    """Name of the variant that the others are compared with."""

    @property
    def runs(self) -> list[PlannedRun]:
        """All runs, seed by seed, so that a study which is cut short has compared all variants under some seeds."""
        return [self._run(variant, seed) for seed in self.seeds for variant in self.variants]

    def resolve(self, run: PlannedRun) -> RunConfig:
        """The config of one of the runs.

        Raises:
            UserError: it is not valid, or YAML reads the path of the study otherwise than it is written.
        """
        config = _resolved(self.config, run.overrides)
        if config.folder != run.folder:
            raise UserError(f"--out {self.out}: reads as {config.output} in YAML; choose a path without : # ' or \"")
        return config

    def _run(self, variant: Variant, seed: int) -> PlannedRun:
        name, parent = f"{variant.name}-seed{seed}", self.out / "runs"
        own = (f"seed={seed}", f"name={name}", f"output={parent}")
        return PlannedRun(variant.name, seed, (*self.settings, *variant.overrides, *own), parent / name)


def _overrides(value: object) -> object:
    """`key=value`s of a mapping; a list of them is left as it is."""
    if isinstance(value, Mapping):
        return tuple(f"{key}={value_text(part)}" for key, part in value.items())
    return () if value is None else value


Overrides = Annotated[tuple[str, ...], BeforeValidator(_overrides)]


class StudyFile(Section):
    """What a study's YAML file may hold."""

    config: str
    """A YAML file, also one beside this file, or a shipped config's name."""
    variants: dict[str, Overrides] = {}
    """Overrides by name of the variant: a mapping of dotted keys to values, a list of `key=value`s, or nothing."""
    grid: dict[str, tuple[Any, ...]] = {}
    """Values by dotted key; each variant is crossed with their product."""
    seeds: tuple[NonNegative, ...] = SEEDS
    set: Overrides = ()
    """Overrides of all runs."""
    test: Annotated[tuple[str, ...], BeforeValidator(lambda value: (value,) if isinstance(value, str) else value)] = ()
    """Labelled shards to score on."""
    baseline: str | None = None
    """Variant that the others are compared with; None takes the first."""
    out: str | None = None
    """Folder of the study; None is studies/NAME."""


def is_study_file(path: Path) -> bool:
    """Whether a YAML file describes a study: it has the key `config`, which no run has."""
    if path.suffix not in (".yaml", ".yml") or not path.is_file():
        return False
    try:
        return "config" in yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, TypeError, ValueError):
        return False


def read_study_file(path: Path) -> StudyFile:
    """Read a study's YAML file.

    Raises:
        UserError: a key is unknown (the nearest is named) or a value has the wrong type.
    """
    try:
        file = StudyFile.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except ValidationError as error:
        raise UserError(f"study {path}: {explain(error.errors(), StudyFile.model_fields)}") from None
    beside = path.parent / file.config
    return file.model_copy(update={"config": str(beside)}) if beside.is_file() else file


def value_text(value: object) -> str:
    """A YAML value as it is written after `key=`."""
    if isinstance(value, str):
        try:
            # As it is where it reads as the same string, also 1e-4, which only some YAML readers take for a number.
            return value if value and yaml.safe_load(value) == value else json.dumps(value)
        except yaml.YAMLError:
            return json.dumps(value)
    return json.dumps(value)


def split_values(written: str) -> list[str]:
    """Split `a,b,c` at the commas between YAML values, not at those in brackets or quotes.

    Raises:
        UserError: a value is empty, or a bracket or quote is not closed.
    """
    try:
        parts = yaml.compose(f"[{written}]", yaml.SafeLoader).value  # type: ignore[union-attr]
    except yaml.YAMLError as error:
        problem = getattr(error, "problem", None) or str(error)
        raise UserError(f"{written}: {problem}; write YAML values with commas between them") from None
    # Marks count from the bracket put before.
    values = [written[part.start_mark.index - 1 : part.end_mark.index - 1] for part in parts]
    if not values:
        raise UserError(f"{written}: no value; write values with commas between them, for example 0,0.01")
    return values


def parse_grid(written: Sequence[str]) -> dict[str, list[str]]:
    """Values by key of `key=a,b` axes, in the order in which they stand.

    Raises:
        UserError: an axis has no key, is there twice, or its values cannot be split.
    """
    grid: dict[str, list[str]] = {}
    for axis in written:
        key, equals, values = axis.partition("=")
        if not equals or not key:
            raise UserError(f"--grid {axis}: write key=a,b, for example objective.association.weight=0,0.01")
        if key in grid:
            raise UserError(f"--grid {key}: is there twice; write all of its values after one")
        try:
            grid[key] = split_values(values)
        except UserError as error:
            raise UserError(f"--grid {key}={error}") from None
    return grid


def parse_variant(written: str) -> Variant:
    """A variant of `NAME: key=value key=value`; quotes hold a value with spaces together.

    Raises:
        UserError: it is written otherwise.
    """
    name, colon, rest = written.partition(":")
    try:
        overrides = tuple(shlex.split(rest))
    except ValueError as error:
        raise UserError(f"--variant {written!r}: {error}; close the quote") from None
    if not colon or "=" in name or not all("=" in override for override in overrides):
        raise UserError(f"--variant {written!r}: write NAME: key=value key=value, or NAME: for the config as it is")
    return Variant(name.strip(), overrides)


def parse_seeds(written: str) -> tuple[int, ...]:
    """Seeds of `0,1,2`.

    Raises:
        UserError: they are not whole numbers.
    """
    if not re.fullmatch(r"\d+( *, *\d+)*", written.strip()):
        raise UserError(f"--seeds {written}: write whole numbers with commas between them, for example 0,1,2")
    return tuple(map(int, written.split(",")))


def build_study(
    config: str,
    *,
    out: Path,
    tests: Sequence[str],
    seeds: Sequence[int] = SEEDS,
    variants: Sequence[Variant] = (),
    grid: Mapping[str, Sequence[str]] | None = None,
    settings: Sequence[str] = (),
    baseline: str | None = None,
) -> Study:
    """A study whose variants are crossed with its grid, and whose every run has a valid config and a folder of its own.

    Args:
        config: A YAML file or a shipped config's name.
        out: Folder of the study.
        tests: Labelled shards to score on.
        seeds: Seeds of each variant.
        variants: Named settings; none is the config as it is.
        grid: Values by dotted key, as they are written after `key=`.
        settings: `key=value`s of all runs.
        baseline: Variant that the others are compared with; None takes the first.

    Raises:
        UserError: names or seeds collide, a key is the study's own or not valid, or there is nothing to score on.
    """
    grid = grid or {}
    if not tests:
        raise UserError("--test: no shards to score on; name a folder of labelled shards")
    if len(set(seeds)) < len(seeds) or not seeds:
        raise UserError(f"--seeds {','.join(map(str, seeds))}: name each seed once, and at least one")
    given = {"--set": settings, "--grid": [f"{key}=" for key in grid]}
    given |= {f"--variant {variant.name}": variant.overrides for variant in variants}
    for option, overrides in given.items():
        for override in overrides:
            key = override.partition("=")[0]
            if key in _OWN_KEYS:
                raise UserError(f"{option} {key}: is the study's own; {_OWN_KEYS[key]}")
            if key in grid and option not in ("--set", "--grid"):
                raise UserError(f"{option} {key}: is in --grid too; leave it out of one of them")
    crossed = tuple(_crossed(variants, grid) or [Variant(Path(config).stem, ())])
    names = [variant.name for variant in crossed]
    for name in names:
        if not _NAME.fullmatch(name):
            raise UserError(
                f"variant {name!r}: not the name of a folder; give a short one of letters, digits and _.,=+- with "
                "--variant 'NAME: key=value'"
            )
        if names.count(name) > 1:
            raise UserError(f"variant {name}: there are two of that name; give them names with --variant 'NAME: ...'")
    if baseline is not None and baseline not in names:
        raise UserError(
            f"--baseline {baseline}: no such variant; the nearest is {nearest(baseline, names)}, "
            f"all are {', '.join(names)}"
        )
    tests = tuple(dict.fromkeys(tests))
    study = Study(config, out, tuple(seeds), crossed, tuple(settings), tests, baseline or names[0])
    for run in study.runs[: len(crossed)]:
        study.resolve(run)
    return study


def save_study(study: Study) -> Path:
    """Write the design as `study.yaml` into the study's folder; `dist-pca study` takes that file too."""
    content = {
        "config": study.config,
        "out": str(study.out),
        "seeds": list(study.seeds),
        "test": list(study.tests),
        "baseline": study.baseline,
        "set": list(study.settings),
        "variants": {variant.name: list(variant.overrides) for variant in study.variants},
    }
    study.out.mkdir(parents=True, exist_ok=True)
    path = study.out / "study.yaml"
    write_whole(path, yaml.safe_dump(content, sort_keys=False, width=120))
    return path


@cache
def _resolved(config: str, overrides: tuple[str, ...]) -> RunConfig:
    """A run's config, read once: a study asks for each several times."""
    return resolve_config(config, list(overrides))


def _crossed(variants: Sequence[Variant], grid: Mapping[str, Sequence[str]]) -> list[Variant]:
    last = [key.rpartition(".")[2] for key in grid]
    short = [name if last.count(name) == 1 else key for name, key in zip(last, grid, strict=True)]
    crossed = []
    for variant in variants or [Variant("", ())]:
        for values in product(*grid.values()):
            parts = [f"{name}={_label(value)}" for name, value in zip(short, values, strict=True)]
            name = ",".join(([variant.name] if variant.name else []) + parts)
            overrides = tuple(f"{key}={value}" for key, value in zip(grid, values, strict=True))
            if variants or grid:
                crossed.append(Variant(name, (*variant.overrides, *overrides)))
    return crossed


def _label(value: str) -> str:
    """A value as part of a folder's name."""
    return re.sub(r"[^A-Za-z0-9_.+-]+", "_", value).strip("_") or "empty"
