"""One rank that trains a step at ZeRO stages 2 and 3 and writes what DeepSpeed's private fields held."""

import copy
import json
import os
from pathlib import Path
from typing import Any

import torch


def observe(_rank: int, port: int, folder: Path) -> None:
    """Write `internals.json`: by stage, the fact that each field is relied on for."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "DS_ACCELERATOR": "cpu"}
    import deepspeed

    from dist_pca.training import deepspeed as internals
    from dist_pca.training.deepspeed_config import deepspeed_config
    from dist_pca.training.environment import init_distributed
    from dist_pca.training.optimizer import build_optimizer
    from tests.support.ranks import leave_group
    from tests.training.zero_runs import micro_batches, network, run_config

    facts: dict[str, dict[str, Any]] = {}
    for stage in (2, 3):
        config = run_config(stage, "sgd")
        model = network(config)
        optimizer = build_optimizer(config.optimizer, model)
        if stage == 2:
            engine, _ = init_distributed(config).accelerator.prepare(model, optimizer)
        else:
            engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=deepspeed_config(config))
        for micro in micro_batches(engine, config, 0, 0, 1):
            engine.backward(micro.loss)
            engine.step()
        flat = internals.flat_partitions(engine)
        trained = [parameter for parameter in engine.module.parameters() if parameter.requires_grad]
        full = []
        for parameter in trained:
            with internals.gathered(parameter):
                full.append(parameter.detach().clone().flatten())
        slices = [internals.partition_slice(engine, parameter) for parameter in trained]
        parts = [flat[where.partition][where.offset :][: where.size] for where in slices]
        with internals.swapped_in(engine, 0) as on_nvme:
            pass
        found: dict[str, Any] = {
            "partitions_are_the_weights": all(map(torch.equal, parts, full)),
            "state_is_keyed_by_partition": all(
                "momentum_buffer" in internals.torch_optimizer(engine).state[partition] for partition in flat
            ),
            "nothing_is_on_nvme": not on_nvme,
            "sharded": any(map(internals.is_sharded, trained)),
            "scaler_before": hasattr(engine.optimizer, "torch_autocast_gradscaler"),
        }
        internals.set_loss_scale(engine, 8.0)
        found["loss_scale"] = float(engine.optimizer.loss_scale)
        internals.set_loss_scale(engine, 1.0)
        if stage == 2:
            groups = internals.model_weight_groups(engine)
            spans = [(f.data_ptr(), f.data_ptr() + f.numel() * f.element_size()) for f, _ in groups]
            found["weights_are_views"] = all(
                low <= parameter.data_ptr() < high
                for (low, high), (_, group) in zip(spans, groups, strict=True)
                for parameter in group
            )
            found["group_sizes"] = sum(len(group) for _, group in groups) == len(trained)
        else:
            persistent = copy.copy(engine.optimizer.persistent_parameters)
            internals.release_gathered(engine)
            found["released"] = all(parameter.numel() == 0 for parameter in trained)
            found["shards"] = all(
                torch.equal(internals.shard(p)[: where.size], value)
                for p, where, value in zip(trained, slices, full, strict=True)
            )
            internals.gather_persistent(engine)
            found["persistent"] = bool(persistent) and all(p.numel() == p.ds_numel for p in persistent)
            found["nvme_methods"] = [
                name
                for name in ("_swap_in", "_swap_out")
                if hasattr(engine.optimizer, f"_optimizer_states_and_gradient{name}")
            ] + [name for name in ("_release_swap_buffers",) if hasattr(engine.optimizer, name)]
        facts[str(stage)] = found
    facts["process"] = {"cpu_kernel": deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"]}
    (folder / "internals.json").write_text(json.dumps(facts))
    leave_group()
