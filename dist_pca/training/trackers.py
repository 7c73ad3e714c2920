"""TensorBoard, Weights & Biases and others, each through Accelerate's class for it. Rank 0 alone opens them."""

import json
import logging
import uuid
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dist_pca.config import RunConfig
from dist_pca.errors import UserError

_log = logging.getLogger("dist_pca.training")
_PACKAGES = {"comet_ml": "comet-ml"}
"""What a tracker's package is called where that is not the tracker's name."""


def check_trackers(config: RunConfig) -> None:
    """See whether every tracker's package is installed.

    Raises:
        UserError: one is not; the command that installs it is named.
    """
    for tracker in config.telemetry.trackers:
        if find_spec(tracker) is None:
            raise UserError(
                f"telemetry.trackers: {tracker} is not installed; pip install {_PACKAGES.get(tracker, tracker)}"
            )


class Trackers:
    """All trackers of a run."""

    def __init__(self, config: RunConfig, start_step: int) -> None:
        """Start them, or take a run up again where a tracker can.

        Args:
            config: The run.
            start_step: Steps already made.

        Raises:
            UserError: one does not start.
        """
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        self._open = []
        for name in config.telemetry.trackers:
            kind = LOGGER_TYPE_TO_CLASS[name]
            options = _options(name, config, start_step) | config.telemetry.tracker_options.get(name, {})
            project = "tensorboard" if name == "tensorboard" else config.telemetry.project
            where = (str(config.folder),) if kind.requires_logging_directory else ()
            try:
                tracker = kind(project, *where, **options)
                tracker.start()
            except Exception as error:
                why = " ".join(str(error).split())
                raise UserError(
                    f"telemetry.trackers: {name} does not start ({why}); mend telemetry.tracker_options.{name}, or "
                    "leave it out"
                ) from error
            self._open.append(tracker)
            # TensorBoard would open a run of its own for them.
            if name != "tensorboard":
                tracker.store_init_configuration(config.model_dump(mode="json"))

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Tell all of them the values of a step; one that fails is dropped, as it must not cost the run."""
        for tracker in tuple(self._open):
            try:
                tracker.log(dict(values), step=step)
            except Exception as error:
                self._open.remove(tracker)
                _log.warning("the run goes on without %s: %s", tracker.name, error)

    def close(self) -> None:
        """Write what is under way."""
        for tracker in self._open:
            try:
                tracker.finish()
            except Exception as error:
                _log.warning("%s did not end as it should: %s", tracker.name, error)


def _options(tracker: str, config: RunConfig, start_step: int) -> dict[str, Any]:
    """What makes a tracker go on with the run, where it can, and name it."""
    if tracker == "tensorboard":
        return {"purge_step": start_step + 1}
    if tracker == "wandb":
        run_id = _run_id(config.folder, tracker)
        return {"id": run_id, "resume": "allow", "name": config.name, "dir": str(config.folder)}
    if tracker == "trackio":
        return {"resume": "allow", "name": config.name}
    return {"run_name": config.name} if tracker == "mlflow" else {}


def _run_id(folder: Path, tracker: str) -> str:
    """The same at every start of a run."""
    file = folder / f"{tracker}.json"
    if not file.is_file():
        file.write_text(json.dumps({"id": uuid.uuid4().hex[:12]}) + "\n")
    return str(json.loads(file.read_text())["id"])
