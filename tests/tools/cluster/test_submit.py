"""What is handed to SLURM, and what is refused before."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner, Result

from dist_pca.cli import app
from dist_pca.errors import UserError
from dist_pca.resources import resource
from dist_pca.shards.build import build_shards
from dist_pca.tools.cluster.submit import LEAST_SECONDS, parse_time, render, train_directives
from tests.support.raw_data import make_folder
from tests.support.runs import overrides
from tests.support.slurm import fake_sbatch

SCRIPT = resource("launch", "slurm/train", ".sbatch").read_text()
SIZE = ("--nodes", "2", "--gpus-per-node", "2", "--time", "12:00:00")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `overrides` names."""
    folder = tmp_path_factory.mktemp("shards")
    make_folder(folder / "raw")
    for name in ("day", "dusk"):
        build_shards("folder", folder / "raw", folder / name, workers=1)
    return folder


def submit(shards: Path, output: Path, *words: str) -> Result:
    return CliRunner().invoke(app, ["submit", "demo", *overrides(shards, "mine", f"output={output}"), *words])


@pytest.mark.parametrize(
    ("written", "seconds"),
    [
        ("10", 600),
        ("90", 5400),
        ("45:30", 2730),
        ("12:00:00", 43200),
        ("1-00", 86400),
        ("1-02:30", 95400),
        ("2-00:00:01", 172801),
    ],
)
def test_times_are_slurms(written: str, seconds: int) -> None:
    assert parse_time(written) == seconds


@given(st.integers(0, 400), st.integers(0, 23), st.integers(10, 59), st.integers(0, 59))
def test_a_time_means_the_same_with_days_and_without(days: int, hours: int, minutes: int, seconds: int) -> None:
    expected = ((24 * days + hours) * 60 + minutes) * 60 + seconds
    assert parse_time(f"{days}-{hours:02}:{minutes:02}:{seconds:02}") == expected
    assert parse_time(f"{24 * days + hours}:{minutes:02}:{seconds:02}") == expected


@pytest.mark.parametrize("written", ["", "8h", "soon", "-5", "1:2:3:4", "12:00:0", "1-", "1-00:00:00:00", "9.5"])
def test_what_is_no_time_is_refused(written: str) -> None:
    with pytest.raises(UserError, match=r"--time .*: write minutes, \[D-\]HH:MM:SS or D-HH"):
        parse_time(written)


@pytest.mark.parametrize("written", ["0", "9", "09:59", "00:09:59"])
def test_a_time_too_short_to_save_in_is_refused(written: str) -> None:
    with pytest.raises(UserError, match=r"too short .* at least 10 minutes"):
        parse_time(written)
    assert LEAST_SECONDS == 600


def test_options_take_the_place_of_the_scripts_and_the_rest_stays() -> None:
    directives = {"nodes": "16", "gpus-per-node": None, "account": "vision", "exclusive": "", "job-name": "a run"}
    before, after = SCRIPT.splitlines(), render(SCRIPT, directives, ["demo", "seed=1"], "/an env/python").splitlines()
    assert sorted(set(before) - set(after)) == [
        "#SBATCH --gpus-per-node=8",
        "#SBATCH --job-name=dist-pca",
        "#SBATCH --nodes=1",
        "PYTHON=(python)",
    ]
    assert sorted(set(after) - set(before)) == [
        "#SBATCH --account=vision",
        "#SBATCH --exclusive",
        "#SBATCH --job-name='a run'",
        "#SBATCH --nodes=16",
        "PYTHON=('/an env/python')",
        "set -- demo seed=1",
    ]
    # SLURM reads its options up to the first command.
    assert max(i for i, line in enumerate(after) if line.startswith("#SBATCH")) < after.index("set -- demo seed=1")


