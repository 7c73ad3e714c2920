"""DeepSpeed's private fields are where `training.deepspeed` looks for them; each message says what broke if not."""

import importlib
import inspect
import json
import socket
from pathlib import Path
from typing import Any

import pytest
import torch.multiprocessing as multiprocessing

from dist_pca.training.deepspeed import deepspeed_plugin
from tests.training.internals_rank import observe

both_stages = pytest.mark.parametrize("stage", ["2", "3"])


@pytest.fixture(scope="module")
def facts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("internals")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    multiprocessing.spawn(observe, (port, folder), nprocs=1)
    found: dict[str, dict[str, Any]] = json.loads((folder / "internals.json").read_text())
    return found


@pytest.mark.slow
@both_stages
def test_flat_partitions_hold_the_weights(facts: dict[str, dict[str, Any]], stage: str) -> None:
    assert facts[stage]["partitions_are_the_weights"], (
        "single_partition_of_fp32_groups / fp32_partitioned_groups_flat, or _hp_mapping / grad_position and "
        "get_param_id moved: checkpoints and moving averages would hold other values than the weights"
    )


@pytest.mark.slow
@both_stages
def test_the_wrapped_optimisers_state_is_keyed_by_partition(facts: dict[str, dict[str, Any]], stage: str) -> None:
    assert facts[stage]["state_is_keyed_by_partition"], (
        "engine.optimizer.optimizer moved: checkpoints would be without the optimiser's moments"
    )


@pytest.mark.slow
def test_parameters_are_marked_as_sharded_under_stage_3_alone(facts: dict[str, dict[str, Any]]) -> None:
    assert (facts["2"]["sharded"], facts["3"]["sharded"]) == (False, True), (
        "parameter.ds_id moved: stage 3 would be taken for stage 2, and checkpoints would fail"
    )


@pytest.mark.slow
def test_model_weights_are_views_of_their_groups_flat_tensor(facts: dict[str, dict[str, Any]]) -> None:
    assert facts["2"]["weights_are_views"], (
        "bit16_groups_flat moved: at stages 1 and 2 the teacher would compute with wrong weights"
    )
    assert facts["2"]["group_sizes"], "bit16_groups moved: the teacher would keep some of the student's weights"


@pytest.mark.slow
def test_gathered_parameters_are_released_to_their_shards(facts: dict[str, dict[str, Any]]) -> None:
    assert facts["3"]["released"], (
        "_partition_all_parameters moved: at stage 3 the teacher would compute with the student's weights"
    )
    assert facts["3"]["shards"], (
        "parameter.ds_tensor moved: at stage 3 the teacher's weights would not take the place of the student's"
    )


@pytest.mark.slow
def test_small_parameters_are_rebuilt_from_shards(facts: dict[str, dict[str, Any]]) -> None:
    assert facts["3"]["persistent"], (
        "persistent_parameters moved: at stage 3 norms and biases of the teacher would be the student's"
    )


@pytest.mark.slow
def test_partitions_can_be_swapped_in_from_nvme_and_back(facts: dict[str, dict[str, Any]]) -> None:
    assert facts["3"]["nothing_is_on_nvme"], "_swappable_optimizer_subgroup moved: what is in memory would be swapped"
    assert facts["3"]["nvme_methods"] == ["_swap_in", "_swap_out", "_release_swap_buffers"], (
        "the optimiser's swap methods moved: a run with training.offload.optimizer=nvme could not be saved or resumed"
    )


@pytest.mark.slow
@both_stages
def test_the_loss_scale_can_be_set(facts: dict[str, dict[str, Any]], stage: str) -> None:
    assert facts[stage]["loss_scale"] == 8, "override_loss_scale moved: fp16 gradients would vanish or overflow"
    assert facts[stage]["scaler_before"], (
        "torch_autocast_gradscaler moved: under fp16 DeepSpeed's scaler would scale losses a second time"
    )


@pytest.mark.slow
def test_the_cpu_reduction_kernel_is_off(facts: dict[str, dict[str, Any]]) -> None:
    assert facts["process"]["cpu_kernel"] is False, (
        "deepspeed.ops.__compatible_ops__ moved: CPU runs would need a C++ compiler to start"
    )


def test_accelerates_plugin_is_made_without_transformers() -> None:
    source = inspect.getsource(importlib.import_module("accelerate").DeepSpeedPlugin)
    assert "def set_deepspeed_weakref(self)" in source, (
        "set_deepspeed_weakref moved: runs would fail to start where transformers is not installed"
    )
    plugin = deepspeed_plugin({"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 2}})
    assert plugin.zero_stage == 2


def test_private_fields_are_named_in_one_file() -> None:
    package = Path(inspect.getfile(deepspeed_plugin)).parents[1]
    fields = (
        *("_hp_mapping", "bit16_groups", "fp32_partitioned", "single_partition_of", "ds_id", "ds_tensor"),
        *("persistent_parameters", "grad_position", "override_loss_scale", "torch_autocast_gradscaler"),
    )
    naming = {file.name for file in package.rglob("*.py") for field in fields if field in file.read_text()}
    assert naming == {"deepspeed.py"}
