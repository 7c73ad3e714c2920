"""A reader's folder, with tiny data in the raw data sets' layout, and the typing of printed lines in it."""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from unittest.mock import patch

import numpy as np
import yaml
from PIL import Image

from dist_pca.cli import main
from tests.support import foreign_shards
from tests.support.command_lines import ROOT
from tests.support.networks import segmenter, write_run
from tests.support.raw_data import Ids, make_band_folder, make_cityscapes, make_gta5, make_synthia, random_image, save
from tests.support.raw_data import make_folder as make_labelled_folder
from tests.support.shards import make_shards

SIZE = (64, 96)
KEYS = (
    "training.steps=2 data.workers=1 data.shorter_edge=[64,72] data.source_shorter_edge=null data.crop=[64,64] "
    "evaluation.input_size=[64,96] model.backbone=test_resnet model.weights=scratch model.output_stride=null "
    "data.sampling.min_pixels=1"
)
WRITES = ("--out", "--grid", "--plot", "--write-predictions")
"""Options that name what a line leaves."""
SMALLER = {
    # A tiny network and two steps, where the line itself does not say otherwise.
    r"((?:dist_pca\.train|dist-pca (?:train|submit)|(?:train|sweep)\.sbatch) \w+)": rf"\1 {KEYS}",
    r"(dist-pca train gta5_to_cityscapes)$": r"\1 name=by_train",
    # A network of some size takes a minute a step.
    r"model\.backbone=convnext_tiny": "model.backbone=convnext_atto",
    # A CPU in place of eight GPUs.
    r"(--config_file \S+/gpu_\w+\.yaml)": r"\1 --num_processes 1",
    # Both machines are this one.
    r"(--config_file \S+/multi_node\w*\.yaml)": r"\1 --num_processes 2 --main_process_port $PORT",
    r"\bFIRST_HOST\b": "127.0.0.1",
    # Measured on so little that nothing is learnt from it.
    r"(bench association)": r"\1 --n 64 --channels 16 --repeats 1 --implementation blockwise --dtype fp32",
    r"--sweep [\d,]+": "--sweep 128",
    r"--world 4 --n 2048": "--world 2 --n 128",
    r"(bench data)": r"\1 --only seeking",
    r"--kills 25": "--kills 1",
    r"(bench train)": r"\1 --repeats 1",
    r"(dist-pca study \w+)": rf"\1 --processes 1 {' '.join(f'--set {key}' for key in KEYS.split())}",
    r"--seeds 0,1,2": "--seeds 0",
    r"(dist-pca matches \S+)": r"\1 --batches 1 --pictures 1",
    # Everything is there already, so that nothing is fetched; nothing is to be changed either.
    r"(pip install)": r"\1 --dry-run --quiet",
}


