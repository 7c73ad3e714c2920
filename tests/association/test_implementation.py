"""One implementation is chosen for a call, and named."""

import logging

import pytest

from dist_pca.association import cycle_association
from dist_pca.association.loss import _log_once
from tests.association.pixels import CLASSES, domain, labels_of


def test_the_choice_of_implementation_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    source, target, labels = domain(9, 6, "cosine", 0), domain(8, 6, "cosine", 1), labels_of(9, 0)
    _log_once.cache_clear()
    with caplog.at_level(logging.INFO, logger="dist_pca.association"):
        for _ in range(3):
            cycle_association(source, target, labels, num_classes=CLASSES)
    assert caplog.messages == ["association: blockwise, matmuls in fp32, candidates: each rank's own pixels"]


def test_triton_on_a_device_that_cannot_run_it_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    source, target, labels = domain(9, 6, "cosine", 0), domain(8, 6, "cosine", 1), labels_of(9, 0)
    with pytest.raises(ValueError, match="implementation=triton cannot run on cpu: it needs Triton and an NVIDIA GPU"):
        cycle_association(source, target, labels, num_classes=CLASSES, implementation="triton")
