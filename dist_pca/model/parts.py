"""Parts of a backbone by name, for freezing and for learning rates of their own."""

from collections.abc import Sequence
from typing import Any

import timm
import torch
from timm.models import group_parameters
from torch import nn

from dist_pca.errors import UserError, nearest
from dist_pca.model.weights import plain_name


def parameters_of(body: nn.Module, part: str, key: str) -> list[str]:
    """Names of the parameters that belong to a part of a backbone.

    Args:
        body: The timm network that gives feature maps.
        part: `backbone` for all of it; `stem` for what comes before the first stage; or a module by timm's name for
            it, such as `layer1`, `stages.0` or `blocks.11`.
        key: Config key that names the part, with which the message begins.

    Raises:
        UserError: the backbone has no such part.
    """
    names = [name for name, _ in body.named_parameters()]
    if part == "backbone":
        return names
    wanted = plain_name(part)
    members = [name for name in names if f"{plain_name(name)}_".startswith(f"{wanted}_")]
    if members:
        return members
    classifier = whole_network(body)
    if part == "stem" and hasattr(classifier, "group_matcher"):
        groups = group_parameters(classifier, classifier.group_matcher(coarse=True), reverse=True)
        stem = {plain_name(name) for name, group in groups.items() if group == 0}
        return [name for name in names if plain_name(name) in stem]
    modules = [name for name, _ in classifier.named_modules() if name and name.count(".") < 2]
    raise UserError(
        f"{key}: {body.pretrained_cfg['architecture']} has no part {part!r}; the nearest is "  # type: ignore[index]
        f"{nearest(part, ['backbone', 'stem', *modules])}"
    )


def freeze(body: nn.Module, parts: Sequence[str]) -> None:
    """Exclude parts of a backbone from training: their parameters get no gradients.

    Raises:
        UserError: the backbone has no such part.
    """
    for part in parts:
        for name in parameters_of(body, part, "model.freeze"):
            body.get_parameter(name).requires_grad_(False)


def whole_network(body: nn.Module) -> Any:
    """Build the timm classifier, without memory for its weights, whose features the body gives.

    A feature extractor has neither its family's layer groups nor its list of parameters without weight decay.
    """
    cfg: Any = body.pretrained_cfg
    with torch.device("meta"):
        return timm.create_model(cfg["architecture"])
