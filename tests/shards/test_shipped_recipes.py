"""Each shipped recipe against its data set's folders and label coding, in trees of a few pixels."""

import json
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from dist_pca.classes import LABEL_SETS
from dist_pca.errors import UserError
from dist_pca.resources import names, resource
from dist_pca.shards.build import build_shards
from dist_pca.shards.recipe import load_recipe
from tests.support.raw_data import (
    Ids,
    make_camvid,
    make_cityscapes,
    make_gta5,
    make_synthia,
    palette_image,
    random_image,
    save,
)
from tests.support.shards import label_of, stored_samples

CLASSES = LABEL_SETS["cityscapes_19"]
TRAIN_IDS = np.array([[*range(10)], [*range(10, 19), 255]], np.uint8)

LABEL_IDS = {7: 0, 8: 1, 11: 2, 12: 3, 13: 4, 17: 5, 19: 6, 20: 7, 21: 8, 22: 9, 23: 10, 24: 11, 25: 12, 26: 13}
LABEL_IDS |= {27: 14, 28: 15, 31: 16, 32: 17, 33: 18}
SYNTHIA_NAMES = {1: "sky", 2: "building", 3: "road", 4: "sidewalk", 5: "fence", 6: "vegetation", 7: "pole", 8: "car"}
SYNTHIA_NAMES |= {9: "traffic sign", 10: "person", 11: "bicycle", 12: "motorcycle", 15: "traffic light", 17: "rider"}
SYNTHIA_NAMES |= {19: "bus", 21: "wall"}


def _names(text: str) -> list[str]:
    return text.split("; ")


CITYSCAPES_IDS = _names(
    "unlabeled; ego vehicle; rectification border; out of roi; static; dynamic; ground; road; sidewalk; parking; "
    "rail track; building; wall; fence; guard rail; bridge; tunnel; pole; polegroup; traffic light; traffic sign; "
    "vegetation; terrain; sky; person; rider; car; truck; bus; caravan; trailer; train; motorcycle; bicycle"
)

CARLA_TAGS = _names(
    "None; Roads; Sidewalks; Buildings; Walls; Fences; Poles; TrafficLight; TrafficSigns; Vegetation; Terrain; Sky; "
    "Pedestrians; Rider; Car; Truck; Bus; Train; Motorcycle; Bicycle; Static; Dynamic; Other; Water; RoadLines; "
    "Ground; Bridge; RailTrack; GuardRail; Rock"
)

VISTAS_CLASSES = _names(
    "Bird; Ground Animal; Curb; Fence; Guard Rail; Barrier; Wall; Bike Lane; Crosswalk - Plain; Curb Cut; Parking; "
    "Pedestrian Area; Rail Track; Road; Service Lane; Sidewalk; Bridge; Building; Tunnel; Person; Bicyclist; "
    "Motorcyclist; Other Rider; Lane Marking - Crosswalk; Lane Marking - General; Mountain; Sand; Sky; Snow; Terrain; "
    "Vegetation; Water; Banner; Bench; Bike Rack; Billboard; Catch Basin; CCTV Camera; Fire Hydrant; Junction Box; "
    "Mailbox; Manhole; Phone Booth; Pothole; Street Light; Pole; Traffic Sign Frame; Utility Pole; Traffic Light; "
    "Traffic Sign (Back); Traffic Sign (Front); Trash Can; Bicycle; Boat; Bus; Car; Caravan; Motorcycle; On Rails; "
    "Other Vehicle; Trailer; Truck; Wheeled Slow; Car Mount; Ego Vehicle; Unlabeled"
)


def _image(root: Path, name: str, like: Ids = TRAIN_IDS) -> str:
    save(random_image(len(name), *like.shape), root / name)
    return name


def _label(root: Path, name: str, ids: Ids = TRAIN_IDS) -> None:
    save(Image.fromarray(ids.astype(np.uint8)), root / name)


