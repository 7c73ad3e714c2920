"""Training and scoring the runs of a study on this machine, one after another."""

from collections.abc import Callable, Mapping

from dist_pca.config import load_config
from dist_pca.data.cache import cache_settings, open_manifest
from dist_pca.data.class_table import lookup_table
from dist_pca.errors import UserError
from dist_pca.resilience.exit_status import ExitCode, read_exit_status
from dist_pca.resilience.launch import launch, launch_command, quote_command
from dist_pca.shards.manifest import Manifest
from dist_pca.tools.study.design import PlannedRun, Study
from dist_pca.tools.study.scoring import score_newest
from dist_pca.training.prepare import prepare_run
from dist_pca.training.run_folder import config_differences, is_finished

FAILED = 1
"""Exit code of a study of which a run failed."""


def open_tests(study: Study) -> dict[str, Manifest]:
    """Manifests of the study's test shards, by the path or URL that names them.

    Raises:
        UserError: they cannot be read or have no labels.
    """
    cache = cache_settings(study.resolve(study.runs[0]).data.cache)
    manifests = {location: open_manifest(location, cache) for location in study.tests}
    for location, manifest in manifests.items():
        if not manifest.labelled:
            raise UserError(f"--test {location}: has no labels; give labelled shards")
    return manifests


def command_of(study: Study, run: PlannedRun, *, launcher: str | None, processes: int | None) -> list[str]:
    """The command that trains a run of a study on this machine.

    Raises:
        UserError: there is no such launcher.
    """
    stage = study.resolve(run).training.zero_stage
    return launch_command(study.config, run.overrides, launcher=launcher, processes=processes, zero_stage=stage)


def refuse_changed_settings(study: Study) -> None:
    """Make sure that what the study's folder holds are runs of this very study.

    Raises:
        UserError: a run has been started with other settings; every differing key is named.
    """
    for run in study.runs:
        made = run.folder / "config.yaml"
        if made.is_file() and (differing := config_differences(load_config(made), study.resolve(run))):
            raise UserError(
                f"{run.folder}: was started with other settings ({'; '.join(differing)}); choose another --out, or "
                "remove this folder to train the run again"
            )


def check_study(study: Study, manifests: Mapping[str, Manifest], *, world_size: int) -> None:
    """Refuse before anything is trained what cannot be trained or scored later.

    Raises:
        UserError: a run of the folder has other settings, a variant cannot start, or test shards lack its classes.
    """
    refuse_changed_settings(study)
    for run in study.runs[: len(study.variants)]:
        config = study.resolve(run)
        if not is_finished(config):
            plan = prepare_run(config, world_size=world_size, resume=None)
            for manifest in manifests.values():
                lookup_table(manifest, plan.classes)


def train_study(
    study: Study,
    manifests: Mapping[str, Manifest],
    *,
    launcher: str | None,
    processes: int | None,
    keep_going: bool,
    say: Callable[[str], None],
) -> int:
    """Train and score what is not there yet, one run after another.

    A stopped run resumes from its newest checkpoint. On a signal, the current run saves and the study ends.

    Args:
        study: The study.
        manifests: Its test shards, by location.
        launcher: As `launch_command` takes it.
        processes: As `launch_command` takes it.
        keep_going: Whether the runs after one that failed are made.
        say: Prints a line for the reader.

    Returns:
        0, `FAILED` where a run failed, `ExitCode.INTERRUPTED` after Ctrl-C, or `ExitCode.SAVED` after another signal or
        where `training.time_limit` was over.
    """
    runs, failed = study.runs, False
    for number, run in enumerate(runs, 1):
        place = f"run {number} of {len(runs)}: {run.folder.name}"
        if not is_finished(study.resolve(run)):
            command = command_of(study, run, launcher=launcher, processes=processes)
            say(f"{place}\n{quote_command(command)}")
            code = launch(command, run.folder)
            if code in (ExitCode.INTERRUPTED, ExitCode.SAVED):
                return code
            if code != ExitCode.DONE:
                outcome = read_exit_status(run.folder)
                say(f"{place} failed with exit code {code}" + (f": {outcome.message}" if outcome else ""))
                failed = True
                if not keep_going:
                    return FAILED
                continue
        if not _score(run, manifests, say):
            failed = True
            if not keep_going:
                return FAILED
    return FAILED if failed else ExitCode.DONE


def score_study(study: Study, manifests: Mapping[str, Manifest], *, say: Callable[[str], None]) -> int:
    """Score the runs that have made all steps, and train nothing.

    Args:
        study: The study.
        manifests: Its test shards, by location.
        say: Prints a line for the reader.

    Returns:
        0, or `FAILED` where a run has not made all steps or could not be scored.
    """
    finished = [run for run in study.runs if is_finished(study.resolve(run))]
    scored = [_score(run, manifests, say) for run in finished]
    return ExitCode.DONE if all(scored) and len(finished) == len(study.runs) else FAILED


def _score(run: PlannedRun, manifests: Mapping[str, Manifest], say: Callable[[str], None]) -> bool:
    """Score a run on all test shards; False, and a line that says why, where it cannot be."""
    try:
        for manifest in manifests.values():
            score_newest(run.folder, manifest)
    except UserError as error:
        say(str(error))
        return False
    return True
