"""Whoever types what is printed gets what it says.

The README's lines are typed in the order in which they stand, in one folder, as one reader would; those of a file's
head each in a folder of its own. `SMALLER` in tests/support/readme_folder.py is all that is typed otherwise than it is
printed. tests/tools/cluster/test_scripts.py types what needs a cluster.
"""

import re
import shutil
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from accelerate.commands.launch import launch_command_parser

from tests.support.readme_folder import SMALLER, assert_left, link_what_heads_name, make_folder, type_line
from tests.support.readme_lines import (
    HEADS,
    MARK,
    README,
    SHIPPED,
    Line,
    head_lines,
    in_checkout,
    is_talk,
    lines,
    printed,
    readme_lines,
)

pytestmark = in_checkout
PAGE, LAUNCHERS, SCRIPTS = (lines(place) for place in ("README.md", "launch/accelerate/", "launch/slurm/"))
BUILDS = [line for line in PAGE if re.match(r"dist-pca shards build (?!.*--task)", line.text)]
# A minute or more, or much like what other tests run.
LONG = [
    line for line in PAGE if re.search(r"make demo|bench (?:resume|train)|bench association --(sweep|world)", line.text)
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_folder(tmp_path)
    return tmp_path


def type_lines(typed: list[Line], folder: Path) -> None:
    for line in typed:
        tasks = re.search(r"--out (\S+) --task \$SLURM_ARRAY_TASK_ID --tasks (\d+)", line.text)
        if tasks:
            # A reader who has built it in one piece builds it in parts.
            shutil.rmtree(folder / tasks[1], ignore_errors=True)
        for task in range(int(tasks[2]) if tasks else 1):
            type_line(line.text, folder, {"SLURM_ARRAY_TASK_ID": str(task)})
        assert_left(line.text, folder)


def test_every_line_is_typed_by_a_test_or_marked() -> None:
    typed = {line.text for line in (*PAGE, *LAUNCHERS, *SCRIPTS)}
    assert len(typed) > 50
    for line in printed():
        assert line.text in typed or line.marked or is_talk(line.text), f"{line.file}: {line.text}"


def test_no_more_is_typed_otherwise_than_there_is() -> None:
    everything = "\n".join(line.text for line in (*PAGE, *LAUNCHERS, *SCRIPTS))
    for found, put in SMALLER.items():
        everything, count = re.subn(found, put, everything)
        assert count, found


def test_lines_are_found_in_blocks_and_between_back_quotes_and_by_their_indentation() -> None:
    readme = f"""
Type `dist-pca
train a` or `make b` ({MARK}: why), not `runs/x`.

```sh
dist-pca c \\
  --d   # why
make e  # {MARK}: why
```

```yaml
f: `make g`
```
"""
    assert [line[1:] for line in readme_lines(readme)] == [
        ("dist-pca train a", False),
        ("make b", True),
        ("dist-pca c --d", False),
        ("make e", True),
    ]
    head = f"""#!/bin/sh
# Two lines, `make a` and
#
#   X=1 sbatch b \\
#     c
#   --option d
#
#SBATCH --e
# Others ({MARK}):
#   module load f
F=1
#   g
"""
    assert [line[1:] for line in head_lines("x", head)] == [
        ("make a", False),
        ("X=1 sbatch b c", False),
        ("module load f", True),
        ("g", True),
    ]


def test_no_command_stands_in_running_text() -> None:
    prose = re.sub(r"```.*?```", "", README.read_text(), flags=re.DOTALL)
    for path in (path for pattern in HEADS for path in SHIPPED.glob(pattern)):
        prose += "\n\n" + "\n".join(re.findall(r"^# (?! )(.*)", path.read_text(), re.MULTILINE))
    unquoted = re.sub(r"`[^`]*`", "", prose)
    assert re.findall(r"(?:accelerate launch|sbatch|dist-pca [a-z]+|pip install|make \w+) --?\w.*", unquoted) == []


@pytest.mark.parametrize(
    ("text", "talk"),
    [
        ("dist-pca", True),
        ("dist-pca shards", True),
        ("dist-pca shards build", True),
        ("dist-pca shards build gta5", False),
        ("dist-pca train ... --resume", True),
        ("dist-pca train CONFIG", False),
        ("dist-pca doctor", False),
        ("dist-pca no such command", False),
        ("accelerate launch --max_restarts", True),
        ("accelerate launch -m dist_pca.train demo", False),
        ("make demo", False),
        ("pip install x", False),
    ],
)
def test_talk_about_a_command_is_no_line(text: str, talk: bool) -> None:
    assert is_talk(text) is talk


def test_options_that_are_talked_about_are_accelerates() -> None:
    known = vars(launch_command_parser().parse_args(["script.py"]))
    talks = [line.text for line in printed() if is_talk(line.text) and line.text.startswith("accelerate ")]
    assert talks
    for text in talks:
        for option in re.findall(r"--(\w+)", text):
            assert option in known, text


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_readme_can_be_typed_from_its_first_line_to_its_last(folder: Path) -> None:
    type_lines([line for line in PAGE if line not in LONG], folder)


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.timeout(900)
@pytest.mark.parametrize("line", LONG, ids=lambda line: line.text)
def test_its_long_lines_can_be_typed(folder: Path, line: Line) -> None:
    type_lines([*BUILDS, line], folder)


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize("line", LAUNCHERS, ids=lambda line: Path(line.file).stem)
def test_a_launcher_files_head_can_be_typed_on_every_machine(folder: Path, line: Line) -> None:
    type_lines(BUILDS, folder)
    link_what_heads_name(folder)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = {"PORT": str(probe.getsockname()[1])}
    machines = {line.text, line.text.replace("--machine_rank 0", "--machine_rank 1")}
    with ThreadPoolExecutor() as pool:
        for machine in [pool.submit(type_line, text, folder, port) for text in machines]:
            machine.result()
