"""Parameter names of EfficientNets ported from TensorFlow, in timm's words."""

import re
from collections.abc import Iterable, Mapping

import torch

_OUTSIDE_BLOCKS = {
    "_conv_stem": "conv_stem",
    "_bn0": "bn1",
    "_conv_head": "conv_head",
    "_bn1": "bn2",
    "_fc": "classifier",
}
_INVERTED_RESIDUAL = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}
_DEPTHWISE_SEPARABLE = {
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn1",
    "_project_conv": "conv_pw",
    "_bn2": "bn2",
}


def timm_names(state: Mapping[str, torch.Tensor], timm_keys: Iterable[str]) -> Mapping[str, torch.Tensor]:
    """Rename the tensors of a ported EfficientNet to timm's names; other networks' tensors keep their names.

    Ported EfficientNets number all blocks consecutively, timm numbers them per stage; `timm_keys` gives the mapping.

    Args:
        state: Tensors by name.
        timm_keys: Names of the timm network's tensors.
    """
    if "_conv_stem.weight" not in state:
        return state
    matches = (re.match(r"blocks\.(\d+)\.(\d+)\.", key) for key in timm_keys)
    places = sorted({(int(match[1]), int(match[2])) for match in matches if match})
    renamed = {}
    for key, value in state.items():
        match = re.match(r"_blocks\.(\d+)\.(\w+)(\..+)", key)
        if match is None:
            layer, dot, rest = key.partition(".")
            renamed[_OUTSIDE_BLOCKS.get(layer, layer) + dot + rest] = value
        elif int(match[1]) < len(places):
            stage, block = places[int(match[1])]
            expands = f"_blocks.{match[1]}._expand_conv.weight" in state
            layers = _INVERTED_RESIDUAL if expands else _DEPTHWISE_SEPARABLE
            renamed[f"blocks.{stage}.{block}.{layers.get(match[2], match[2])}{match[3]}"] = value
    return renamed
