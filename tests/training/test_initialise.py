"""A run that starts from a whole trained segmenter."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dist_pca.classes import ClassInfo
from dist_pca.config import ModelConfig
from dist_pca.errors import UserError
from dist_pca.model.exported import save_exported
from dist_pca.model.segmenter import Segmenter, build_segmenter
from dist_pca.training.initialise import initialise
from tests.support.networks import CLASSES, run_config, segmenter, write_run

OTHERS = (*CLASSES[:2], ClassInfo("bus", (1, 2, 3)))


def initialised(
    path: Path, classes: tuple[ClassInfo, ...] = CLASSES, **keys: object
) -> tuple[Segmenter, dict[str, torch.Tensor]]:
    """A network that starts from a path, and what it was before."""
    torch.manual_seed(11)
    values = {"head_channels": 8, "head": "pyramid", "init_from": str(path), **keys}
    config = ModelConfig.model_validate({"backbone": "test_resnet", "output_stride": 8, **values})
    model = build_segmenter(config, len(classes))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    initialise(model, config, classes)
    return model, before


def assert_from(model: Segmenter, origin: Segmenter, *parts: str) -> None:
    state, wanted = model.state_dict(), origin.state_dict()
    for name in state:
        if name.startswith(parts):
            assert torch.equal(state[name], wanted[name]), name


def test_a_runs_newest_checkpoint_gives_backbone_and_head(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    older, newest = segmenter(), segmenter()
    torch.nn.init.normal_(older.head.get_parameter("classifier.weight"))
    run = write_run(tmp_path, older, newest)
    with caplog.at_level("INFO", logger="dist_pca.training"):
        model, _ = initialised(run)
    assert_from(model, newest, "")
    count = len(newest.backbone.body.state_dict())
    (line,) = caplog.messages
    assert line == (
        f"model.init_from: loaded {count} tensors of test_resnet from {run}/checkpoints/step-00000002/"
        "model.safetensors, and the head"
    )
    model, _ = initialised(run / "checkpoints" / "step-00000001")
    assert_from(model, older, "")


def test_a_moving_average_is_used_where_there_is_one_and_a_file_can_be_named(tmp_path: Path) -> None:
    trained, average = segmenter(), segmenter()
    for parameter in average.parameters():
        parameter.data.add_(1)
    run = write_run(tmp_path, trained)
    checkpoint = run / "checkpoints" / "step-00000001"
    save_file(average.state_dict(), checkpoint / "ema.safetensors")
    assert_from(initialised(run)[0], average, "")
    assert_from(initialised(checkpoint / "model.safetensors")[0], trained, "")


def test_an_exported_network_is_a_start(tmp_path: Path) -> None:
    network = segmenter()
    # Weights of another tag may expect other values.
    network.mean.fill_(0.25)
    save_exported(tmp_path, network, run_config().model, CLASSES, input_size=None, shorter_edge=24)
    assert_from(initialised(tmp_path)[0], network, "")


@pytest.mark.parametrize(
    ("classes", "keys", "reason"),
    [
        (OTHERS, {}, "the head, as its 3 classes are not those of this run"),
        (CLASSES[:2], {}, "the head, as its 3 classes are not those of this run"),
        (CLASSES[::-1], {}, "the head, as its 3 classes are not those of this run"),
        (CLASSES, {"head": "mlp"}, "the head, as model.head or its size is another one"),
        (CLASSES, {"head_channels": 16}, "the head, as model.head or its size is another one"),
        (CLASSES, {"association_features": "projection"}, "the projection, as there is none of this size"),
    ],
)
def test_what_does_not_fit_starts_anew_and_is_named(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    classes: tuple[ClassInfo, ...],
    keys: dict[str, object],
    reason: str,
) -> None:
    network = segmenter()
    with caplog.at_level("INFO", logger="dist_pca.training"):
        model, before = initialised(write_run(tmp_path, network), classes, **keys)
    assert_from(model, network, "backbone.", "mean", "std")
    new = "projection." if "projection" in reason else "head."
    state = model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in before.items() if name.startswith(new))
    assert caplog.messages[0].endswith(f"; new from the start: {reason}")


def test_a_segmenter_of_rgb_starts_one_of_more_bands_which_keeps_its_own_normalisation(tmp_path: Path) -> None:
    network = segmenter()
    model, before = initialised(write_run(tmp_path, network), bands=4)
    assert_from(model, network, "head.", "backbone.body.layer")
    assert torch.equal(model.mean, before["mean"])
    assert model.mean.shape == (4, 1, 1)
    (first,) = (name for name, value in network.named_parameters() if value.shape[1:2] == (3,))
    expected = network.get_parameter(first)[:, [0, 1, 2, 0]] * 3 / 4
    torch.testing.assert_close(model.get_parameter(first), expected)


def test_another_backbone_or_no_segmenter_is_refused(tmp_path: Path) -> None:
    run = write_run(tmp_path, segmenter())
    with pytest.raises(
        UserError, match=r"^model\.init_from: .*model\.safetensors lacks \d+ of \d+ tensors of test_vit"
    ):
        initialised(run, backbone="test_vit", output_stride=None)
    save_file({"conv1.weight": torch.zeros(1)}, tmp_path / "backbone.safetensors")
    for path in (tmp_path / "nowhere", tmp_path, tmp_path / "backbone.safetensors"):
        with pytest.raises(UserError, match=r"^model\.init_from: .* is no trained segmenter; give a run folder"):
            initialised(path)
    empty = write_run(tmp_path / "empty")
    with pytest.raises(UserError, match=r"^model\.init_from: .*tiny has no checkpoint yet"):
        initialised(empty)