def _built(recipe: str, root: Path, split: str | None = None) -> dict[str, Ids | None]:
    """Train ids of every sample of a build, by the image's path below the root; None where it has no label."""
    out = root.parent / f"{root.name}-{split}"
    manifest = build_shards(recipe, root, out, split=split, workers=1)
    assert tuple(info.name for info in manifest.classes) == CLASSES
    return {
        json.loads(sample["json"])["source"]: np.array(label_of(sample)) if "label.png" in sample else None
        for sample in stored_samples(manifest)
    }


def _assert_labels(built: dict[str, Ids | None], images: list[str], labels: Ids) -> None:
    assert sorted(built) == sorted(images)
    for image in images:
        np.testing.assert_array_equal(built[image], labels)


def _assert_unlabelled(built: dict[str, Ids | None], images: list[str]) -> None:
    assert built == dict.fromkeys(images)


@pytest.mark.parametrize("name", names("shards"))
def test_every_recipe_says_what_it_is_and_how_the_raw_files_must_lie(name: str) -> None:
    text = resource("shards", name).read_text()
    header = text[: text.index("\nname: ")]
    assert all(line.startswith("# ") for line in header.splitlines())
    assert "Layout" in header or name == "folder"
    assert load_recipe(name).description
    assert len(text.splitlines()) <= 50


@pytest.mark.parametrize("name", names("shards"))
def test_a_folder_that_does_not_hold_the_data_set_is_refused_with_the_glob(tmp_path: Path, name: str) -> None:
    recipe = load_recipe(name)
    for split, rules in recipe.splits.items():
        with pytest.raises(UserError) as caught:
            build_shards(recipe, tmp_path, tmp_path / "out", split=split, workers=1)
        assert str(tmp_path) in str(caught.value)
        assert rules.images[0] in str(caught.value)
        assert "\n" not in str(caught.value)


def test_gta5_files_that_do_not_fit_are_left_out(tmp_path: Path) -> None:
    root = tmp_path / "gta5"
    make_gta5(tmp_path / "one", [TRAIN_IDS])
    kept = [f"images/{number:05d}.png" for number in (15187, 15189, 17704, 17706, 20800, 20861)]
    left_out = [f"images/{number:05d}.png" for number in (15188, 17705, *range(20801, 20861))]
    for image in (*kept, *left_out):
        for name in (image, image.replace("images", "labels")):
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).hardlink_to(tmp_path / "one" / name[:6] / "00001.png")
    assert sorted(_built("gta5", root)) == kept


def test_acdc_is_split_by_condition_and_whole(tmp_path: Path) -> None:
    root = tmp_path / "acdc"
    images = defaultdict(list)
    for condition in ("fog", "night", "rain", "snow"):
        for split in ("train", "val", "test"):
            frame = f"{condition}/{split}/GOPR0475/GOPR0475_frame_000041"
            image = _image(root, f"rgb_anon/{frame}_rgb_anon.png")
            images[split].append(image)
            images[f"{condition}_{split}"].append(image)
            if split != "test":
                _label(root, f"gt/{frame}_gt_labelTrainIds.png")
                for kind in ("labelIds", "labelColor", "invIds"):
                    _label(root, f"gt/{frame}_gt_{kind}.png", TRAIN_IDS * 0)
            reference = f"rgb_anon/{condition}/{split}_ref/GOPR0475/GOPR0475_frame_000041_rgb_ref_anon.png"
            images[f"{split}_ref"].append(_image(root, reference))
    for split in load_recipe("acdc").splits:
        built = _built("acdc", root, split)
        if split.endswith(("test", "ref")):
            _assert_unlabelled(built, images[split])
        else:
            _assert_labels(built, images[split], TRAIN_IDS)


