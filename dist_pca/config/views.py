"""`data.photometric`: how the student sees colours."""

from typing import Annotated, Literal

from pydantic import Field

from dist_pca.config.section import Fraction, Section, Weight


class PhotometricConfig(Section):
    """Colour changes of the images that the student sees; the teacher sees them as they are."""

    domains: tuple[Literal["source", "target"], ...] = ("source", "target")
    """Domains whose images are changed; mixed and masked images are the target's."""
    probability: Fraction = 0.0
    """Share of images whose colours are jittered; 0 is off. DACS and DAFormer take 0.8."""
    brightness: Fraction = 0.2
    """Brightness is multiplied by a factor within this distance of 1."""
    contrast: Fraction = 0.2
    """Contrast is multiplied by a factor within this distance of 1."""
    saturation: Fraction = 0.2
    """Saturation is multiplied by a factor within this distance of 1."""
    hue: Annotated[float, Field(ge=0, le=0.5)] = 0.2
    """Hue is turned by at most this share of the colour circle."""
    grey_probability: Fraction = 0.0
    """Share of images made grey. VFM-UDA takes 0.1."""
    blur_probability: Fraction = 0.0
    """Share of images that are blurred. DACS and DAFormer take 0.5."""
    blur_sigma: tuple[Weight, Weight] = (0.15, 1.15)
    """Range of the Gaussian blur's standard deviation, in pixels."""

    @property
    def changes(self) -> bool:
        """Whether any image is changed."""
        return max(self.probability, self.grey_probability, self.blur_probability) > 0
