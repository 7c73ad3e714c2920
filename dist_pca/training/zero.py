"""Whole tensors in and out of DeepSpeed's partitions, by parameter name and independent of the number of ranks.

All functions are collective. DeepSpeed is imported inside them: who only reads a checkpoint does without it.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist


def full_parameters(engine: Any) -> dict[str, torch.Tensor]:
    """fp32 copy of every parameter on the CPU, as an unpartitioned model would hold it."""
    from deepspeed.utils import safe_get_full_fp32_param

    return {name: _full(safe_get_full_fp32_param(p), p) for name, p in _trained(engine)} | {
        name: p.detach().float().cpu().clone() for name, p in engine.module.named_parameters() if not p.requires_grad
    }


def full_optimizer_state(engine: Any) -> dict[str, torch.Tensor]:
    """Every optimiser tensor on the CPU as `parameter/key`, and its step counts as `step`; empty before a step."""
    from deepspeed.utils import safe_get_full_optimizer_state

    keys, step = _state_keys(engine)
    if keys:
        _link_state(engine)
    state = {
        f"{name}/{key}": _full(safe_get_full_optimizer_state(p, key), p) for name, p in _trained(engine) for key in keys
    }
    return state | ({"step": torch.tensor(step)} if step is not None else {})


def load_optimizer_state(engine: Any, state: dict[str, torch.Tensor]) -> None:
    """Put back what `full_optimizer_state` gave, under any ZeRO stage and number of ranks."""
    from deepspeed.utils import safe_get_local_optimizer_state

    keys = {name.rsplit("/", 1)[1] for name in state if "/" in name}
    if not keys:
        return
    for partition in _partitions(engine):
        slot = engine.optimizer.optimizer.state[partition]
        slot.update({key: torch.zeros_like(partition) for key in keys})
        if "step" in state:
            slot["step"] = state["step"].clone()
    _link_state(engine)
    for name, parameter in _trained(engine):
        for key in keys:
            value = state[f"{name}/{key}"].flatten()
            if hasattr(parameter, "ds_id"):
                part = safe_get_local_optimizer_state(parameter, key)
                own = value[dist.get_rank() * part.numel() :][: part.numel()]
                part[: own.numel()].copy_(own)
            elif (mapping := getattr(parameter, "_hp_mapping", None)) is not None:
                address = mapping.lp_fragment_address
                mapping.get_hp_fragment(key).copy_(value.narrow(0, address.start, address.numel))


def _link_state(engine: Any) -> None:
    # At stages 1 and 2 DeepSpeed ties parameters to their slices of the optimiser's state once, in the first step of
    # the first group, when later groups have no state yet; so they are tied anew.
    if engine.zero_optimization_stage() < 3:
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()


def _trained(engine: Any) -> Iterator[tuple[str, torch.nn.Parameter]]:
    return ((name, p) for name, p in engine.module.named_parameters() if p.requires_grad)


def _full(value: torch.Tensor | None, parameter: torch.nn.Parameter) -> torch.Tensor:
    assert value is not None
    shape = getattr(parameter, "ds_shape", parameter.shape)
    return value.detach().reshape(shape).float().cpu().clone()


def _partitions(engine: Any) -> list[torch.Tensor]:
    optimizer = engine.optimizer
    if engine.zero_optimization_stage() == 3:
        return list(optimizer.fp32_partitioned_groups_flat)
    return list(optimizer.single_partition_of_fp32_groups)


def _state_keys(engine: Any) -> tuple[list[str], float | None]:
    partitions = _partitions(engine)
    slot = engine.optimizer.optimizer.state.get(partitions[0], {})
    keys = sorted(k for k, v in slot.items() if torch.is_tensor(v) and v.shape == partitions[0].shape)
    return keys, float(slot["step"]) if "step" in slot else None
