"""Distributed training of Pixel-Level Cycle Association for domain-adaptive semantic segmentation.

The public names are imported when they are first used, so that importing the package does not import torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dist_pca.association import CycleAssociationLoss, cycle_association, diffuse
    from dist_pca.model.exported import load_exported

__all__ = ["CycleAssociationLoss", "__version__", "cycle_association", "diffuse", "load_exported"]

__version__ = "0.2.0.dev0"

_MODULES = {
    "CycleAssociationLoss": "dist_pca.association",
    "cycle_association": "dist_pca.association",
    "diffuse": "dist_pca.association",
    "load_exported": "dist_pca.model.exported",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
