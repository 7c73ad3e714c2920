from pathlib import Path

import pytest

from dist_pca.tools.bench.gpu_run import FIGURES, SETTINGS, measure_run
from dist_pca.train import resolve_config
from tests.support.runs import overrides


def test_the_run_is_one_that_the_config_allows() -> None:
    config = resolve_config("demo", [f"{key}={value}" for key, value in SETTINGS.items()])
    assert config.data.crop == (730, 730)
    assert config.training.precision == "bf16"


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_run_gives_its_steps_speed_memory_and_seconds_by_phase(tmp_path: Path) -> None:
    small = dict(key.split("=") for key in overrides(tmp_path, "bench") if key.startswith(("model.", "data.crop")))
    records = {record["name"]: record["value"] for record in measure_run(tmp_path, small, 4)}
    assert records["steps"] == 4
    assert records.keys() >= {*FIGURES} - {"seconds"} | {"seconds_forward", "seconds_backward", "seconds_association"}
    assert float(records["images_per_second"] or 0) > 0
