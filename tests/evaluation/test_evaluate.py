import csv
import io
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dist_pca.classes import ClassInfo
from dist_pca.config import RunConfig
from dist_pca.errors import UserError
from dist_pca.evaluation.confusion import confusion_matrix
from dist_pca.evaluation.evaluate import evaluate, write_predictions
from dist_pca.evaluation.inference import predict
from dist_pca.evaluation.prediction_files import prediction_values
from dist_pca.evaluation.report import Scores, score
from dist_pca.model.segmenter import Segmenter, build_segmenter
from dist_pca.shards.manifest import Manifest, load_manifest
from tests.support.ranks import run_on_ranks
from tests.support.shards import CLASSES, HEIGHT, WIDTH, sample_members, write_shards


def run(**evaluation: object) -> RunConfig:
    return RunConfig.model_validate(
        {
            "name": "test",
            "data": {"source": "s", "target": "t", "shorter_edge": (20, 28), "crop": (16, 16), "workers": 0},
            "model": {"backbone": "test_resnet", "weights": "scratch", "head": "pyramid", "head_channels": 8},
            "training": {"steps": 1},
            "evaluation": evaluation,
        }
    )


def segmenter() -> Segmenter:
    """A network that predicts every class somewhere."""
    torch.manual_seed(3)
    network = build_segmenter(run().model, len(CLASSES))
    torch.nn.init.normal_(network.head.get_parameter("classifier.weight"))
    return network


def scores_on_rank(
    rank: int, world_size: int, folder: Path, predictions: Path | None = None, score_folder: Path | None = None
) -> str:
    return evaluate(
        segmenter(),
        load_manifest(folder),
        CLASSES,
        run(boundary_iou=0.05),
        device="cpu",
        predictions=predictions,
        score_folder=score_folder,
    ).to_json()


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    folder = tmp_path_factory.mktemp("shards") / "labelled"
    return write_shards(
        folder, [[sample_members(seed) for seed in (0, 1, 2)], [sample_members(seed) for seed in (3, 4)]]
    )


def expected_scores(classes: int = len(CLASSES)) -> Scores:
    """The same counted by hand from the samples' own bytes."""
    network = segmenter().eval()
    counts = torch.zeros(classes, classes, dtype=torch.int64)
    for seed in range(5):
        members = sample_members(seed)
        image, label = (torch.from_numpy(decode(members[name])) for name in ("png", "label.png"))
        prediction = predict(network, image.permute(2, 0, 1)[None], (HEIGHT, WIDTH), (HEIGHT, WIDTH))
        counts += confusion_matrix(prediction[0], label, classes, 255)
    return score(counts, CLASSES, 5)


def decode(content: bytes) -> np.ndarray:
    return np.array(Image.open(io.BytesIO(content)))


def test_every_image_is_scored_once(manifest: Manifest) -> None:
    scores = evaluate(segmenter(), manifest, CLASSES, run(), device="cpu")
    assert scores == expected_scores()
    assert scores.images == 5
    assert 0 < scores.mean_iou < 1
    assert min(scores.iou) > 0


def test_scores_and_their_files_are_equal_on_any_number_of_ranks(manifest: Manifest, tmp_path: Path) -> None:
    single = scores_on_rank(0, 1, manifest.folder, None, tmp_path / "one")
    assert run_on_ranks(scores_on_rank, 2, tmp_path, manifest.folder, None, tmp_path / "two") == [single, single]
    one, two = (
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir() if path.suffix != ".png"}
        for name in ("one", "two")
    )
    assert sorted(one) == ["classes.csv", "confusion.csv", "images.csv", "scores.json"]
    assert one == two


