"""The README and the manual say what is so: their lines parse and can be typed, their links lead somewhere."""

import re
import shutil
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dist_pca.config.section import Section
from dist_pca.shards.build import build_shards
from dist_pca.shards.recipe import Coding, Recipe, Split
from dist_pca.tools.manual import config_sections, updated
from tests.support.command_lines import (
    KEYS,
    MANUAL,
    MARK,
    PAGES,
    README,
    ROOT,
    Line,
    head_lines,
    in_checkout,
    named_options,
    page_lines,
    parse,
    shipped_lines,
)
from tests.support.reader import SMALLER, assert_left, link_what_heads_name, make_folder, type_line

pytestmark = in_checkout
LINES = [*(line for page in PAGES for line in page_lines(page)), *shipped_lines("")]
BUILDS = [line for line in LINES if line.file == "README.md" and line.text.startswith("dist-pca shards build")]
LAUNCHERS = [line for line in shipped_lines("launch/accelerate/") if not line.marked]
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def prose(page: Path) -> str:
    """A page without its blocks of code."""
    return re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("line", LINES, ids=lambda line: f"{line.file}: {line.text}"[:80])
def test_a_printed_command_line_parses(line: Line) -> None:
    if MARK not in line.text and not re.match(r"module|source|PYTHON|export", line.text):
        parse(line.text)


@every_page
def test_commands_options_and_keys_that_are_talked_about_exist(page: Path) -> None:
    sections = {name for name, _ in config_sections()}
    for code in re.findall(r"`([^`]+)`", prose(page)):
        if code.startswith("dist-pca "):
            named_options(" ".join(code.split()))
        for key in re.findall(r"(?<![\w./-])((?:\w+\.)+\w+|\w+\.(?:\w+\.)*\*)(?![\w./(-])", code):
            is_file = re.search(r"\.(py|md|jsonl?|yaml|onnx)$", key)
            if key.partition(".")[0] in sections and not is_file and "tracker_options." not in key:
                assert key.removesuffix(".*") in KEYS | sections, key


@every_page
def test_links_and_the_files_that_are_named_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        path, _, anchor = target.partition("#")
        if not target.startswith("http"):
            file = page.parent / path if path else page
            assert file.is_file(), target
            assert not anchor or anchor in anchors(file), target
    for path in re.findall(r"`((?:dist_pca|tests|configs|shards|launch|docs)/[\w./-]+)`", page.read_text()):
        if not re.search(r"NAME|step-", path):
            assert (ROOT / path).exists(), path


