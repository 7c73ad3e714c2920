import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchmetrics.classification import MulticlassConfusionMatrix, MulticlassJaccardIndex

from dist_pca.evaluation.confusion import confusion_matrix, f1, iou, mean, pixel_accuracy, precision, recall

CLASSES = 4
IGNORE = 255
pixels = st.lists(
    st.tuples(st.integers(0, CLASSES - 1), st.sampled_from([0, 1, 2, 3, IGNORE])), min_size=1, max_size=60
)


def tensors(pairs: list[tuple[int, int]]) -> tuple[torch.Tensor, torch.Tensor]:
    prediction, label = zip(*pairs, strict=True)
    return torch.tensor(prediction, dtype=torch.uint8), torch.tensor(label, dtype=torch.uint8)


@given(pixels)
def test_counts_equal_those_of_torchmetrics(pairs: list[tuple[int, int]]) -> None:
    prediction, label = tensors(pairs)
    expected = MulticlassConfusionMatrix(CLASSES, ignore_index=IGNORE)(prediction.long(), label.long())
    counts = confusion_matrix(prediction, label, CLASSES, IGNORE)
    assert counts.dtype == torch.int64
    assert torch.equal(counts, expected)


@given(pixels)
def test_iou_of_the_classes_that_occur_equals_that_of_torchmetrics(pairs: list[tuple[int, int]]) -> None:
    prediction, label = tensors(pairs)
    metric = MulticlassJaccardIndex(CLASSES, average="none", ignore_index=IGNORE)
    values = iou(confusion_matrix(prediction, label, CLASSES, IGNORE))
    occur = ~values.isnan()
    torch.testing.assert_close(values[occur].float(), metric(prediction.long(), label.long())[occur])


@given(pixels)
def test_a_class_has_no_iou_exactly_where_it_is_in_neither_truth_nor_prediction(pairs: list[tuple[int, int]]) -> None:
    counted = [(prediction, label) for prediction, label in pairs if label != IGNORE]
    present = {value for pair in counted for value in pair}
    values = iou(confusion_matrix(*tensors(pairs), CLASSES, IGNORE))
    assert [value.isnan().item() for value in values] == [index not in present for index in range(CLASSES)]


@given(pixels, pixels)
def test_counts_of_two_images_add_up_to_those_of_both(
    first: list[tuple[int, int]], second: list[tuple[int, int]]
) -> None:
    parts = [confusion_matrix(*tensors(pairs), CLASSES, IGNORE) for pairs in (first, second)]
    assert torch.equal(parts[0] + parts[1], confusion_matrix(*tensors(first + second), CLASSES, IGNORE))


@given(pixels)
def test_precision_recall_and_f1_are_shares_of_the_sets_of_pixels(pairs: list[tuple[int, int]]) -> None:
    counts = confusion_matrix(*tensors(pairs), CLASSES, IGNORE)
    counted = [(index, *pair) for index, pair in enumerate(pairs) if pair[1] != IGNORE]
    for class_index in range(CLASSES):
        predicted = {index for index, prediction, _ in counted if prediction == class_index}
        true = {index for index, _, label in counted if label == class_index}
        found = [values(counts)[class_index].item() for values in (precision, recall, f1)]
        expected = [
            len(predicted & true) / len(predicted) if predicted else math.nan,
            len(predicted & true) / len(true) if true else math.nan,
            2 * len(predicted & true) / (len(predicted) + len(true)) if predicted or true else math.nan,
        ]
        assert found == pytest.approx(expected, nan_ok=True)


def test_rows_are_the_truth() -> None:
    counts = confusion_matrix(torch.tensor([1, 1, 0]), torch.tensor([0, 1, 0]), 2, IGNORE)
    assert counts.tolist() == [[1, 1], [0, 1]]


def test_means_leave_absent_classes_out() -> None:
    counts = torch.tensor([[3, 1, 0], [0, 4, 0], [0, 0, 0]])
    assert mean(iou(counts)) == pytest.approx((3 / 4 + 4 / 5) / 2)
    assert mean(iou(counts), [0, 2]) == pytest.approx(3 / 4)
    assert math.isnan(mean(iou(counts), [2]))


def test_pixels_taken_for_a_class_outside_the_subset_still_count() -> None:
    counts = torch.tensor([[6, 0, 2], [0, 5, 0], [2, 0, 9]])
    assert mean(iou(counts), [0, 1]) == pytest.approx((6 / 10 + 1) / 2)


def test_pixel_accuracy_is_the_share_of_counted_pixels_predicted_right() -> None:
    counts = confusion_matrix(torch.tensor([0, 1, 1, 0]), torch.tensor([0, 1, 0, IGNORE]), 2, IGNORE)
    assert pixel_accuracy(counts) == pytest.approx(2 / 3)
    assert math.isnan(pixel_accuracy(torch.zeros(2, 2, dtype=torch.int64)))


def test_counts_stay_exact_beyond_the_integers_of_single_precision() -> None:
    counts = torch.tensor([[2**40 + 1, 1], [0, 0]])
    assert pixel_accuracy(counts) == (2**40 + 1) / (2**40 + 2)


def test_every_pixel_of_a_large_image_is_counted_once() -> None:
    label = torch.zeros(2049, 2048, dtype=torch.uint8)
    label[-1, -1] = IGNORE
    label[-1, :5] = 1
    counts = confusion_matrix(torch.zeros_like(label), label, CLASSES, IGNORE)
    assert counts[:, 0].tolist() == [label.numel() - 6, 5, 0, 0]
    assert counts.sum() == label.numel() - 1


def test_a_label_that_is_no_class_is_refused() -> None:
    with pytest.raises(ValueError, match="neither below 2 nor the ignore index 255"):
        confusion_matrix(torch.tensor([0]), torch.tensor([2]), 2, IGNORE)
