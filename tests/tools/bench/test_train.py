import json
import sys

import pytest

from dist_pca.cli import main


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.timeout(600)
def test_the_loop_is_timed_beside_a_bare_one(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["dist-pca", "bench", "train", "--repeats", "4", "--json"])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 0
    records = {record["name"]: record["value"] for record in json.loads(capfd.readouterr().out)["records"]}
    assert set(records) == {"loop_ratio", "step_seconds", "bare_step_seconds"}
    # Of so few steps on a busy machine the ratio says little but that both loops do the same work.
    assert 0.5 < records["loop_ratio"] < 2
    assert records["step_seconds"] > 0
