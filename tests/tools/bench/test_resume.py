from pathlib import Path

import pytest

from dist_pca.tools.bench.resume import measure_resume
from dist_pca.tools.bench.worlds import measure_worlds


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.timeout(600)
def test_a_run_killed_twice_is_bit_for_bit_the_one_that_was_not(tmp_path: Path) -> None:
    found = {record["name"]: record["value"] for record in measure_resume(tmp_path, 2, 0, lambda what: None)}
    # One of the two is aimed at a checkpoint's write; a fast disk may have ended it.
    assert found.pop("kills_inside_a_checkpoint_write") in (0, 1, 2)
    assert found == {"kills": 2, "differing_tensors": 0, "differing_metric_lines": 0, "unreadable_checkpoints": 0}


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.timeout(900)
def test_a_run_that_goes_on_on_1_3_and_2_ranks_sees_the_same_samples_and_losses(tmp_path: Path) -> None:
    found = {record["name"]: record["value"] for record in measure_worlds(tmp_path, lambda what: None)}
    assert found["world_sizes"] == "2-1-3-2"
    assert found["world_steps_with_other_samples"] == 0
    assert float(str(found["world_largest_loss_difference"])) <= 1e-5
