"""`model.*`: the network."""

from typing import Annotated, Literal

from pydantic import Field, model_validator
from typing_extensions import Self

from dist_pca.config.section import Positive, Section


class ModelConfig(Section):
    """The network: backbone, head, and the features that are associated."""

    backbone: str
    """Name of a timm model that can return feature maps."""
    weights: str = "hub"
    """Backbone weights: `hub`, `scratch`, a .safetensors or .pth file, or `package:NAME` for an installed package
    that carries one weight file."""
    init_from: str | None = None
    """A trained segmenter to start from in place of `weights`: a run folder (its newest checkpoint), a checkpoint or a
    folder that `dist-pca export` wrote; of a checkpoint with a moving average, that is used. The head is used too if
    the classes are the same and it has the same shape, and starts anew otherwise."""
    freeze: tuple[str, ...] = ()
    """Parts of the backbone that are not trained: `backbone` for all of it, `stem`, or modules by timm's names, such
    as `layer1`, `stages.0` or `blocks.0`. Their batch norms keep their statistics."""
    output_stride: Literal[4, 8, 16, 32] | None = 8
    """Stride of the deepest feature map, for backbones that can be dilated; None keeps the backbone's own."""
    image_size: tuple[Positive, Positive] | None = None
    """Height and width of the images for which timm builds a backbone of a fixed size, such as BEiT or MaxViT. None
    takes data.crop if the backbone cannot take such crops otherwise; most backbones take images of any size."""
    bands: Annotated[int, Field(ge=1, le=1000)] | None = None
    """Bands of the images that the network takes. None takes as many as the shards have, or three where there are no
    shards. Pretrained weights, mean and standard deviation are those of RGB. Other bands have them repeated in turn,
    and one band has the sum of the weights and the mean of the others."""
    head: Literal["deeplab_v2", "pyramid", "daformer", "mlp"] = "deeplab_v2"
    """`deeplab_v2`: sum of four dilated convolutions on the deepest map. The other heads fuse the maps of all strides
    at `head_stride`. `pyramid`: top-down sum; the cheapest. `mlp`: concatenation and a linear layer, as in SegFormer.
    `daformer`: concatenation and convolutions of several dilations, as in DAFormer; the most expensive."""
    head_channels: Positive = 128
    """Channels of every head but deeplab_v2."""
    head_stride: Literal[4, 8, 16, 32] = 4
    """Stride of the logits of every head but deeplab_v2; thinner objects cannot be segmented. Finer maps are not used.
    If all maps are coarser, those of a plain vision transformer are upsampled by learned factors of two (a patch size
    of 14 pixels gives stride 3.5, 7 or 14), and other backbones use their finest map."""
    batch_norm: Literal["local", "sync", "frozen"] = "local"
    """Batch-norm statistics: of each rank, over all ranks, or the pretrained ones, kept fixed."""
    association_features: Literal["backbone", "head", "projection"] = "backbone"
    """Which pixel features are associated: the backbone's deepest map, the input of the head's classifier, or a
    learned projection (all maps on one grid through two 1 x 1 convolutions, as in PiPa and SePiCo). Only association,
    `objective.source_contrast` and `objective.class_statistics` train the projection."""
    association_stride: Literal[4, 8, 16, 32] | None = None
    """Stride of the associated features: the map is average-pooled to a coarser stride or upsampled bilinearly to a
    finer one. None keeps the map's own stride; for the projection it is that of the deepest map. Upsampling by more
    than two repeats pixels at the image's border, and rounding decides which of those is matched."""
    projection_channels: Positive = 256
    """Output channels of the projection."""
    drop_path: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Stochastic depth: probability of skipping the backbone's last block in training; it is lower for earlier blocks.
    Most timm models support it."""
    activation_checkpointing: bool = False
    """Keep only the activations between the backbone's stages or blocks and recompute the others in the backward pass:
    less memory for about a third more time, with the same gradients and running statistics."""
    compile: bool = False
    """Compile the backbone with torch.compile; the first steps take minutes. Needs a C++ compiler, and on GPUs Triton.
    Not available under ZeRO 3, whose hooks gather parameters between operations that the compiler would fuse."""
    joint_batch: bool = True
    """Run the network once on the batch of all views, so that batch norm normalises them together; False runs it once
    per view."""
    running_statistics: Literal["all", "target"] = "all"
    """Images that update batch norm's running statistics, which evaluation and the teacher use: all of them, or those
    of the target only (adaptive batch normalisation, Li et al. 2017). `target` needs joint_batch=false."""

    @model_validator(mode="after")
    def _check_statistics(self) -> Self:
        if self.running_statistics == "target" and self.joint_batch:
            raise ValueError(
                "running_statistics: `target` needs a separate pass of the target; set model.joint_batch=false too"
            )
        return self