def test_dark_zurich_has_labels_for_val_alone(tmp_path: Path) -> None:
    root = tmp_path / "dark_zurich"
    folders = {f"train_{time}": f"train/{time}/GOPR0345" for time in ("day", "twilight", "night")}
    folders |= {"val": "val/night/GOPR0356", "test": "test/night/GP010364", "val_ref": "val_ref/day/GOPR0356_ref"}
    for split, folder in folders.items():
        suffix = "_ref" if split == "val_ref" else ""
        frame = f"{folder}/{folder[-8:]}_frame_000321{suffix}"
        image = _image(root, f"rgb_anon/{frame}_rgb_anon.png")
        if split == "val":
            _label(root, f"gt/{frame}_gt_labelTrainIds.png")
            _label(root, f"gt/{frame}_gt_invIds.png", TRAIN_IDS * 0)
            _assert_labels(_built("dark_zurich", root, split), [image], TRAIN_IDS)
        else:
            _assert_unlabelled(_built("dark_zurich", root, split), [image])
    assert set(load_recipe("dark_zurich").splits) == set(folders)


def test_bdd100k_masks_are_train_ids_under_the_name_of_the_jpeg(tmp_path: Path) -> None:
    root = tmp_path / "bdd100k"
    for split in ("train", "val"):
        image = _image(root, f"images/10k/{split}/0004a4c0-d4dff0ad.jpg")
        _label(root, f"labels/sem_seg/masks/{split}/0004a4c0-d4dff0ad.png")
        _label(root, f"labels/sem_seg/colormaps/{split}/0004a4c0-d4dff0ad.png", TRAIN_IDS * 0)
        _assert_labels(_built("bdd100k", root, split), [image], TRAIN_IDS)
    image = _image(root, "images/10k/test/ac6d4f42-00000000.jpg")
    _assert_unlabelled(_built("bdd100k", root, "test"), [image])


@pytest.mark.parametrize("split", ["train", "val"])
def test_bdd100k_images_on_their_side_are_left_out(tmp_path: Path, split: str) -> None:
    exclude = load_recipe("bdd100k").splits[split].exclude
    root = tmp_path / "bdd100k"
    for stem in ("0004a4c0-d4dff0ad", *(pattern[2:-4] for pattern in exclude)):
        turned = stem != "0004a4c0-d4dff0ad"
        _image(root, f"images/10k/{split}/{stem}.jpg", TRAIN_IDS.T if turned else TRAIN_IDS)
        _label(root, f"labels/sem_seg/masks/{split}/{stem}.png")
    assert len(exclude) == {"train": 4, "val": 2}[split]
    assert list(_built("bdd100k", root, split)) == [f"images/10k/{split}/0004a4c0-d4dff0ad.jpg"]


def test_mapillary_palette_indices_are_joined_into_cityscapes_classes(tmp_path: Path) -> None:
    root = tmp_path / "mapillary"
    joined = {
        "road": "Road; Bike Lane; Crosswalk - Plain; Parking; Service Lane; Lane Marking - Crosswalk; "
        "Lane Marking - General",
        "sidewalk": "Sidewalk; Curb; Curb Cut; Pedestrian Area",
        "pole": "Pole; Utility Pole; Street Light",
        "traffic sign": "Traffic Sign (Front); Traffic Sign (Back); Traffic Sign Frame",
        "rider": "Bicyclist; Motorcyclist; Other Rider",
        "train": "On Rails",
    }
    wanted = {name: CLASSES.index(joint) for joint, members in joined.items() for name in _names(members)}
    wanted |= {name: CLASSES.index(name.lower()) for name in VISTAS_CLASSES if name.lower() in CLASSES}
    ids = np.arange(66).reshape(6, 11)
    for split, folder in (("train", "training"), ("val", "validation")):
        image = _image(root, f"{folder}/images/-6-WLs7O63-6cwx-8adk7g.jpg", ids)
        save(palette_image(ids), root / f"{folder}/v1.2/labels/-6-WLs7O63-6cwx-8adk7g.png")
        save(palette_image(ids * 0), root / f"{folder}/v2.0/labels/-6-WLs7O63-6cwx-8adk7g.png")
        labels = np.array([wanted.get(name, 255) for name in VISTAS_CLASSES]).reshape(6, 11)
        _assert_labels(_built("mapillary", root, split), [image], labels)
    image = _image(root, "testing/images/9V-HaD0.jpg")
    _assert_unlabelled(_built("mapillary", root, "test"), [image])
    assert set(wanted.values()) == set(range(19))


