"""The whole config of a run: read, validate, write."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, Field, ValidationError, model_validator
from typing_extensions import Self
from yaml import YAMLError

from dist_pca.config.aliases import rename_keys
from dist_pca.config.data import DataConfig
from dist_pca.config.evaluation import EvaluationConfig
from dist_pca.config.model import ModelConfig
from dist_pca.config.objective import ObjectiveConfig
from dist_pca.config.section import Section
from dist_pca.config.telemetry import TelemetryConfig
from dist_pca.config.training import BATCH_KEYS, OptimizerConfig, ScheduleConfig, TrainingConfig
from dist_pca.errors import UserError, explain, nearest
from dist_pca.files import write_whole
from dist_pca.resources import names as shipped_names


class RunConfig(Section):
    """The whole config of a run."""

    name: str
    """Name of the run, and of its folder in `output`."""
    output: str = "runs"
    """Parent of run folders; this run's folder is output/name."""
    seed: Annotated[int, Field(ge=0, lt=2**64)] = 0
    """Seed of initial weights, sample order and augmentation; below 2 ** 64, as PyTorch takes it."""
    data: DataConfig
    model: ModelConfig
    objective: ObjectiveConfig = ObjectiveConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    training: TrainingConfig
    evaluation: EvaluationConfig = EvaluationConfig()
    telemetry: TelemetryConfig = TelemetryConfig()

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.output) / self.name

    @property
    def batches(self) -> dict[str, int]:
        """Images per update of each domain that is trained on, by config key.

        Where they are given per rank, only after `dist_pca.training.accumulation.fit_batches`.
        """
        source, target = (f"training.{domain}_batch" for domain in ("source", "target"))
        adapted = {target: self.training.target_batch} if self.objective.adapt else {}
        return {source: self.training.source_batch, **adapted}

    def input_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the network's input at evaluation, for an image of this size.

        It is evaluation.input_size; or the aspect ratio is kept, and the shorter edge is the mean of
        data.shorter_edge.
        """
        if self.evaluation.input_size is not None:
            return self.evaluation.input_size
        scale = sum(self.data.shorter_edge) / 2 / min(height, width)
        return round(height * scale), round(width * scale)

    def unused_terms(self) -> list[str]:
        """Terms of the loss that are on and would start after the last step, as warnings that name the key."""
        objective, steps = self.objective, self.training.steps
        terms = {
            "association": objective.association.weight > 0,
            "self_training": objective.trains_on_pseudo_labels,
            "class_statistics": objective.class_statistics.weight > 0,
        }
        starts = {name: getattr(objective, name).start_step for name, on in terms.items() if on and objective.adapt}
        return [
            f"objective.{name}.start_step: {start} is not below training.steps {steps}, so the term never takes part; "
            f"lower it, for example to {steps // 2}"
            for name, start in starts.items()
            if start >= steps
        ]

    @model_validator(mode="after")
    def _check_combinations(self) -> Self:
        if self.objective.adapt and self.data.target is None:
            raise ValueError(
                "data.target: missing while objective.adapt is true; name a shard folder or set objective.adapt=false"
            )
        if self.data.source == () or self.data.target == ():
            raise ValueError("data.source and data.target: an empty list; name at least one shard folder")
        scope = self.objective.association.scope
        if self.objective.uses_teacher and self.training.ema_decay == 0:
            raise ValueError(
                "training.ema_decay: is 0, but objective.* needs a teacher, which is the average of the weights; "
                "set it, for example to 0.999"
            )
        pairs = {
            "objective.association.scope: `pair`": scope == "pair",
            "objective.self_training": self.objective.self_training.weight > 0,
            "data.sampling.pairing_window": self.data.sampling.pairing_window > 0,
        }
        training = self.training
        per_rank = (training.source_batch_per_rank, training.target_batch_per_rank)
        for key, pairing in pairs.items():
            if not self.objective.adapt or not pairing:
                continue
            if per_rank[0] != per_rank[1]:
                raise ValueError(
                    f"{key} needs training.source_batch_per_rank equal to training.target_batch_per_rank, "
                    f"got {' and '.join(str(batch or 'none') for batch in per_rank)}"
                )
            if per_rank[0] is None and training.source_batch != training.target_batch:
                raise ValueError(
                    f"{key} needs training.source_batch equal to training.target_batch, "
                    f"got {training.source_batch} and {training.target_batch}"
                )
        schedule = self.schedule
        horizon = schedule.horizon if schedule.name == "poly" else None
        if horizon is not None and horizon < self.training.steps and schedule.minimum == 0:
            raise ValueError(
                f"schedule.horizon: {horizon} is below training.steps {self.training.steps}, so that the last steps "
                "would have no learning rate; raise it, or set schedule.minimum too, for example to 0.1"
            )
        return self


def load_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a run's config from a YAML file and `key=value` overrides (dotted keys, YAML values; later ones win).

    Raises:
        UserError: the file is missing or not YAML, an override is malformed, a key is unknown (the nearest valid key
            is named), a value has the wrong type, values contradict each other, or a key is given by its old and its
            new name in the same place.
    """
    if not path.is_file():
        shipped = nearest(path.stem, shipped_names("configs"))
        raise UserError(
            f"config {path}: no such file; give the path of a YAML file, or the name of a config that comes with "
            f"dist-pca, the nearest is {shipped}"
        )
    for override in overrides:
        if "=" not in override:
            raise UserError(f"override {override!r}: write key=value, for example training.steps=100")
    try:
        parts = {f"config {path}": OmegaConf.load(path), "override": OmegaConf.from_dotlist(list(overrides))}
        # Each by itself: an override with a new name wins over a file with the old one.
        written, given = (rename_keys(OmegaConf.to_container(part), origin) for origin, part in parts.items())
        tree = OmegaConf.merge(_without_replaced(written, given), given)
        values = OmegaConf.to_container(tree, resolve=True)
    except AssertionError:
        raise UserError(f"config {path}: not a table of keys and values") from None
    except (OmegaConfBaseException, YAMLError, ValueError, TypeError, OSError, RecursionError) as error:
        raise UserError(f"config {path}: {' '.join(str(error).split())[:300]}") from error
    return validate_config(values, f"config {path}")