@settings(max_examples=25)
@given(st.lists(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])), min_size=1, max_size=4))
def test_any_argument_reaches_the_script_unchanged(arguments: list[str]) -> None:
    script = render("#SBATCH --nodes=1\n", {}, arguments, None) + "printf '%s\\0' \"$@\"\n"
    said = subprocess.run(["bash", "-c", script], capture_output=True, check=True).stdout
    assert said.decode().split("\0")[:-1] == arguments


def test_a_copy_with_a_sites_own_python_keeps_it() -> None:
    own = SCRIPT.replace("PYTHON=(python)", "PYTHON=(apptainer exec --nv dist-pca.sif python)")
    assert "PYTHON=(apptainer exec --nv dist-pca.sif python)" in render(own, {}, ["demo"], None)


def test_a_script_without_options_of_sbatch_is_refused() -> None:
    with pytest.raises(UserError, match="holds no #SBATCH line"):
        render("echo hello\n", {}, ["demo"], None)


def test_an_option_cannot_smuggle_in_a_line() -> None:
    with pytest.raises(UserError, match="line break"):
        render(SCRIPT, {"account": "a\nrm -rf ."}, ["demo"], None)


def test_on_cpus_no_gpu_is_asked_for() -> None:
    size: dict[str, Any] = {"name": "a", "folder": Path("runs/a"), "nodes": 2, "cpus_per_node": 4, "time": "10"}
    assert train_directives(**size, gpus_per_node=0)["gpus-per-node"] is None
    assert train_directives(**size, gpus_per_node=4)["gpus-per-node"] == "4"
    further = train_directives(**size, gpus_per_node=0, further=["--mem=0", "exclusive", "comment=a=b"])
    assert (further["mem"], further["exclusive"], further["comment"]) == ("0", "", "a=b")


@pytest.mark.parametrize(
    ("option", "wanted"),
    [
        ("gres=gpu:4", 4),
        ("gres=gpu:a100:4", 4),
        ("gres=tmpdisk:10,gpu:a100:3", 3),
        ("gres=gpu", 1),
        ("gpus=a100:8", 4),
        ("gpus-per-node=a100:2", 2),
        ("gpus-per-task=h100:4", 4),
        ("gres=tmpdisk:10", None),
        ("constraint=gpu", None),
    ],
)
def test_gpus_are_asked_for_once(option: str, wanted: int | None) -> None:
    size: dict[str, Any] = {"name": "a", "folder": Path("runs/a"), "nodes": 2, "cpus_per_node": 4, "time": "10"}
    directives = train_directives(**size, gpus_per_node=wanted or 4, further=[option])
    lines = [line for line in render(SCRIPT, directives, ["demo"], None).splitlines() if line.startswith("#SBATCH")]
    asking = [line for line in lines if "gpu" in line and "constraint" not in line]
    assert asking == [f"#SBATCH --{option}" if wanted else "#SBATCH --gpus-per-node=4"]
    if wanted is not None:
        with pytest.raises(
            UserError, match=rf"--sbatch .*asks for {wanted} GPUs on each node, and .* for 9; make them"
        ):
            train_directives(**size, gpus_per_node=9, further=[option])


@pytest.mark.parametrize("own", ["--gres=gpu:a100:8", "--gres gpu:8", "--gres=disk:1,gpu:2", "-G 8", "--gpus=8"])
def test_a_sites_own_directive_for_gpus_gives_way(own: str) -> None:
    script = SCRIPT.replace("#SBATCH --gpus-per-node=8", f"#SBATCH {own}\n#SBATCH --gres=disk:3")
    lines = render(script, {"gpus-per-node": "4"}, ["demo"], None).splitlines()
    assert f"#SBATCH {own}" not in lines
    assert {"#SBATCH --gpus-per-node=4", "#SBATCH --gres=disk:3"} <= set(lines)