def test_score_files_hold_what_each_image_and_all_of_them_are_scored(manifest: Manifest, tmp_path: Path) -> None:
    scores = evaluate(segmenter(), manifest, CLASSES, run(), device="cpu", score_folder=tmp_path / "out")
    assert json.loads((tmp_path / "out" / "scores.json").read_text()) == json.loads(scores.to_json())
    with (tmp_path / "out" / "images.csv").open(newline="") as file:
        images = list(csv.DictReader(file))
    assert [line["image"] for line in images] == [key for shard in manifest.shards for key in shard.keys]
    alone = write_shards(tmp_path / "alone", [[sample_members(3)]])
    of_one = evaluate(segmenter(), alone, CLASSES, run(), device="cpu")
    assert float(images[3]["mean_iou"]) == of_one.mean_iou
    assert [float(images[3][f"iou {info.name}"]) for info in CLASSES] == list(of_one.iou)
    with (tmp_path / "out" / "confusion.csv").open(newline="") as file:
        lines = list(csv.reader(file))
    counts = torch.tensor([[int(cell) for cell in line[1:]] for line in lines[1:]])
    assert lines[0][1:] == [line[0] for line in lines[1:]] == [info.name for info in CLASSES]
    assert score(counts, CLASSES, 5) == scores
    assert sum(int(line["pixels"]) for line in images) == int(counts.sum())


def renamed(manifest: Manifest, *names: str) -> Manifest:
    return replace(manifest, classes=tuple(ClassInfo(name, (0, 0, 0)) for name in names))


def test_classes_of_another_spelling_are_out_of_the_mean_unless_they_are_mapped(manifest: Manifest) -> None:
    expected = expected_scores()
    other = renamed(manifest, "road", "the sky", "car")
    lacking = evaluate(segmenter(), other, CLASSES, run(), device="cpu")
    assert lacking.missing_classes == ("sky",)
    assert math.isnan(lacking.iou[1])
    assert lacking.mean_iou == pytest.approx((lacking.iou[0] + lacking.iou[2]) / 2)
    mapped = evaluate(segmenter(), other, CLASSES, run(class_map={"the sky": "sky"}), device="cpu")
    assert mapped == expected


def test_several_classes_of_the_shards_may_be_one_of_the_run(manifest: Manifest) -> None:
    vehicles = run(class_map={"car": "sky"})
    scores = evaluate(segmenter(), manifest, CLASSES, vehicles, device="cpu")
    assert scores.missing_classes == ("car",)
    labels = [torch.from_numpy(decode(sample_members(seed)["label.png"])) for seed in range(5)]
    assert scores.recall[1] == pytest.approx(
        sum(int(((label == 1) | (label == 2))[predicted(seed) == 1].sum()) for seed, label in enumerate(labels))
        / sum(int(((label == 1) | (label == 2)).sum()) for label in labels)
    )


def predicted(seed: int) -> torch.Tensor:
    image = torch.from_numpy(decode(sample_members(seed)["png"]))
    return predict(segmenter().eval(), image.permute(2, 0, 1)[None], (HEIGHT, WIDTH), (HEIGHT, WIDTH))[0]


def write_on_rank(rank: int, world_size: int, folder: Path, out: Path) -> int:
    manifest = load_manifest(folder)
    values = prediction_values(CLASSES, "train-ids", manifest)
    write_predictions(segmenter(), manifest, CLASSES, run(), out, values, device="cpu")
    return rank


