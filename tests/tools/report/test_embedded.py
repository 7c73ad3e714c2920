import numpy as np

from dist_pca.tools.report.embedded import drawing, photo


def test_pictures_of_very_wide_images_are_embedded() -> None:
    pixels = np.zeros((1, 2000, 3), np.uint8)
    assert photo(pixels, alt="", caption="", width=400).size == (400, 1)
    assert drawing(pixels, alt="", caption="", width=400).size == (400, 1)
