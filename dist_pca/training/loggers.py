"""Trackers, such as TensorBoard and Weights & Biases, through Accelerate's classes. Only rank 0 opens them."""

import errno
import json
import logging
import threading
import uuid
from collections.abc import Callable, Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch.distributed as dist
from pydantic import TypeAdapter
from typing_extensions import TypedDict

from dist_pca.config import RunConfig
from dist_pca.data.collate import Batch
from dist_pca.errors import UserError
from dist_pca.files import append_line, drop_lines_after, read_record, write_record

_log = logging.getLogger("dist_pca.training")
_PACKAGES = {"comet_ml": "comet-ml"}
"""Package of a tracker, where it has another name."""


def check_trackers(config: RunConfig) -> None:
    """Check that every tracker's package is installed.

    Raises:
        UserError: one is not; the message has the command that installs it.
    """
    for tracker in config.telemetry.trackers:
        if find_spec(tracker) is None:
            raise UserError(
                f"telemetry.trackers: {tracker} is not installed; pip install {_PACKAGES.get(tracker, tracker)}"
            )


class Trackers:
    """All trackers of a run."""

    def __init__(self, config: RunConfig, start_step: int) -> None:
        """Start all trackers; those that can do so resume the run.

        Args:
            config: The run.
            start_step: Steps already trained.

        Raises:
            UserError: one does not start, other than for a full disk, which does not end the run.
        """
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        self._open = []
        self._report = threading.excepthook
        threading.excepthook = self._report_thread
        for name in config.telemetry.trackers:
            kind = LOGGER_TYPE_TO_CLASS[name]
            project = "tensorboard" if name == "tensorboard" else config.telemetry.project
            where = (str(config.folder),) if kind.requires_logging_directory else ()
            try:
                options = _options(name, config, start_step) | config.telemetry.tracker_options.get(name, {})
                tracker = kind(project, *where, **options)
                tracker.start()
            except Exception as error:
                if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                    _log.warning("the run continues without %s: %s", name, error)
                    continue
                why = " ".join(str(error).split())
                raise UserError(
                    f"telemetry.trackers: {name} does not start ({why}); fix telemetry.tracker_options.{name}, or "
                    "remove the tracker"
                ) from error
            self._open.append(tracker)
            # TensorBoard would open a separate run for the config.
            if name != "tensorboard":
                tracker.store_init_configuration(config.model_dump(mode="json"))

    def _report_thread(self, failure: threading.ExceptHookArgs) -> None:
        """Leave out the traceback of a tracker's own thread: the next `log` fails for the same reason and says so."""
        if type(failure.thread).__module__.split(".")[0] != "tensorboard":
            self._report(failure)

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Log the values of a step to all trackers; one that fails is dropped, so that it cannot end the run."""
        self._with_each(lambda tracker: tracker.log(dict(values), step=step))

    def log_pictures(self, pictures: Mapping[str, Any], step: int) -> None:
        """Log RGB images (height x width x 3, uint8) of a step to the trackers that show images, as `log` does."""

        def log(tracker: Any) -> None:
            if tracker.name == "tensorboard":
                tracker.log_images({name: image.transpose(2, 0, 1)[None] for name, image in pictures.items()}, step)
            elif hasattr(tracker, "log_images"):
                tracker.log_images({name: [image] for name, image in pictures.items()}, step)

        self._with_each(log)

    def _with_each(self, action: Callable[[Any], None]) -> None:
        for tracker in tuple(self._open):
            try:
                action(tracker)
            except Exception as error:
                self._open.remove(tracker)
                _log.warning("the run continues without %s: %s", tracker.name, error)

    def close(self) -> None:
        """Close all trackers, which write what they have buffered."""
        threading.excepthook = self._report
        for tracker in self._open:
            try:
                tracker.finish()
            except Exception as error:
                _log.warning("tracker %s did not close: %s", tracker.name, error)


def _options(tracker: str, config: RunConfig, start_step: int) -> dict[str, Any]:
    """Options with which a tracker resumes the run, where it can, and names it."""
    if tracker == "tensorboard":
        return {"purge_step": start_step + 1}
    if tracker == "wandb":
        run_id = _run_id(config.folder, tracker)
        return {"id": run_id, "resume": "allow", "name": config.name, "dir": str(config.folder)}
    if tracker == "trackio":
        return {"resume": "allow", "name": config.name}
    return {"run_name": config.name} if tracker == "mlflow" else {}


class _RunId(TypedDict):
    id: str


def _run_id(folder: Path, tracker: str) -> str:
    """A random id, which every launch of the run reads back from its folder."""
    file = folder / f"{tracker}.json"
    if not file.is_file():
        write_record(file, {"id": uuid.uuid4().hex[:12]})
    return read_record(file, TypeAdapter(_RunId), "remove it to log into a new run")["id"]


class SampleLog:
    """Writes `samples.jsonl`: the sample keys of each step by domain, over all ranks, in their global order."""

    def __init__(self, folder: Path, start_step: int) -> None:
        """Open the log of a run folder, without lines after `start_step`."""
        self._file = folder / "samples.jsonl"
        self._own: list[tuple[int, int, str]] = []
        if dist.get_rank() == 0:
            drop_lines_after(self._file, start_step)

    def accumulate(self, batches: Iterable[Batch | None]) -> None:
        """Add a micro-batch's source and target batch."""
        for domain, batch in enumerate(batches):
            if batch is not None:
                self._own += [(domain, *sample) for sample in zip(batch.indices, batch.keys, strict=True)]

    def write(self, step: int) -> None:
        """Write the accumulated keys as those of step `step` (from 1). Collective.

        Raises:
            UserError: on rank 0, it cannot be written.
        """
        samples: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
        dist.gather_object(self._own, samples, dst=0)
        self._own = []
        if samples is not None:
            ordered = sorted(sample for own in samples for sample in own)
            keys = {
                name: [key for domain, _, key in ordered if domain == number]
                for number, name in enumerate(("source", "target"))
            }
            append_line(self._file, json.dumps({"step": step, **keys}))
