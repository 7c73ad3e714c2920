"""`model.*`: which network."""

from typing import Literal

from dist_pca.config.section import Positive, Section


class ModelConfig(Section):
    """Which network."""

    backbone: str
    """Name of a timm model that can give feature maps."""
    weights: str = "hub"
    """Backbone weights: `hub`, `scratch`, a .safetensors or .pth file, or `package:NAME` for an installed package
    that carries one weight file."""
    output_stride: Literal[4, 8, 16, 32] | None = 8
    """Stride of the deepest feature map where the family can dilate; None leaves the family's own."""
    head: Literal["deeplab_v2", "pyramid"] = "deeplab_v2"
    """`deeplab_v2`: four dilated convolutions, summed, on the deepest map. `pyramid`: fuses all strides."""
    head_channels: Positive = 128
    """Width of the pyramid head."""
    batch_norm: Literal["local", "sync", "frozen"] = "local"
    """Batch-norm statistics per rank, over all ranks, or the pretrained ones held fixed."""
    association_features: Literal["backbone", "head"] = "backbone"
    """Which pixel features are associated: the backbone's deepest map, or what the head's classifier reads."""
    activation_checkpointing: bool = False
    """Keep only the activations between the backbone's stages or blocks and compute the others anew in backward: less
    memory for about a third more time, with the same gradients and running statistics."""
    compile: bool = False
    """Compile the backbone with torch.compile; the first steps take minutes. Needs a C++ compiler, and on GPUs Triton.
    Not under ZeRO 3, whose hooks gather parameters between the operations that a compiler would fuse."""
    joint_batch: bool = True
    """Pass both domains through the network as one batch (shared batch-norm statistics) rather than in turn."""