def validate_config(values: object, origin: str) -> RunConfig:
    """Validate nested dictionaries as a run's config.

    Raises:
        UserError: a value is wrong, as for `load_config`; the message begins with `origin`.
    """
    try:
        return RunConfig.model_validate(rename_keys(values, origin))
    except ValidationError as error:
        raise UserError(f"{origin}: {explain(error.errors(), _all_keys(RunConfig))}") from None


def save_config(config: RunConfig, path: Path) -> None:
    """Write the resolved config as YAML; `load_config` reads an equal config from it."""
    write_whole(path, OmegaConf.to_yaml(OmegaConf.create(config.model_dump(mode="json"))))


def _without_replaced(written: Any, given: Any) -> Any:
    """A file's keys without batches that overrides give in the other way: in all, or per rank."""
    training, overrides = (values.get("training") if isinstance(values, dict) else None for values in (written, given))
    if not isinstance(training, dict) or not isinstance(overrides, dict):
        return written
    pairs = [*BATCH_KEYS.items(), *((per_rank, in_all) for in_all, per_rank in BATCH_KEYS.items())]
    replaced = {other for key, other in pairs if overrides.get(key) is not None}
    return {**written, "training": {key: value for key, value in training.items() if key not in replaced}}


def _all_keys(section: type[BaseModel], prefix: str = "") -> list[str]:
    keys = []
    for name, field in section.model_fields.items():
        keys.append(prefix + name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            keys += _all_keys(field.annotation, f"{prefix}{name}.")
    return keys
