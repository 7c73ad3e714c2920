"""`evaluation.*`: how a trained network is evaluated."""

from typing import Annotated

from pydantic import Field, model_validator
from typing_extensions import Self

from dist_pca.config.section import Fraction, Positive, PositiveNumber, Section


class EvaluationConfig(Section):
    """How a trained network is evaluated."""

    input_size: tuple[Positive, Positive] | None = None
    """Height and width to which images are resized; None resizes the shorter edge to the mean of data.shorter_edge."""
    label_sets: tuple[str, ...] = ()
    """Label sets whose mean IoU is reported in addition to that of all classes."""
    window: tuple[Positive, Positive] | None = None
    """Height and width of sliding windows, in pixels of the resized image. Windows bound memory; logits are averaged
    where they overlap. None runs the network on the whole image."""
    stride: tuple[Positive, Positive] | None = None
    """Vertical and horizontal step between windows, in pixels; None is two thirds of the window."""
    flip: bool = False
    """Average class probabilities over the image and its mirror image."""
    scales: Annotated[tuple[PositiveNumber, ...], Field(min_length=1)] = (1.0,)
    """Factors by which the input size is scaled; class probabilities are averaged over them."""
    aggregation: Fraction = 0.0
    """Share of each pixel's features, and then of its class probabilities, that is replaced by the similarity-weighted
    mean over its image or window (test-time aggregation; diffusion in training uses 0.5); 0 is off."""
    boundary_iou: Annotated[float, Field(gt=0, le=1)] | None = None
    """Also score boundaries (boundary IoU, Cheng et al. 2021): their width as a share of the image's diagonal, rounded
    to pixels and at least 1; the paper takes 0.02. None does not."""
    class_map: dict[str, str] = {}
    """Class of the run that a class of the shards is scored as, where their names differ: {"traffic_light": "traffic
    light"}. Several classes of the shards may be one of the run."""

    def network_sizes(self, input_size: tuple[int, int]) -> set[tuple[int, int]]:
        """Heights and widths of what the network gets of an image: windows of it, or all of it, at every scale.

        Args:
            input_size: Height and width of the resized image at scale 1.
        """
        sizes = set()
        for scale in self.scales:
            edges = [max(1, round(edge * scale)) for edge in input_size]
            window = self.window or edges
            inside = [min(edge, longest) for edge, longest in zip(edges, window, strict=True)]
            sizes.add((inside[0], inside[1]))
        return sizes

    @model_validator(mode="after")
    def _check_stride(self) -> Self:
        if self.stride is not None:
            if self.window is None:
                raise ValueError("stride: has no effect without a window; set evaluation.window too")
            if any(step > edge for step, edge in zip(self.stride, self.window, strict=True)):
                raise ValueError(
                    f"stride: {list(self.stride)} leaves gaps between windows of {list(self.window)}; lower it"
                )
        return self
