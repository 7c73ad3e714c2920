import json
import sys
from pathlib import Path

import pytest

from dist_pca.cli import main
from dist_pca.tools.bench.data import measure_seeking


def test_seeking_and_the_manifest_are_timed(tmp_path: Path) -> None:
    records = {record["name"]: record for record in measure_seeking(tmp_path)}
    assert set(records) == {"manifest_seconds", "seek_seconds"}
    assert all(float(str(record["value"])) > 0 for record in records.values())


@pytest.mark.slow
@pytest.mark.exhaustive
def test_reading_and_building_are_measured_against_bare_loops(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    options = ["--only", "reading", "--only", "building", "--repeats", "1", "--json"]
    monkeypatch.setattr(sys, "argv", ["dist-pca", "bench", "data", *options])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 0
    printed = json.loads(capfd.readouterr().out)
    assert set(printed) == {"device", "versions", "records"}
    assert all(set(record) == {"name", "value", "unit"} for record in printed["records"])
    values = {record["name"]: record["value"] for record in printed["records"]}
    assert {"loader_ratio", "builder_ratio", "loader_scaling"} <= set(values)
    assert all(value > 0 for value in values.values())
    assert values["loader_ratio"] == pytest.approx(
        values["loader_images_per_second"] / values["bare_loop_images_per_second"]
    )
