"""One rank of an engine whose network is the teacher for a while, for `test_teacher`."""

import os
from pathlib import Path
from typing import Any

import torch

from dist_pca.config import RunConfig
from dist_pca.training.optimizer import build_optimizer
from tests.support.ranks import leave_group
from tests.training.zero_runs import batch, micro_batches, network


def teach(rank: int, ranks: int, port: int, folder: Path, config: RunConfig) -> None:
    """Train two steps, pass images through teacher and student, train a third; save everything."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    from dist_pca.training.deepspeed import gather_network
    from dist_pca.training.ema import init_ema, teacher_weights, update_ema
    from dist_pca.training.environment import init_distributed

    environment = init_distributed(config)
    torch.set_num_threads(1)
    model = network(config)
    engine, _ = environment.accelerator.prepare(model, build_optimizer(config.optimizer, model))
    engine.train()
    average = init_ema(engine)
    # The last step trains on a network that has been the teacher in between.
    found: dict[str, Any] = {}
    for step in range(3):
        for micro in micro_batches(engine, config, step, rank, ranks):
            engine.backward(micro.loss)
            engine.step()
        update_ema(average, engine, config.training.ema_decay, step + 1)
        if step == 1:
            before = {name: value.clone() for name, value in gather_network(engine)}
            found["average"] = {name: value.clone().cpu() for name, value in gather_network(engine, *average)}
            with teacher_weights(engine, average):
                logits, features, _ = engine(batch(9, 4)[0])
            assert not logits.requires_grad
            assert engine.module.training
            found |= {"logits": logits, "features": features}
            found["unchanged"] = {name: torch.equal(value, before[name]) for name, value in gather_network(engine)} | {
                "average": all(torch.equal(v, found["average"][n]) for n, v in gather_network(engine, *average))
            }
    found["trained"] = {name: value.clone().cpu() for name, value in gather_network(engine)}
    torch.save(found, folder / f"{rank}.pt")
    leave_group()
