"""Few files of the package have to be opened to follow a sample from its tar to a batch."""

from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from dist_pca.data.stream import stream
from tests.support.files_run import files_run
from tests.support.shards import data_config, make_shards

RARE = {"source": "rare_class", "min_pixels": 1, "min_crop_pixels": 1}


@pytest.mark.parametrize(("sampling", "most"), [({}, 10), (RARE, 11)], ids=["uniform", "rare classes"])
def test_a_sample_runs_through_few_files_from_tar_to_batch(tmp_path: Path, sampling: dict[str, Any], most: int) -> None:
    manifests = [make_shards(tmp_path / "one", [5, 4]), make_shards(tmp_path / "other", [6])]
    source = ({"shards": "one", "weight": 2}, {"shards": "other", "weight": 1})
    config = data_config(source=source, sampling=sampling)
    streams = []

    def build() -> None:
        arguments = {"seed": 1, "rank": 0, "world_size": 1, "global_batch": 4, "accumulation": 1, "start_step": 0}
        streams.append(stream(config, manifests, "source", **arguments))  # type: ignore[arg-type]

    building = files_run(build)
    with closing(streams[0]) as batches:
        drawing = files_run(lambda: next(batches))
    assert len(building) <= 8, f"building the stream runs through {sorted(building)}"
    assert len(drawing) <= 9, f"drawing a batch runs through {sorted(drawing)}"
    assert len(building | drawing) <= most, f"both run through {sorted(building | drawing)}"