def anchors(page: Path) -> set[str]:
    """Anchors of a page's headings, which GitHub and the site name alike."""
    headings = re.findall(r"^#+ (.*)", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


def test_messages_that_troubleshooting_quotes_are_the_codes() -> None:
    code = " ".join(path.read_text() for path in sorted((ROOT / "dist_pca").rglob("*.py")))
    # Strings that are continued in the next line, and values that are put in.
    code = re.sub(r"\{[^{}]*\}", "~", re.sub(r'"\s*\n\s*f?"', "", code).replace("{MANIFEST_NAME}", "manifest.json"))
    # Of a library, of a shell, and a field of the metrics.
    others = ("operator torchvision", "dist-pca: command", "make demo", "cover_ratio_LEVEL", "confident_share")
    for symptom in re.findall(r"^\| (?!symptom)(.*?) \|", (ROOT / "docs/troubleshooting.md").read_text(), re.MULTILINE):
        for quoted in re.findall(r"`([^`]+)`", symptom):
            if not quoted.startswith(others):
                for part in quoted.split("..."):
                    assert part.strip(" ,:()") in code, quoted


@pytest.mark.parametrize("page", MANUAL, ids=lambda page: page.name)
def test_generated_tables_are_those_of_the_code(page: Path) -> None:
    assert updated(page.read_text()) == page.read_text(), "run `python -m dist_pca.tools.manual docs`"


@pytest.mark.parametrize("section", [Recipe, Coding, Split])
def test_every_key_of_a_recipe_is_explained(section: type[Section]) -> None:
    page = (ROOT / "docs/your-data.md").read_text()
    for key in section.model_fields:
        assert re.search(rf"^\|.*[`.]{key}[`.]", page, re.MULTILINE), key


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    commands = pytest.importorskip("mkdocs.commands.build", reason="mkdocs is in the extra `dev`")
    config = pytest.importorskip("mkdocs.config").load_config(str(ROOT / "mkdocs.yml"), site_dir=str(tmp_path))
    # Strict: a broken link, a missing anchor or a page outside of the contents raises.
    commands.build(config)
    assert {path.parent.name for path in tmp_path.glob("*/index.html")} >= {page.stem for page in MANUAL} - {"index"}


def test_python_on_a_page_runs() -> None:
    blocks = [code for page in PAGES for code in re.findall(r"^```python\n(.*?)^```", page.read_text(), re.S | re.M)]
    assert blocks
    for code in blocks:
        exec(compile(code.replace("8464", "200"), "page", "exec"), {})


def test_the_recipe_for_a_data_set_of_ones_own_builds(tmp_path: Path) -> None:
    (recipe,) = re.findall(r"```yaml\n(# harbour.*?)```", (ROOT / "docs/your-data.md").read_text(), re.DOTALL)
    (tmp_path / "harbour.yaml").write_text(recipe)
    root = tmp_path / "raw"
    for split in ("train", "val"):
        for folder in ("frames", "masks"):
            (root / folder / split / "pier 3").mkdir(parents=True)
        Image.new("RGB", (4, 1)).save(root / f"frames/{split}/pier 3/0001.jpg")
        Image.fromarray(np.array([[0, 1, 2, 3]], np.uint8)).save(root / f"masks/{split}/pier 3/0001_id.png")
        manifest = build_shards(tmp_path / "harbour.yaml", root, tmp_path / split, split=split, workers=1)
        assert manifest.labelled
        assert manifest.pixel_counts == [1, 2]


def test_lines_are_found_in_blocks_and_heads(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        f"`dist-pca a`\n\n```sh\ndist-pca c \\\n  --d   # why\nmake e  # {MARK}\n```\n\n```yaml\nf: g\n```\n"
    )
    assert [line[1:] for line in page_lines(page)] == [("dist-pca c --d", False), ("make e", True)]
    head = (
        f"#!/bin/sh\n# A:\n#\n#   X=1 sbatch b \\\n#     c\n#   --option d\n\n# Others ({MARK}):\n#   module load f\n"
    )
    assert [line[1:] for line in head_lines("x", head)] == [("X=1 sbatch b c", False), ("module load f", True)]


def test_no_more_is_typed_otherwise_than_there_is() -> None:
    everything = "\n".join(line.text for line in LINES)
    for found in SMALLER:
        assert re.search(found, everything, re.MULTILINE), found


def type_lines(typed: list[Line], folder: Path) -> None:
    for line in typed:
        tasks = re.search(r"--out (\S+) --task \$SLURM_ARRAY_TASK_ID --tasks (\d+)", line.text)
        if tasks:
            # A reader who has built it in one piece builds it in parts.
            shutil.rmtree(folder / tasks[1], ignore_errors=True)
        for task in range(int(tasks[2]) if tasks else 1):
            type_line(line.text, folder, {"SLURM_ARRAY_TASK_ID": str(task)})
        assert_left(line.text, folder)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_readme_can_be_typed_from_its_first_line_to_its_last(tmp_path: Path) -> None:
    make_folder(tmp_path)
    type_lines([line for line in page_lines(README) if not line.marked], tmp_path)


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.timeout(900)
@pytest.mark.parametrize("page", [page for page in MANUAL if page_lines(page)], ids=lambda page: page.name)
def test_a_page_of_the_manual_can_be_typed_after_the_readmes_shards_are_built(page: Path, tmp_path: Path) -> None:
    make_folder(tmp_path)
    typed = [line for line in page_lines(page) if not line.marked]
    type_lines([*(line for line in BUILDS if line not in typed), *typed], tmp_path)


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize("line", LAUNCHERS, ids=lambda line: Path(line.file).stem)
def test_a_launcher_files_head_can_be_typed_on_every_machine(line: Line, tmp_path: Path) -> None:
    make_folder(tmp_path)
    type_lines(BUILDS, tmp_path)
    link_what_heads_name(tmp_path)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = {"PORT": str(probe.getsockname()[1])}
    machines = {line.text, line.text.replace("--machine_rank 0", "--machine_rank 1")}
    with ThreadPoolExecutor() as pool:
        for machine in [pool.submit(type_line, text, tmp_path, port) for text in machines]:
            machine.result()
