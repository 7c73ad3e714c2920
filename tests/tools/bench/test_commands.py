import json
import sys
from pathlib import Path

import pytest

from dist_pca.cli import main

FIELDS = {
    *("implementation", "communication", "world_size", "dtype", "n_source", "n_target", "channels"),
    *("seconds", "peak_bytes", "loss_error", "gradient_error"),
}


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """Exit code of `dist-pca bench`."""
    monkeypatch.setattr(sys, "argv", ["dist-pca", "bench", *map(str, arguments)])
    with pytest.raises(SystemExit) as left:
        main()
    return int(left.value.code or 0)


def test_json_is_one_object_with_the_device_versions_and_records(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    small = ("--n", 64, "--channels", 16, "--dtype", "fp32", "--repeats", 2)
    saved = tmp_path / "results.csv"
    assert run(monkeypatch, "association", *small, "--implementation", "blockwise", "--json", "--save", saved) == 0
    printed = json.loads(capfd.readouterr().out)
    assert set(printed) == {"device", "versions", "records"}
    assert {"python", "torch", "dist_pca"} <= set(printed["versions"])
    (blockwise,) = printed["records"]
    assert set(blockwise) >= FIELDS
    assert blockwise["implementation"] == "blockwise"
    assert blockwise["communication"] is None
    assert (blockwise["world_size"], blockwise["dtype"]) == (1, "fp32")
    assert (blockwise["n_source"], blockwise["n_target"], blockwise["channels"]) == (64, 64, 16)
    assert blockwise["seconds"] > 0
    assert blockwise["loss_error"] < 1e-6
    assert blockwise["gradient_error"] < 1e-5
    assert 0 < blockwise["kept_ratio"] <= 1
    assert 0 < blockwise["cover_ratio"] <= 1

    assert run(monkeypatch, "table", saved) == 0
    table = capfd.readouterr().out
    assert printed["device"] in table
    assert "| blockwise | fp32 | 64 |" in table


@pytest.mark.slow
def test_products_that_cannot_be_avoided_stand_beside_those_measured_on_data_with_given_shares(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    small = ("--n", 200, "--channels", 64, "--dtype", "fp32", "--repeats", 1)
    kinds = ("--implementation", "blockwise", "--implementation", "matmul")
    assert run(monkeypatch, "association", *small, *kinds, "--kept", 0.9, "--cover", 0.5) == 0
    printed = capfd.readouterr().out
    assert "0.90 of cycles hold, 0.50 of targets are matched" in printed
    assert "at least" in printed
    assert "4.8" in printed
    assert run(monkeypatch, "association", *small, "--data", "random", "--kept", 0.9) != 0
    assert "--data random" in capfd.readouterr().err


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_sweep_ends_with_tables_of_ratios_and_growth_and_a_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib", reason="pictures need the extra `plot`")
    small = ("--n", 64, "--channels", 16, "--repeats", 1, "--implementation", "dense", "--implementation", "blockwise")
    assert run(monkeypatch, "association", *small, "--sweep", "128,256", "--plot", tmp_path / "sweep.png") == 0
    printed = capfd.readouterr().out
    assert all(f"n = {n}:" in printed for n in (64, 128, 256))
    assert "growth with n" in printed
    assert "n^" in printed
    assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--dtype", "fp8"), ("--dtype", "fp32", "bf16")),
        (("--implementation", "fast"), ("--implementation", "blockwise", "triton")),
        (("--communication", "pigeon"), ("--communication", "gather", "ring")),
        (("--communication", "ring"), ("--communication", "--world 2")),
        (("--exchange", "ring"), ("--communication", "--world 2")),
        (("--exchange", "ring", "--communication", "ring"), ("--exchange is the old name of --communication",)),
        (("--sweep", "1024,many"), ("--sweep 1024,many", "1024,2048,4096")),
        (("--n", "0"), ("Invalid value for", "--n")),
    ],
)
def test_a_wrong_value_is_named_with_what_would_be_right(
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    words: tuple[str, ...],
) -> None:
    assert run(monkeypatch, "association", *arguments) == 2
    told = " ".join(capfd.readouterr().err.split())
    assert all(word in told for word in words)


def test_help_teaches_by_examples(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "association", "--help") == 0
    told = capfd.readouterr().out
    assert "dist-pca bench association --sweep" in told
    assert "--world" in told
