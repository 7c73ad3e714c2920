from pathlib import Path

import pytest

from dist_pca.tools.bench.picture import draw
from tests.tools.bench.test_comparison import record


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_sweep_is_drawn_with_what_ran_out_of_memory(tmp_path: Path, world_size: int) -> None:
    pytest.importorskip("matplotlib", reason="pictures need the extra `plot`")
    communication = None if world_size == 1 else "ring"
    records = [
        record(name, n_source=n, seconds=n**2.0, peak_bytes=n, communication=communication, world_size=world_size)
        for name in ("dense", "blockwise", "triton", "matmul")
        for n in (100, 200, 400)
    ]
    lost = record(
        "dense", n_source=800, seconds=None, peak_bytes=None, note="out of memory", communication=communication
    )
    draw(records, "a device", tmp_path / "without.png")
    draw([*records, lost], "a device", tmp_path / "new" / "with.png")
    pictures = [(tmp_path / name).read_bytes() for name in ("without.png", "new/with.png")]
    assert all(picture.startswith(b"\x89PNG") for picture in pictures)
    assert pictures[0] != pictures[1]