def test_idd_takes_png_and_jpeg_drives_and_the_labels_that_its_tool_draws(tmp_path: Path) -> None:
    root = tmp_path / "idd"
    for split in ("train", "val"):
        images = []
        for frame, extension in ((f"{split}/0/005506", "png"), (f"{split}/334/frame5427", "jpg")):
            images.append(_image(root, f"leftImg8bit/{frame}_leftImg8bit.{extension}"))
            (root / f"gtFine/{frame}_gtFine_polygons.json").parent.mkdir(parents=True)
            (root / f"gtFine/{frame}_gtFine_polygons.json").write_text("{}")
        with pytest.raises(UserError, match=r"2 of 2 images have no label.*_gtFine_labelcsTrainIds\.png"):
            _built("idd", root, split)
        for polygons in root.glob(f"gtFine/{split}/*/*.json"):
            stem = polygons.relative_to(root).as_posix().removesuffix("_polygons.json")
            _label(root, f"{stem}_labelcsTrainIds.png")
            _label(root, f"{stem}_labellevel3Ids.png", TRAIN_IDS * 0)
        _assert_labels(_built("idd", root, split), images, TRAIN_IDS)
    image = _image(root, "leftImg8bit/test/7/000123_leftImg8bit.jpg")
    _assert_unlabelled(_built("idd", root, "test"), [image])


def test_idd_s_polygons_give_the_labels_that_its_tool_draws(tmp_path: Path) -> None:
    objects: list[tuple[str, list[list[float]], int]] = [
        ("sky", [[-3, -2], [44, -2], [44, 20.5], [-3, 20.5]], CLASSES.index("sky")),
        ("road", [[0, 20], [40, 18.25], [40, 30], [0, 30]], CLASSES.index("road")),
        ("non-drivable fallback", [[0, 21], [9.75, 21], [0, 29]], CLASSES.index("terrain")),
        ("cargroup", [[12.5, 19], [25, 19], [25, 26.5], [12.5, 26.5]], CLASSES.index("car")),
        ("license plate", [[14, 22], [18, 22], [18, 24], [14, 24]], 255),
        ("autorickshaw", [[28, 16], [36, 16], [36, 26], [28, 26]], 255),
        ("pole", [], 255),
    ]
    drawn = Image.new("L", (40, 30), 255)
    for _, points, train_id in objects[:-1]:
        ImageDraw.Draw(drawn).polygon([(x, y) for x, y in points], fill=train_id)
    fields = {"date": "08-Feb-2019 12:43:50", "deleted": 0, "draw": True, "user": "cvit", "verified": 0}
    content = {
        "imgHeight": 30,
        "imgWidth": 40,
        "objects": [
            {**fields, "id": number, "label": name, "polygon": points}
            for number, (name, points, _) in enumerate(objects)
        ],
    }
    root = tmp_path / "idd"
    image = _image(root, "leftImg8bit/val/119/frame0029_leftImg8bit.jpg", np.zeros((30, 40), np.uint8))
    labels = root / "gtFine/val/119/frame0029_gtFine_polygons.json"
    labels.parent.mkdir(parents=True)
    labels.write_text(json.dumps(content))
    _assert_labels(_built("idd_polygons", root, "val"), [image], np.asarray(drawn))


def test_kitti_labels_are_cityscapes_ids_and_only_of_first_frames(tmp_path: Path) -> None:
    root = tmp_path / "kitti"
    ids = np.array([*range(34), 255]).reshape(5, 7)
    labels = np.array([CLASSES.index(name) if name in CLASSES else 255 for name in [*CITYSCAPES_IDS, ""]])
    for folder in ("training", "testing"):
        _image(root, f"{folder}/image_2/000000_10.png", ids)
        _image(root, f"{folder}/image_2/000000_11.png", ids)
    _label(root, "training/semantic/000000_10.png", ids)
    _label(root, "training/instance/000000_10.png", ids * 0)
    _assert_labels(_built("kitti", root, "train"), ["training/image_2/000000_10.png"], labels.reshape(5, 7))
    _assert_unlabelled(_built("kitti", root, "test"), ["testing/image_2/000000_10.png"])