def test_sbatch_sees_nothing_of_a_job_that_it_is_called_from(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_sbatch(tmp_path, monkeypatch, f"env > {tmp_path}/seen; cat > /dev/null; echo 4711")
    kept = {"SLURM_CONF": "/etc/slurm.conf", "SBATCH_ACCOUNT": "vision", "HF_HOME": "/models"}
    dropped = {
        "SLURM_JOB_ID": "1",
        "SLURM_MEM_PER_CPU": "2000",
        "SLURM_CPU_BIND": "quiet,mask_cpu:0x1",
        "SLURM_GPUS": "1",
    }
    for name, value in (kept | dropped).items():
        monkeypatch.setenv(name, value)
    done = submit(shards, tmp_path, *SIZE)
    assert done.exit_code == 0, done.output
    seen = dict(line.split("=", 1) for line in (tmp_path / "seen").read_text().splitlines() if "=" in line)
    assert kept.items() <= seen.items()
    assert {name for name in seen if name.startswith("SLURM_")} == {"SLURM_CONF"}


def test_a_dry_run_shows_the_script_and_leaves_nothing(shards: Path, tmp_path: Path) -> None:
    done = submit(shards, tmp_path, *SIZE, "--dry-run", "--partition", "gpu", "--sbatch", "mem=0")
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    wanted = {"nodes=2", "gpus-per-node=2", "cpus-per-task=16", "time=12:00:00", "partition=gpu", "mem=0"}
    assert {f"#SBATCH --{option}" for option in (*wanted, "job-name=mine")} <= set(lines)
    assert f"#SBATCH --output={tmp_path}/mine/slurm/%j.out" in lines
    assert f"PYTHON=({sys.executable})" in lines
    assert subprocess.run(["bash", "-n"], input=done.stdout, text=True, check=False).returncode == 0
    assert list(tmp_path.iterdir()) == []


def test_a_submitted_script_is_kept_and_how_to_follow_it_is_said(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_sbatch(tmp_path, monkeypatch, f"cat > {tmp_path}/received; echo '4711;hal'")
    done = submit(shards, tmp_path, *SIZE)
    assert done.exit_code == 0, done.output
    kept = tmp_path / "mine/slurm/4711.sbatch"
    assert kept.read_text() == (tmp_path / "received").read_text()
    assert kept.read_text() in done.stdout
    assert "job 4711 is queued" in done.stderr
    assert f"dist-pca status {tmp_path}/mine" in done.stderr


@pytest.mark.parametrize("there", [True, False])
def test_a_refusal_of_slurm_is_one_line_and_leaves_nothing(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: bool
) -> None:
    if there:
        fake_sbatch(tmp_path, monkeypatch, "cat > /dev/null; echo 'sbatch: error: invalid account' >&2; exit 1")
    else:
        monkeypatch.setenv("PATH", str(tmp_path))
    done = submit(shards, tmp_path / "runs", *SIZE)
    assert isinstance(done.exception, UserError)
    assert ("sbatch: invalid account" if there else "--dry-run") in str(done.exception)
    assert "\n" not in str(done.exception)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--nodes", "3", "--gpus-per-node", "1", "--time", "60"), r"training\.source_batch"),
        (("--nodes", "2", "--gpus-per-node", "1", "--time", "5"), "--time 5: too short"),
        (("--nodes", "2", "--gpus-per-node", "1", "--time", "60", "data.source=nowhere"), "shards nowhere"),
        (("--nodes", "2", "--gpus-per-node", "1", "--time", "60", "model.backbone=resnt"), "resnt"),
    ],
)
def test_what_could_not_run_is_refused_before_it_is_queued(
    shards: Path, tmp_path: Path, words: tuple[str, ...], message: str
) -> None:
    done = submit(shards, tmp_path, *words, "--dry-run")
    assert isinstance(done.exception, UserError)
    with pytest.raises(UserError, match=message):
        raise done.exception
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("words", [("--nodes", "0"), ("--gpus-per-node", "-1"), ("--script", "nowhere.sbatch")])
def test_sizes_and_files_that_cannot_be_are_refused(shards: Path, tmp_path: Path, words: tuple[str, ...]) -> None:
    done = submit(shards, tmp_path, *SIZE, *words)
    assert done.exit_code == 2
    assert words[0] in done.output