def make_folder(folder: Path) -> None:
    """Fill a folder with what the README takes for granted."""
    generator = np.random.default_rng(0)

    def ids(count: int, values: int = 34) -> list[Ids]:
        return [generator.integers(0, values, SIZE) for _ in range(count)]

    for name in ("launch", "Makefile", "pyproject.toml"):
        (folder / name).symlink_to(ROOT / name)
    make_gta5(folder / "GTA5", ids(4))
    for split in ("train", "val"):
        make_cityscapes(folder / "cityscapes", split, "aachen", ids(4))
    make_synthia(folder / "RAND_CITYSCAPES", ids(4, 23))
    for frame in ("0006R0/{}/0006R0_f00930", *(f"Seq05VD/{{}}/Seq05VD_f{number:05d}" for number in range(0, 5000, 30))):
        save(random_image(0, *SIZE), folder / "camvid" / f"{frame.format('images')}.png")
        save(Image.fromarray(ids(1, 12)[0].astype(np.uint8)), folder / "camvid" / f"{frame.format('labels')}.png")
    recipes = dict(re.findall(r"```yaml\n# (\w+)\.yaml(.*?)```", (ROOT / "docs/your-data.md").read_text(), re.DOTALL))
    for name, recipe in recipes.items():
        (folder / f"{name}.yaml").write_text(f"#{recipe}")
    make_band_folder(folder / "fields", 4, dtype=np.uint16)
    for split in yaml.safe_load(f"#{recipes['harbour']}")["splits"]:
        save(random_image(1, *SIZE), folder / f"harbour/frames/{split}/pier/0001.jpg")
        save(Image.fromarray(ids(1, 4)[0].astype(np.uint8)), folder / f"harbour/masks/{split}/pier/0001_id.png")
    foreign_shards.write(folder / "data/theirs", [foreign_shards.sample(str(number), "seg.png") for number in range(3)])
    make_shards(folder / "data/test", [2])
    for name in ("drive/2024/1", "more/tunnels/north/1"):
        save(random_image(2, *SIZE), folder / f"{name}.png")
    for name in ("source", "target", "test"):
        make_labelled_folder(folder / "mine" / name)
    write_run(folder, segmenter())
    (folder / "runs").mkdir()
    (folder / "tiny").rename(folder / "runs/mine")
    _stand_in_for_make(folder)


def _stand_in_for_make(folder: Path) -> None:
    """An environment that is set up, whose demonstration is small, and two tests."""
    programs = Path(sys.executable).parent
    (folder / ".venv/bin").mkdir(parents=True)
    for name, words in (("python", ""), ("dist-pca", KEYS)):
        script = folder / ".venv/bin" / name
        script.write_text(f'#!/bin/sh\nexec {programs}/{name} "$@" {words}\n')
        script.chmod(0o755)
    (folder / ".venv/.ready").touch()
    (folder / ".venv/bin/activate").touch()
    (folder / "tests").mkdir()
    test = "import pytest\n\ndef test_quick(): pass\n\n@pytest.mark.slow\ndef test_slow(): pass\n"
    (folder / "tests/test_two.py").write_text(test)


def link_what_heads_name(folder: Path) -> None:
    """Raw and built data under the names that heads of shipped files use, once the README's are built."""
    for name, there in {
        "raw": ".",
        "data/city_val": "cityscapes_val",
        "runs/demo/data/day_train": "../../../data/gta5",
        "runs/demo/data/night_train": "../../../data/cityscapes_train",
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).symlink_to(there)


def smaller(line: str) -> str:
    """The line as it is typed here: with less to do, or on less."""
    for found, put in SMALLER.items():
        line = re.sub(found, put, line)
    return line


def type_line(line: str, folder: Path, variables: Mapping[str, str] | None = None) -> None:
    """Type a line into a shell in the folder; it ends well."""
    programs = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = os.environ | {"PATH": programs, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    environment |= dict(variables or {})
    typed = smaller(line)
    if line.startswith("dist-pca "):
        # In this process, which has loaded PyTorch.
        spread = ["bash", "-c", f"printf '%s\\0' {typed}"]
        words = subprocess.run(spread, cwd=folder, env=environment, capture_output=True, text=True, check=True).stdout
        code = _in_this_process(words.split("\0")[:-1], folder, environment)
    else:
        code = subprocess.run(["bash", "-c", typed], cwd=folder, env=environment, check=False).returncode
    assert code == 0, typed


def assert_left(line: str, folder: Path) -> None:
    """What a line says that it writes is there."""
    words = shlex.split(line)
    for option, value in pairwise(words):
        if option in WRITES and "--dry-run" not in words:
            assert (folder / value).exists(), value


def _in_this_process(words: list[str], folder: Path, environment: Mapping[str, str]) -> int:
    before = Path.cwd()
    os.chdir(folder)
    try:
        with patch.dict(os.environ, environment), patch.object(sys, "argv", words):
            main()
    except SystemExit as left:
        return int(left.code or 0)
    finally:
        os.chdir(before)
    return 0
