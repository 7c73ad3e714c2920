import re

from dist_pca.tools.bench.gpu_record import NOT_RUN, TESTS, GpuRecord, gpu_column, load_records
from dist_pca.tools.bench.outcomes import Outcomes
from tests.support.command_lines import README, ROOT, in_checkout


def record(device: str, tests: Outcomes) -> GpuRecord:
    date = "2030-01-02 03:04 UTC"
    return GpuRecord(device=device, date=date, tests=tests, machine={}, versions={}, commit="", minutes=9, stages={})


def readme_rows() -> dict[str, str]:
    """Last cells of the table of what has been run, by first cell."""
    section = README.read_text().partition("## What has been run")[2].partition("\n## ")[0]
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in section.splitlines() if "|" in line]
    return {row[0]: row[-1].removesuffix(" |") for row in rows}


@in_checkout
def test_the_readme_says_of_gpus_what_the_records_say() -> None:
    rows = readme_rows()
    for row, cell in gpu_column(load_records()).items():
        assert rows[row] == cell, f"README.md, what has been run, {row}: the last cell must be `{cell}`"


@in_checkout
def test_every_file_of_tests_that_a_row_goes_by_has_tests_for_a_gpu() -> None:
    for files in TESTS.values():
        for file in files:
            assert re.search(r"mark\.gpu\b|DEVICES", (ROOT / file).read_text()), file


def test_without_records_nothing_has_been_run() -> None:
    assert set(gpu_column([]).values()) == {NOT_RUN}


def test_a_cell_counts_the_tests_of_its_files_that_ran_and_names_the_gpu() -> None:
    row = "association, Triton kernels"
    file, other = TESTS[row]
    tests: Outcomes = {
        "passed": {f"{file}::a": "", f"{other}::b": "", "tests/other.py::c": ""},
        "failed": {f"{file}::d": "broke"},
        "skipped": {f"{file}::e": "older"},
        "unfinished": {f"{file}::f": ""},
    }
    one, second = record("Some GPU", tests), record("Another", {"passed": {f"{file}::a": ""}})
    cells = gpu_column([one, second])
    assert cells[row] == (
        "2 of 4 tests pass, 1 failed, 1 unfinished on Some GPU (2030-01-02); 1 of 1 tests pass on Another (2030-01-02)"
    )
    assert {cell for name, cell in cells.items() if name != row} == {NOT_RUN}


def test_skipped_tests_have_not_run() -> None:
    for row, files in TESTS.items():
        assert gpu_column([record("Some GPU", {"skipped": {f"{files[0]}::a": "older"}})])[row] == NOT_RUN
