import pytest

from dist_pca.classes import LABEL_SETS, label_set


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
