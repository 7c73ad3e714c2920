"""Pseudo labels and the loss on them, on one rank and on several."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from dist_pca.objective.self_training import pseudo_label_loss, pseudo_labels, world_confidence
from tests.support.ranks import run_on_ranks


def view(count: int, seed: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(count, 4, 6, 8, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 4, (count, 12, 16), generator=generator)
    labels[:, :2] = 255
    confident, trusted = (torch.rand(count, 12, 16, generator=generator) < share for share in (0.6, 0.3))
    return logits, labels, confident, trusted


def test_labels_are_the_most_probable_class_and_rows_are_ignored_after_confidence() -> None:
    logits = torch.tensor([[4.0, 0.0], [0.0, 0.1]]).view(1, 2, 2, 1).expand(1, 2, 2, 6)
    found = pseudo_labels(logits, torch.Size((8, 6)), threshold=0.9, ignore_top=0.25, ignore_bottom=0.125)
    full = F.interpolate(logits, (8, 6), mode="bilinear", align_corners=False).softmax(dim=1)
    assert found.labels[0, :2].eq(255).all()
    assert found.labels[0, 7:].eq(255).all()
    assert torch.equal(found.labels[0, 2:7], full.argmax(dim=1)[0, 2:7])
    assert torch.equal(found.confident, full.max(dim=1).values >= 0.9)
    assert found.confident[0, 0].all()


def test_columns_at_the_sides_of_an_image_are_ignored_in_crops_that_show_them() -> None:
    logits = torch.zeros(4, 2, 2, 8)
    labels = pseudo_labels(
        logits,
        torch.Size((2, 8)),
        threshold=0.9,
        ignore_sides=0.125,
        # Crops of 8 out of 16 columns, of which two at each side are ignored.
        beside=[(0, 8), (1, 7), (4, 4), (8, 0)],
    ).labels
    ignored = [(crop[0] == 255).nonzero().flatten().tolist() for crop in labels]
    assert ignored == [[0, 1], [0], [], [6, 7]]
    assert torch.equal(labels[:, 0], labels[:, 1])
    whole = pseudo_labels(logits, torch.Size((2, 8)), threshold=0.9, ignore_sides=0.125).labels
    assert (whole[:, :, [0, 7]] == 255).all()
    assert (whole[:, :, 1:7] != 255).all()


def test_every_untrusted_pixel_weighs_the_share_of_confident_ones() -> None:
    logits, labels, confident, trusted = view(3, 0)
    confidence = world_confidence(confident)
    loss, share = pseudo_label_loss(logits, labels, confidence, trusted), confidence.share
    full = F.interpolate(logits.float(), (12, 16), mode="bilinear", align_corners=False)
    q = confident.sum() / confident.numel()
    expected = 0.0
    for image in range(3):
        for row in range(12):
            for column in range(16):
                label = int(labels[image, row, column])
                if label == 255:
                    continue
                entropy = -full[image, :, row, column].log_softmax(dim=0)[label]
                expected += float(entropy * (1.0 if trusted[image, row, column] else q))
    assert float(share) == pytest.approx(float(q))
    assert float(loss) == pytest.approx(expected / labels.numel(), rel=1e-5)


def test_masked_images_trust_no_pixel() -> None:
    logits, labels, confident, _ = view(2, 1)
    confidence, nowhere = world_confidence(confident), torch.zeros_like(confident)
    assert pseudo_label_loss(logits, labels, confidence) == pseudo_label_loss(logits, labels, confidence, nowhere)


def of_rank(rank: int, ranks: int) -> dict[str, Any]:
    logits, labels, confident, trusted = (values.chunk(ranks)[rank] for values in view(4, 2))
    logits.requires_grad_()
    confidence = world_confidence(confident)
    loss, share = pseudo_label_loss(logits, labels, confidence, trusted), confidence.share
    loss.backward()
    assert logits.grad is not None
    # Engines average gradients over ranks.
    return {"loss": loss.detach() / ranks, "share": share, "gradient": logits.grad / ranks}


def test_two_ranks_are_one_process_on_the_whole_batch(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    (whole,) = run_on_ranks(of_rank, 1, tmp_path / "one")
    first, second = run_on_ranks(of_rank, 2, tmp_path / "two")
    assert float(first["share"]) == float(second["share"]) == pytest.approx(float(whole["share"]))
    assert float(first["loss"] + second["loss"]) == pytest.approx(float(whole["loss"]), rel=1e-6)
    torch.testing.assert_close(torch.cat([first["gradient"], second["gradient"]]), whole["gradient"])
