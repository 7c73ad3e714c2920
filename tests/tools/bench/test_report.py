import csv
from pathlib import Path

import pytest

from dist_pca.errors import UserError
from dist_pca.tools.bench import report
from dist_pca.tools.bench.report import Record, load_results, markdown_table, save_results


def on(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    monkeypatch.setattr(report, "device_name", lambda: device)


def test_a_result_of_the_same_device_and_configuration_is_replaced_where_it_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "results.csv"
    on(monkeypatch, "ours")
    first: list[Record] = [{"what": "a", "n": 8, "seconds": 2.5, "note": None}, {"what": "b", "n": 8, "seconds": 1.0}]
    save_results(file, "association", first, ("what", "n"))
    save_results(file, "other", [{"what": "a", "n": 8, "images": 3}], ("what", "n"))
    on(monkeypatch, "theirs")
    save_results(file, "association", [{"what": "a", "n": 8, "seconds": 9.0}], ("what", "n"))
    on(monkeypatch, "ours")
    save_results(file, "association", [{"what": "a", "n": 8, "seconds": 0.5}], ("what", "n"))

    rows = load_results(file, "association")
    assert [(row["device"], row["what"], row["n"], row["seconds"]) for row in rows] == [
        ("ours", "a", 8, 0.5),
        ("ours", "b", 8, 1.0),
        ("theirs", "a", 8, 9.0),
    ]
    assert rows[0]["note"] is None
    assert rows[0]["torch"]
    assert load_results(file, "other")[0]["images"] == 3


def test_saved_numbers_come_back_exactly(tmp_path: Path) -> None:
    record: Record = {"small": 1e-7 / 3, "large": 1 << 40, "text": "fp32", "nothing": None}
    save_results(tmp_path / "new" / "results.csv", "any", [record], ())
    assert record.items() <= load_results(tmp_path / "new" / "results.csv", "any")[0].items()


def test_a_table_with_the_old_columns_is_read_and_continued_with_the_new_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "results.csv"
    file.write_text(
        "bench,device,exchange,n,exchanged_bytes\nassociation,ours,ring,8,100\nassociation,ours,gather,8,7\n"
    )
    on(monkeypatch, "ours")
    record: Record = {"communication": "ring", "n": 8, "communication_bytes": 90}
    save_results(file, "association", [record], ("communication", "n"))
    rows = load_results(file, "association")
    assert [(row["communication"], row["communication_bytes"]) for row in rows] == [("ring", 90), ("gather", 7)]
    assert "exchange" not in file.read_text()


def test_a_file_that_is_no_table_of_results_is_refused_and_left_alone(tmp_path: Path) -> None:
    file = tmp_path / "mine.csv"
    file.write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match="not a table of results"):
        save_results(file, "association", [], ())
    assert file.read_text() == "a,b\n1,2\n"
    with pytest.raises(UserError, match="--save"):
        load_results(tmp_path / "absent.csv", "association")


def test_the_committed_results_can_be_read() -> None:
    with report.RESULTS.open(newline="") as stream:
        assert "commit" in next(csv.reader(stream))
    load_results(report.RESULTS, "association")


def test_a_markdown_table_leaves_out_columns_that_no_row_fills() -> None:
    rows = [{"what": "a", "empty": "", "time": "1 s"}, {"what": "b", "empty": "", "time": ""}]
    assert markdown_table(rows) == "| what | time |\n| --- | ---: |\n| a | 1 s |\n| b |  |"
