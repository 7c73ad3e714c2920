"""`model.*`: which network."""

from typing import Annotated, Literal

from pydantic import Field, model_validator
from typing_extensions import Self

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
    Association and `objective.source_contrast` alone reach the projection."""
    association_stride: Literal[4, 8, 16, 32] | None = None
    """Stride of these features: the map is averaged over cells to a coarser one, or upsampled bilinearly to a finer
    one. None takes the map's own, and for the projection that of the deepest map."""
    projection_channels: Positive = 256
    """Width of the projection."""
    drop_path: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Stochastic depth: rate at which the backbone's last block is skipped in training; earlier ones are less often.
    Most of timm's families take it."""
    activation_checkpointing: bool = False
    """Keep only the activations between the backbone's stages or blocks and compute the others anew in backward: less
    memory for about a third more time, with the same gradients and running statistics."""
    compile: bool = False
    """Compile the backbone with torch.compile; the first steps take minutes. Needs a C++ compiler, and on GPUs Triton.
    Not under ZeRO 3, whose hooks gather parameters between the operations that a compiler would fuse."""
    joint_batch: bool = True
    """Pass all views through the network as one batch, which batch norm normalises as one, rather than in turn."""
    running_statistics: Literal["all", "target"] = "all"
    """Images that move batch norm's running statistics, by which evaluation and the teacher normalise: all of them, or
    the target's alone (adaptive batch normalisation, Li et al. 2017). `target` needs joint_batch=false."""

    @model_validator(mode="after")
    def _check_statistics(self) -> Self:
        if self.running_statistics == "target" and self.joint_batch:
            raise ValueError(
                "running_statistics: `target` needs passes of its own for the target; set model.joint_batch=false too"
            )
        return self
