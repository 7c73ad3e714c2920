import pytest
from hypothesis import given
from hypothesis import strategies as st

from dist_pca.tools.bench.comparison import compared, growth, power_law, readme_tables
from dist_pca.tools.bench.report import Record


def record(implementation: str, **fields: str | int | float | None) -> Record:
    made: Record = {
        "implementation": implementation,
        "communication": None,
        "world_size": 1,
        "dtype": "fp32",
        "n_source": 1000,
        "n_target": 1000,
        "channels": 256,
        "seconds": 1.0,
        "peak_bytes": 1 << 20,
        "loss_error": None,
        "gradient_error": None,
        "similarity": "cosine",
        "data": "clustered",
        "spread": 3.75,
        "seconds_value": None,
        "repeats": 5,
        "kept_ratio": 0.7,
        "cover_ratio": 0.6,
        "communication_bytes": None,
        "note": None,
    }
    return made | fields


def test_ratios_are_to_dense_and_to_the_product_of_the_same_size_and_type() -> None:
    records = [
        record("dense", seconds=10.0, peak_bytes=300 << 20),
        record("matmul", seconds=0.5),
        record("matmul", seconds=0.25, dtype="bf16"),
        record("dense", seconds=99.0, n_source=2000, n_target=2000),
        record("blockwise", seconds=2.0, peak_bytes=10 << 20),
        record("blockwise", seconds=1.0, dtype="bf16"),
    ]
    *_, fp32, bf16 = compared(records)
    assert (fp32["speed against dense"], bf16["speed against dense"]) == ("5 x", "10 x")
    assert (fp32["times product"], bf16["times product"]) == ("4", "4")
    assert fp32["memory against dense"] == "1/30"


def test_a_record_without_a_time_has_no_ratios_and_says_why() -> None:
    records = [record("dense", seconds=None, peak_bytes=None, note="out of memory"), record("blockwise")]
    dense, blockwise = compared(records)
    assert (dense["time"], dense["note"]) == ("", "out of memory")
    assert blockwise["speed against dense"] == ""


@given(st.floats(0.01, 100), st.floats(0.1, 3))
def test_a_power_law_is_found_again(factor: float, exponent: float) -> None:
    sizes = [100, 250, 1000]
    assert power_law(sizes, [factor * n**exponent for n in sizes]) == pytest.approx((factor, exponent))


def test_growth_is_the_exponent_of_each_line_over_the_sizes_that_were_measured() -> None:
    records = [record("blockwise", n_source=n, seconds=n**2.0, peak_bytes=n) for n in (100, 200, 400)]
    records.append(record("dense", n_source=400, seconds=None, peak_bytes=None, note="out of memory"))
    blockwise, dense = growth(records)
    assert (blockwise["time"], blockwise["memory"]) == ("n^2.00", "n^1.00")
    assert (blockwise["from n"], blockwise["to n"]) == ("100", "400")
    assert (dense["time"], dense["memory"]) == ("", "")


def test_readme_tables_are_one_for_each_device_and_leave_out_what_nothing_fills() -> None:
    saved = [record(name, device=device, torch="2.9") for device in ("GPU", "CPU, 2 threads") for name in ("dense",)]
    text = readme_tables(saved)
    assert text.count("| implementation | dtype |") == 2
    assert "CPU, 2 threads, PyTorch 2.9: C = 256, cosine, clustered data" in text
    assert "communication" not in text
    assert text.splitlines()[4] == "| dense | fp32 | 1,000 | 1 s | 1 MiB | 0.70 | 0.60 |"


def test_without_results_the_readme_says_so() -> None:
    assert readme_tables([]) == "No measurements yet."
