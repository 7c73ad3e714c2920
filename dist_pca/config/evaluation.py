"""`evaluation.*`: how a trained network is tested."""

from typing import Annotated

from pydantic import Field, model_validator
from typing_extensions import Self

from dist_pca.config.section import Fraction, Positive, Section


class EvaluationConfig(Section):
    """How a trained network is tested."""

    input_size: tuple[Positive, Positive] | None = None
    """Height and width images are resized to; None resizes the shorter edge to the mean of data.shorter_edge."""
    label_sets: tuple[str, ...] = ()
    """Named subsets whose mean IoU is reported beside the whole table's."""
    window: tuple[Positive, Positive] | None = None
    """Height and width, in pixels of the resized image, of windows that the network sees one after another, which
    bounds memory; logits are averaged where they overlap. None shows it the whole image."""
    stride: tuple[Positive, Positive] | None = None
    """Pixels from one window to the next, down and across; None is two thirds of the window."""
    flip: bool = False
    """Average class probabilities with those of the mirrored image."""
    scales: Annotated[tuple[Annotated[float, Field(gt=0)], ...], Field(min_length=1)] = (1.0,)
    """Factors of the input size at which the network sees the image; class probabilities are averaged."""
    aggregation: Fraction = 0.0
    """Share of each position's features, then of its class probabilities, that is replaced by the similarity-weighted
    mean of its image, or of its window (test-time aggregation; training's diffusion takes 0.5); 0 is off."""

    @model_validator(mode="after")
    def _check_stride(self) -> Self:
        if self.stride is not None:
            if self.window is None:
                raise ValueError("stride: there is no window to move; set evaluation.window too")
            if any(step > edge for step, edge in zip(self.stride, self.window, strict=True)):
                raise ValueError(
                    f"stride: {list(self.stride)} leaves gaps between windows of {list(self.window)}; lower it"
                )
        return self
