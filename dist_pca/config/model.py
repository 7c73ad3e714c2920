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
    head: Literal["deeplab_v2", "pyramid", "daformer", "mlp"] = "deeplab_v2"
    """`deeplab_v2`: four dilated convolutions, summed, on the deepest map. The others fuse the maps of all strides at
    `head_stride`. `pyramid`: adds them from the deepest upwards; the cheapest. `mlp`: puts them side by side and fuses
    them by a linear layer, as SegFormer does. `daformer`: sees them side by side through convolutions of several
    dilations, as DAFormer does; the dearest."""
    head_channels: Positive = 128
    """Width of every head but deeplab_v2."""
    head_stride: Literal[4, 8, 16, 32] = 4
    """Stride of the logits of every head but deeplab_v2; what is thinner cannot be drawn. Maps that are finer are left
    out. Where all maps are coarser, a plain transformer's are upsampled by learned steps of two (a patch of 14 pixels
    comes to 3.5, 7 or 14), and other backbones give the finest that they have."""
    batch_norm: Literal["local", "sync", "frozen"] = "local"
    """Batch-norm statistics per rank, over all ranks, or the pretrained ones held fixed."""
    association_features: Literal["backbone", "head", "projection"] = "backbone"
    """Which pixel features are associated: the backbone's deepest map, what the head's classifier reads, or a
    projection that is learned with them: all maps on one grid through two 1 x 1 convolutions, as in PiPa and SePiCo.
    No other loss reaches the projection."""
    association_stride: Literal[4, 8, 16, 32] | None = None
    """Stride of these features: the map is averaged over cells to a coarser one, or upsampled bilinearly to a finer
    one. None takes the map's own, and for the projection that of the deepest map."""
    projection_channels: Positive = 256
    """Width of the projection."""
    activation_checkpointing: bool = False
    """Keep only the activations between the backbone's stages or blocks and compute the others anew in backward: less
    memory for about a third more time, with the same gradients and running statistics."""
    compile: bool = False
    """Compile the backbone with torch.compile; the first steps take minutes. Needs a C++ compiler, and on GPUs Triton.
    Not under ZeRO 3, whose hooks gather parameters between the operations that a compiler would fuse."""
    joint_batch: bool = True
    """Pass both domains through the network as one batch (shared batch-norm statistics) rather than in turn."""
