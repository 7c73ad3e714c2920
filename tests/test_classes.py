import pytest

from dist_pca.classes import LABEL_SETS, ClassInfo, check_classes, label_set


@pytest.mark.parametrize(("name", "count"), [("cityscapes_19", 19), ("synthia_16", 16), ("synthia_13", 13)])
def test_label_sets_keep_cityscapes_order_and_have_distinct_colours(name: str, count: int) -> None:
    classes = label_set(name)
    assert tuple(info.name for info in classes) == LABEL_SETS[name]
    assert len({info.color for info in classes}) == count
    order = LABEL_SETS["cityscapes_19"].index
    assert sorted(LABEL_SETS[name], key=order) == list(LABEL_SETS[name])


def test_synthia_sets_leave_out_what_the_paper_leaves_out() -> None:
    assert set(LABEL_SETS["cityscapes_19"]) - set(LABEL_SETS["synthia_16"]) == {"terrain", "truck", "train"}
    assert set(LABEL_SETS["synthia_16"]) - set(LABEL_SETS["synthia_13"]) == {"wall", "fence", "pole"}


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ((), "0 classes where 1 to 254 can be"),
        (tuple(ClassInfo(str(index), (0, 0, 0)) for index in range(255)), "255 classes"),
        ((ClassInfo("a\nb", (0, 0, 0)),) * 2, r"class 1: 'a\\nb' is listed twice"),
        ((ClassInfo("road", (0, 256, 0)),), r"class 0: colour \[0, 256, 0\] is not in 0\.\.255"),
        ((ClassInfo("road", (0, 0, -1)),), r"class 0: colour \[0, 0, -1\]"),
    ],
)
def test_a_table_that_labels_cannot_have_is_refused(classes: tuple[ClassInfo, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_classes(classes)


def test_the_largest_table_is_one() -> None:
    check_classes(tuple(ClassInfo(str(index), (0, 0, 0)) for index in range(254)))