@pytest.mark.parametrize("folder", ["", "Town01/", "Town02/run 3/"])
def test_carla_tags_are_read_from_the_red_channel(tmp_path: Path, folder: str) -> None:
    root = tmp_path / "carla"
    tags = np.arange(len(CARLA_TAGS), dtype=np.uint8).reshape(5, 6)
    names = dict(zip(CARLA_TAGS[1:20], CLASSES, strict=True)) | {"RoadLines": "road"}
    labels = np.array([CLASSES.index(names[tag]) if tag in names else 255 for tag in CARLA_TAGS]).reshape(5, 6)
    image = f"{folder}rgb/004211.png"
    save(random_image(0, 5, 6).convert("RGBA"), root / image)
    others = [np.full_like(tags, 7), np.full_like(tags, 1), np.full_like(tags, 255)]
    save(Image.fromarray(np.stack([tags, *others], axis=-1)), root / f"{folder}semantic_segmentation/004211.png")
    _assert_labels(_built("carla", root), [image], labels)


def test_gta5_palette_indices_become_cityscapes_train_ids(tmp_path: Path) -> None:
    ids = np.arange(35).reshape(5, 7)
    make_gta5(tmp_path / "raw", [ids])
    manifest = build_shards("gta5", tmp_path / "raw", tmp_path / "out", workers=1)
    (sample,) = stored_samples(manifest)
    assert label_of(sample) == [[LABEL_IDS.get(raw, 255) for raw in row] for row in ids.tolist()]
    assert manifest.pixel_counts == [1] * 19
    assert tuple(info.name for info in manifest.classes) == LABEL_SETS["cityscapes_19"]


def test_synthia_channel_0_of_16_bits_becomes_16_train_ids(tmp_path: Path) -> None:
    ids = np.arange(24).reshape(4, 6)
    make_synthia(tmp_path / "raw", [ids])
    manifest = build_shards("synthia", tmp_path / "raw", tmp_path / "out", workers=1)
    (sample,) = stored_samples(manifest)
    order = LABEL_SETS["synthia_16"].index
    assert label_of(sample) == [
        [order(SYNTHIA_NAMES[raw]) if raw in SYNTHIA_NAMES else 255 for raw in row] for row in ids.tolist()
    ]


def test_cityscapes_splits_are_apart_and_test_has_no_labels(tmp_path: Path) -> None:
    ids = np.arange(34).reshape(2, 17)
    for split, city in (("train", "aachen"), ("val", "lindau"), ("test", "berlin")):
        make_cityscapes(tmp_path / "raw", split, city, [ids])
    for split, city in (("train", "aachen"), ("val", "lindau")):
        manifest = build_shards("cityscapes", tmp_path / "raw", tmp_path / split, split=split, workers=1)
        (sample,) = stored_samples(manifest)
        assert json.loads(sample["json"])["source"].startswith(f"leftImg8bit/{split}/{city}/")
        assert label_of(sample) == [[LABEL_IDS.get(raw, 255) for raw in row] for row in ids.tolist()]
    test = build_shards("cityscapes", tmp_path / "raw", tmp_path / "test", split="test", workers=1)
    assert not test.labelled


def test_camvid_indices_are_train_ids_and_11_is_ignore(tmp_path: Path) -> None:
    make_camvid(tmp_path / "raw" / "day", [np.arange(12).reshape(3, 4)])
    manifest = build_shards("camvid", tmp_path / "raw", tmp_path / "out", workers=1)
    (sample,) = stored_samples(manifest)
    assert label_of(sample) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 255]]
    assert manifest.classes[10].name == "Bicyclist"
