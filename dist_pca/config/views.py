"""`data.photometric`: colour augmentation of the student's images."""

from typing import Annotated, Literal

from pydantic import Field

from dist_pca.config.section import Fraction, Section, Weight


class PhotometricConfig(Section):
    """Colour augmentation of the student's images; the teacher's images are not changed."""

    domains: tuple[Literal["source", "target"], ...] = ("source", "target")
    """Domains whose images are augmented; mixed and masked images count as target images."""
    probability: Fraction = 0.0
    """Probability of colour jitter; 0 is off. DACS and DAFormer use 0.8."""
    brightness: Fraction = 0.2
    """Brightness is multiplied by a factor within this distance of 1."""
    contrast: Fraction = 0.2
    """Contrast is multiplied by a factor within this distance of 1."""
    saturation: Fraction = 0.2
    """Saturation of RGB images is multiplied by a factor within this distance of 1."""
    hue: Annotated[float, Field(ge=0, le=0.5)] = 0.2
    """Hue of RGB images is rotated by at most this share of the colour circle."""
    grey_probability: Fraction = 0.0
    """Probability of conversion of RGB images to greyscale. VFM-UDA uses 0.1."""
    blur_probability: Fraction = 0.0
    """Probability of Gaussian blur. DACS and DAFormer use 0.5."""
    blur_sigma: tuple[Weight, Weight] = (0.15, 1.15)
    """Range of the Gaussian blur's standard deviation, in pixels."""

    @property
    def changes(self) -> bool:
        """Whether any augmentation is on."""
        return max(self.probability, self.grey_probability, self.blur_probability) > 0
