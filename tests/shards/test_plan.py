from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dist_pca.errors import UserError
from dist_pca.shards.plan import Plan, make_plan, parse_bytes
from tests.support.raw_data import make_folder, random_image, save


def _sizes(root: Path, plan: Plan) -> list[int]:
    return [
        sum(
            (root / name).stat().st_size
            for sample in plan.samples[shard]
            for name in (sample.image, sample.label or "")
        )
        for shard in plan.shards
    ]


@given(limit=st.integers(1, 20_000))
def test_shards_are_as_large_as_fits_and_hold_every_sample_once(
    tmp_path_factory: pytest.TempPathFactory, limit: int
) -> None:
    root = tmp_path_factory.getbasetemp() / "varied"
    if not root.exists():
        make_folder(root, samples=8)
        for number in range(8):
            save(random_image(number, 12, 20 + 8 * number), root / f"images/{number:03d}.png")
    plan = make_plan("folder", root, shard_size=limit)
    assert [index for shard in plan.shards for index in range(8)[shard]] == list(range(8))
    sizes = _sizes(root, plan)
    lengths = [shard.stop - shard.start for shard in plan.shards]
    assert all(size <= limit or length == 1 for size, length in zip(sizes, lengths, strict=True))
    one_more = [_sizes(root, plan)[index] + _first_size(root, plan, index + 1) for index in range(len(sizes) - 1)]
    assert all(size > limit for size in one_more)


def _first_size(root: Path, plan: Plan, shard: int) -> int:
    sample = plan.samples[plan.shards[shard].start]
    return sum((root / name).stat().st_size for name in (sample.image, sample.label or ""))


def test_both_ways_to_cut_are_refused_together(tmp_path: Path) -> None:
    make_folder(tmp_path)
    with pytest.raises(UserError, match="--samples-per-shard and --shard-size"):
        make_plan("folder", tmp_path, samples_per_shard=2, shard_size=1000)


def test_one_digest_is_one_build(tmp_path: Path) -> None:
    make_folder(tmp_path)
    first = make_plan("folder", tmp_path, samples_per_shard=2)
    assert make_plan("folder", tmp_path, samples_per_shard=2).fingerprint == first.fingerprint
    others = [
        make_plan("folder", tmp_path, samples_per_shard=3),
        make_plan("folder", tmp_path, shard_size=100),
        make_plan("folder", tmp_path, samples_per_shard=2, quality=80),
        make_plan("folder", tmp_path, samples_per_shard=2, unlabelled=True),
        make_plan("folder", tmp_path, samples_per_shard=2, on_error="skip"),
        make_plan("folder", tmp_path, samples_per_shard=2, exclude=["*/003.png"]),
    ]
    assert len({plan.fingerprint for plan in [first, *others]}) == 7


def test_a_shards_digest_depends_on_its_own_files_alone(tmp_path: Path) -> None:
    make_folder(tmp_path)
    before = make_plan("folder", tmp_path, samples_per_shard=2).shard_digests
    save(random_image(9, 13, 20), tmp_path / "images/002.png")
    after = make_plan("folder", tmp_path, samples_per_shard=2, on_error="skip").shard_digests
    assert before[0] == after[0]
    assert before[1] != after[1]


@pytest.mark.parametrize(
    ("text", "size"),
    [("256MB", 256_000_000), ("1 GiB", 1 << 30), ("1.5kb", 1500), ("1000000", 1_000_000), ("512mib", 512 << 20)],
)
def test_sizes_are_read_with_their_units(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "MB", "-1MB", "0", "0.1", "12 parsecs", "1e6", "٣MB"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(UserError, match=r"--shard-size .*: give a size such as 256MB"):
        parse_bytes(text)
