"""Parameter groups and the optimiser."""

from math import sqrt
from typing import NamedTuple

import torch
from timm.optim import param_groups_layer_decay
from torch import nn

from dist_pca.config import OptimizerConfig, RunConfig
from dist_pca.errors import UserError
from dist_pca.model.parts import parameters_of, whole_network
from dist_pca.model.segmenter import Segmenter
from dist_pca.model.weights import plain_name

# Some families of networks leave these out of their no_weight_decay().
_NO_DECAY = ("*pos_embed*", "*rel_pos_[hw]", "*_token", "*layer_scale*", "*.gamma")


class _Group(NamedTuple):
    part: str
    lr: float
    weight_decay: float


def build_optimizer(config: OptimizerConfig, model: Segmenter) -> torch.optim.Optimizer:
    """Build SGD or AdamW, with one parameter group for each combination of part, learning rate and weight decay.

    The backbone's layers have `lr`, which `layer_decay` lowers from the deepest to the first and
    `backbone_multipliers` scale; the head and the projection have `lr` times `head_multiplier`. AdamW decays no norm,
    bias, position embedding, token or layer scale.

    Raises:
        UserError: `layer_decay` is set and timm does not know the backbone's layers, or it has no such part.
    """
    members: dict[_Group, list[nn.Parameter]] = {}
    layers = _backbone_groups(config, model.backbone.body)
    for name, parameter in model.backbone.body.named_parameters():
        if parameter.requires_grad:
            members.setdefault(layers[name], []).append(parameter)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and name.startswith(("head.", "projection.")):
            decay = 0.0 if config.name == "adamw" and parameter.ndim <= 1 else config.weight_decay
            members.setdefault(_Group("head", config.lr * config.head_multiplier, decay), []).append(parameter)
    groups = [
        {"params": parameters, "lr": group.lr, "weight_decay": group.weight_decay}
        for group, parameters in members.items()
    ]
    if config.name == "sgd":
        return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum)
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.epsilon)


def _backbone_groups(config: OptimizerConfig, body: nn.Module) -> dict[str, _Group]:
    """Parameter group of each of the body's parameters, by name."""
    classifier = whole_network(body)
    if config.layer_decay is not None and not hasattr(classifier, "group_matcher"):
        architecture = body.pretrained_cfg["architecture"]  # type: ignore[index]
        raise UserError(f"optimizer.layer_decay: timm does not know the layers of {architecture}; set it to null")
    adamw = config.name == "adamw"
    no_decay = [*_NO_DECAY, *(classifier.no_weight_decay() if hasattr(classifier, "no_weight_decay") else ())]
    names = {parameter: plain_name(name) for name, parameter in classifier.named_parameters()}
    rates = {
        names[parameter]: (group["lr_scale"], group["weight_decay"])
        for group in param_groups_layer_decay(
            classifier,
            weight_decay=config.weight_decay,
            no_weight_decay_list=no_decay if adamw else (),
            weight_decay_exclude_1d=adamw,
            layer_decay=config.layer_decay or 1.0,
        )
        for parameter in group["params"]
    }
    own = {name: rates[plain_name(name)] for name, _ in body.named_parameters()}
    # The classifier's last layer, at scale 1, is not part of the backbone.
    deepest = max(scale for scale, _ in own.values())
    factors = {
        name: factor
        for part, factor in config.backbone_multipliers.items()
        for name in parameters_of(body, part, "optimizer.backbone_multipliers")
    }
    return {
        name: _Group("backbone", config.lr * scale / deepest * factors.get(name, 1.0), decay)
        for name, (scale, decay) in own.items()
    }


def batch_factor(config: RunConfig) -> float:
    """Factor on the learning rate for the size of the batch; 1 unless `schedule.batch_scaling` asks for another."""
    schedule = config.schedule
    if schedule.batch_scaling == "none" or schedule.base_batch is None:
        return 1.0
    ratio = config.training.source_batch / schedule.base_batch
    return ratio if schedule.batch_scaling == "linear" else sqrt(ratio)


def learning_rate_factor(config: RunConfig, step: int) -> float:
    """Factor on every group's base learning rate at a step (from 0): batch scaling, linear warm-up and poly decay."""
    schedule = config.schedule
    factor = batch_factor(config)
    if schedule.warmup_steps > 0:
        factor *= min(1.0, (step + 1) / schedule.warmup_steps)
    if schedule.name == "poly":
        horizon = schedule.horizon or config.training.steps
        factor *= max(schedule.minimum, max(0.0, 1 - step / horizon) ** schedule.power)
    return factor
