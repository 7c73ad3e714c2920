"""An error map marks what is wrong and leaves out what has no label."""

import numpy as np

from dist_pca.tools.report.targets import UNLABELLED, WRONG, error_map


def test_wrong_pixels_are_marked_and_their_share_is_that_of_labelled_ones() -> None:
    image = np.zeros((1, 4, 3), np.uint8)
    truth, label = (np.array([values], np.uint8) for values in ([0, 1, 255, 2], [0, 2, 1, 2]))
    drawn, share = error_map(image, truth, label)
    assert share == 1 / 3
    assert drawn[0, 2].tolist() == list(UNLABELLED)
    assert drawn[0, 0].tolist() == drawn[0, 3].tolist() == [40, 40, 40]
    assert drawn[0, 1, 0] > 0.7 * WRONG[0]
    assert error_map(image, np.full((1, 4), 255, np.uint8), label)[1] == 0
