"""Parameter groups and the optimiser."""

import torch

from dist_pca.config import OptimizerConfig
from dist_pca.model.segmenter import Segmenter


def build_optimizer(config: OptimizerConfig, model: Segmenter) -> torch.optim.Optimizer:
    """SGD or AdamW with the head's learning rate times its multiplier; under AdamW vectors are not decayed."""
    groups = []
    for module, lr in ((model.backbone, config.lr), (model.head, config.lr * config.head_multiplier)):
        parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        spared = [p for p in parameters if config.name == "adamw" and p.ndim <= 1]
        decayed = [p for p in parameters if not (config.name == "adamw" and p.ndim <= 1)]
        for members, weight_decay in ((decayed, config.weight_decay), (spared, 0.0)):
            if members:
                groups.append({"params": members, "lr": lr, "weight_decay": weight_decay})
    if config.name == "sgd":
        return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum)
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.epsilon)
