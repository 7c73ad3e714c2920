import pytest

from dist_pca.errors import UserError
from dist_pca.tools.bench import scale
from dist_pca.tools.bench.report import Record
from dist_pca.tools.bench.scale import ScaleCase, measure_scale, scale_rows


def ignore(_what: str) -> None:
    pass


def measured(worlds: tuple[int, ...], **case: object) -> dict[tuple[object, object], Record]:
    settings: dict[str, object] = {"scope": "rank", "bins": 64, "steps": 1} | case
    records = measure_scale(worlds, ScaleCase(**settings), ignore)  # type: ignore[arg-type]
    return {(record["phase"], record["world_size"]): record for record in records}


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_rank_keeps_and_sends_as_much_on_four_ranks_as_on_two_unless_it_is_asked_for_wider_candidates() -> None:
    own, wide = measured((2, 4)), measured((2, 4), scope="world", bins=None)
    for phase in scale.PHASES:
        two, four = (own[phase, ranks] for ranks in (2, 4))
        # A ring leaves out one share of what is added up: half of it on two ranks, a quarter on four.
        assert float(four["bytes_sent"] or 0) == pytest.approx(1.5 * float(two["bytes_sent"] or 0), rel=0.01), phase
        assert float(four["peak_bytes"] or 0) == pytest.approx(float(two["peak_bytes"] or 0), rel=0.01), phase
        assert float(four["seconds"] or 0) > 0
    # Among its own pixels a rank sends nothing, which leaves gloo's threads nothing to do.
    alone = own["association", 4]
    assert 0 <= float(alone["transport_seconds"] or 0) < 0.5 * float(alone["seconds"] or 0)
    sent = [float(wide["step", ranks]["bytes_sent"] or 0) for ranks in (2, 4)]
    peaks = [float(wide["step", ranks]["peak_bytes"] or 0) for ranks in (2, 4)]
    assert sent[1] > 2 * sent[0]
    assert peaks[1] > 1.05 * peaks[0]


def test_more_ranks_than_memory_are_refused_with_how_many_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scale, "available", lambda: 10 * scale.RANK_BYTES)
    with pytest.raises(UserError, match=r"^--worlds: 32 ranks need about .*; give at most 10$"):
        measure_scale((8, 32), ScaleCase("rank", 64, 1), ignore)


def test_rows_have_each_figure_of_a_phase_for_each_number_of_ranks() -> None:
    records: list[Record] = [
        {
            "phase": "forward",
            "world_size": ranks,
            "seconds": 0.001 * ranks,
            "transport_seconds": 0.01 * ranks,
            "peak_bytes": 2**21,
            "bytes_sent": 1024 * ranks,
        }
        for ranks in (2, 4)
    ]
    assert scale_rows(records) == [
        {
            "phase": "forward",
            "CPU ms, 2 ranks": "2",
            "CPU ms, 4 ranks": "4",
            "gloo ms, 2 ranks": "20",
            "gloo ms, 4 ranks": "40",
            "peak MiB, 2 ranks": "2",
            "peak MiB, 4 ranks": "2",
            "sent KiB, 2 ranks": "2",
            "sent KiB, 4 ranks": "4",
        }
    ]
