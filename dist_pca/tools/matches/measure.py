"""The cycles of one checkpoint on given crops."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from dist_pca.config import Level, RunConfig
from dist_pca.data.collate import Batch
from dist_pca.errors import UserError
from dist_pca.evaluation.cycles import JudgedCycles, judge
from dist_pca.evaluation.load import find_checkpoint, load_run
from dist_pca.tools.matches.crops import look
from dist_pca.training.checkpoint import whole_checkpoints
from dist_pca.training.checkpoint_loading import has_ema

TEACHER_SWITCHES = ("teacher_check", "teacher_weight", "teacher_matches", "teacher_keys")


def find_checkpoints(run: Path, wanted: Sequence[str], *, all_checkpoints: bool) -> list[str]:
    """Names of the checkpoints of a run folder that are asked for, each once; the newest where none is.

    Raises:
        UserError: there is none, or not one of those wanted, or both ways of asking are used.
    """
    if not all_checkpoints:
        return list(dict.fromkeys(find_checkpoint(run, name).name for name in wanted or (None,)))
    if wanted:
        raise UserError("--all-checkpoints: takes the place of --checkpoint; leave one of them out")
    folder = find_checkpoint(run).parent
    return [path.name for path in whole_checkpoints(folder)]


def with_options(
    config: RunConfig,
    *,
    source: str | None = None,
    target: str | None = None,
    scope: str | None = None,
    diffusion: float | None = None,
    teacher: bool | None = None,
) -> RunConfig:
    """The run with options in the place of its own keys; None leaves a key. All pixels take part, from the start.

    Raises:
        UserError: a teacher is asked for, and the run has no use for one; or diffusion, which changes no match of it.
    """
    association = config.objective.association
    asked = any(getattr(association, switch) for switch in TEACHER_SWITCHES)
    if teacher and not asked:
        raise UserError(
            f"--teacher: the run's objective.association sets none of {', '.join(TEACHER_SWITCHES)}; leave it out"
        )
    # Ranks and nodes of training are not there: what is wider than a pair is all images of a batch.
    scope = scope or ("pair" if association.scope == "pair" else "world")
    # Whatever its weight in the loss, the term is looked at.
    keys: dict[str, Any] = {"pixel_budget": None, "weight": 1.0, "scope": scope}
    if diffusion is not None:
        keys["diffusion"] = diffusion
        if association.teacher_matches and teacher is not False:
            raise UserError(
                "--diffusion: changes no match of this run, where the teacher's features choose them; add --no-teacher"
            )
    if teacher is False:
        keys |= dict.fromkeys(TEACHER_SWITCHES, False)
    shards = {name: value for name, value in (("source", source), ("target", target)) if value is not None}
    objective = config.objective.model_copy(update={"association": association.model_copy(update=keys)})
    return config.model_copy(update={"data": config.data.model_copy(update=shards), "objective": objective})


def measure(
    run: Path,
    checkpoint: str,
    config: RunConfig,
    batches: Sequence[tuple[Batch, Batch]],
    *,
    level: Level | None = None,
    device: torch.device | str,
) -> dict[Level, list[list[JudgedCycles]]]:
    """Judge the cycles that a checkpoint finds: by level and batch, those of each candidate set.

    Args:
        run: The run folder.
        checkpoint: Name of one of its checkpoints.
        config: The run as `with_options` leaves it.
        batches: Labelled crops of source and target.
        level: The level to judge; None judges those of the run.
        device: Where networks run and pixels are matched.

    Raises:
        UserError: the checkpoint cannot be read, or has no moving average and the run asks it.
    """
    association = config.objective.association
    student = load_run(run, checkpoint, weights="trained")[2].to(device)
    teacher = None
    if association.uses_teacher:
        if not has_ema(run / "checkpoints" / checkpoint):
            raise UserError(f"{run}: {checkpoint} holds no moving average to be the teacher; add --no-teacher")
        teacher = load_run(run, checkpoint, weights="ema")[2].to(device)
    # The run's other level may weigh the classes of this one.
    levels: Sequence[Level] = association.levels if level is None else (level,)
    judged: dict[Level, list[list[JudgedCycles]]] = {level: [] for level in levels}
    for source, target in batches:
        seen = (
            look(config, student, teacher, source, "source", device),
            look(config, student, teacher, target, "target", device),
        )
        for name in levels:
            judged[name].append(judge(association, name, *seen))
    return judged