@pytest.mark.parametrize("world_size", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_unlabelled_shards_are_predicted_in_the_coding_asked_for(tmp_path: Path, world_size: int) -> None:
    shards = tmp_path / "shards"
    write_shards(shards, [[sample_members(seed, labelled=False) for seed in range(3)]], labelled=False)
    if world_size == 1:
        write_on_rank(0, 1, shards, tmp_path / "out")
    else:
        run_on_ranks(write_on_rank, world_size, tmp_path, shards, tmp_path / "out")
    files = sorted((tmp_path / "out").iterdir())
    assert [path.name for path in files] == ["0.png", "1.png", "2.png"]
    for seed, path in enumerate(files):
        assert np.array_equal(decode(path.read_bytes()), predicted(seed).numpy())


def test_every_views_protocol_changes_what_is_scored(manifest: Manifest) -> None:
    plain = evaluate(segmenter(), manifest, CLASSES, run(), device="cpu")
    for keys in ({"flip": True}, {"scales": (2.0,)}, {"window": (12, 20)}, {"aggregation": 0.5}):
        assert evaluate(segmenter(), manifest, CLASSES, run(**keys), device="cpu") != plain, keys


@pytest.mark.parametrize("world_size", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_predictions_are_written_once_by_all_ranks_and_give_the_scores(
    manifest: Manifest, tmp_path: Path, world_size: int
) -> None:
    if world_size == 1:
        scores_on_rank(0, 1, manifest.folder, tmp_path / "out")
    else:
        run_on_ranks(scores_on_rank, world_size, tmp_path, manifest.folder, tmp_path / "out")
    files = sorted((tmp_path / "out").iterdir())
    # Names of the samples' source files.
    assert [path.name for path in files] == ["0.png", "1.png", "2.png", "3.png", "4.png"]
    raw = torch.stack([torch.from_numpy(decode(path.read_bytes())) for path in files])
    assert sorted(raw.unique().tolist()) == [7, 23, 26]
    counts = torch.zeros(3, 3, dtype=torch.int64)
    for seed, ids in enumerate(raw):
        label = torch.from_numpy(decode(sample_members(seed)["label.png"]))
        counts += confusion_matrix((ids == 23) + 2 * (ids == 26).long(), label, 3, 255)
    assert score(counts, CLASSES, 5) == expected_scores()


def test_predictions_of_other_classes_are_train_ids(manifest: Manifest, tmp_path: Path) -> None:
    classes = (*CLASSES[:2], ClassInfo("tree", (0, 0, 0)))
    evaluate(segmenter(), manifest, classes, run(), device="cpu", predictions=tmp_path / "out")
    values = {int(value) for path in (tmp_path / "out").iterdir() for value in np.unique(decode(path.read_bytes()))}
    assert values == {0, 1, 2}


def test_no_predictions_are_left_of_an_evaluation_that_failed(manifest: Manifest, tmp_path: Path) -> None:
    calls = 0

    def fail_late(*_: object) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise UserError("sample 3")

    model = segmenter()
    model.register_forward_pre_hook(fail_late)
    with pytest.raises(UserError, match="sample 3"):
        evaluate(model, manifest, CLASSES, run(), device="cpu", predictions=tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_predictions_are_not_written_over_others(manifest: Manifest, tmp_path: Path) -> None:
    (tmp_path / "theirs").write_text("x")
    model = segmenter()
    model.register_forward_pre_hook(lambda *_: pytest.fail("the network ran"))
    with pytest.raises(UserError, match=r"^--write-predictions .*: exists already"):
        evaluate(model, manifest, CLASSES, run(), device="cpu", predictions=tmp_path)


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_in_its_mode_and_with_its_weights(manifest: Manifest, training: bool) -> None:
    model = segmenter().train(training)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    evaluate(model, manifest, CLASSES, run(), device="cpu")
    assert model.training is training
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_labels_of_classes_that_the_model_does_not_know_are_ignored(manifest: Manifest) -> None:
    torch.manual_seed(3)
    model = build_segmenter(run().model, 1)
    scores = evaluate(model, manifest, CLASSES[:1], run(), device="cpu")
    assert scores.iou == (1.0,)


def test_shards_without_labels_are_refused(tmp_path: Path) -> None:
    manifest = write_shards(tmp_path / "shards", [[sample_members(0, labelled=False)]], labelled=False)
    with pytest.raises(UserError, match=r"^shards .*: have no labels"):
        evaluate(segmenter(), manifest, CLASSES, run(), device="cpu")


def test_a_label_set_that_does_not_fit_is_refused_before_anything_runs(manifest: Manifest) -> None:
    model = segmenter()
    model.register_forward_pre_hook(lambda *_: pytest.fail("the network ran"))
    with pytest.raises(UserError, match=r"^evaluation\.label_sets: synthia_13 needs sidewalk"):
        evaluate(model, manifest, CLASSES, run(label_sets=("synthia_13",)), device="cpu")


def test_shards_of_other_classes_are_refused(manifest: Manifest) -> None:
    with pytest.raises(UserError, match="none of the classes"):
        evaluate(segmenter(), manifest, (ClassInfo("mountain", (0, 0, 0)),), run(), device="cpu")
