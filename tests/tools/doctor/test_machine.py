import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dist_pca.config import RunConfig
from dist_pca.tools.doctor import machine
from dist_pca.train import resolve_config


def run(folder: Path, *more: str) -> RunConfig:
    return resolve_config("demo", [f"data.source={folder}/day", f"data.target={folder}/dusk", *more])


@pytest.fixture(scope="module")
def streets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.support.runs import build_streets

    folder = tmp_path_factory.mktemp("streets")
    build_streets(folder)
    return folder


def test_this_environment_has_all_packages() -> None:
    check = machine.versions()
    assert check.verdict == "pass"
    assert "torch 2" in check.found


def test_whole_shards_pass_and_are_counted(streets: Path) -> None:
    check = machine.shards(run(streets), "source")
    assert check.verdict == "pass"
    assert "6 samples in 3 shards" in check.found


def test_missing_shards_fail_with_the_command_that_builds_them(tmp_path: Path) -> None:
    check = machine.shards(run(tmp_path), "target")
    assert check.verdict == "fail"
    assert "dusk" in check.found
    assert "dist-pca shards build" in check.remedy


def test_a_shard_that_was_cut_off_fails(streets: Path, tmp_path: Path) -> None:
    shutil.copytree(streets / "day", tmp_path / "day")
    shard = sorted((tmp_path / "day").glob("*.tar"))[1]
    shard.write_bytes(shard.read_bytes()[:-100])
    check = machine.shards(run(tmp_path), "source")
    assert check.verdict == "fail"
    assert shard.name in check.found


def test_batches_that_do_not_share_out_fail_and_say_which_would(tmp_path: Path) -> None:
    check = machine.batches(run(tmp_path, "training.source_batch=6", "training.target_batch=6"), 4)
    assert check.verdict == "fail"
    assert "training.source_batch" in check.found
    assert "8" in check.remedy


@pytest.mark.parametrize(("free", "verdict"), [(100e9, "pass"), (5e9, "warn"), (1e8, "fail")])
def test_little_space_warns_and_none_fails(
    free: float, verdict: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def usage(_: Any) -> Any:
        return SimpleNamespace(total=100e9, used=0, free=free)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    check = machine.disk(tmp_path / "runs")
    assert check.verdict == verdict
    assert bool(check.remedy) == (verdict != "pass")


def test_what_must_be_compiled_fails_where_there_is_no_compiler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = run(tmp_path, "model.compile=true")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert machine.deepspeed_operations(compiled).verdict == "fail"
    assert machine.deepspeed_operations(run(tmp_path)).verdict == "pass"
