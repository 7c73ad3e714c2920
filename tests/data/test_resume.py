"""Exact resume: what comes after a stop does not depend on the machines before and after it."""

import random
from contextlib import ExitStack, closing
from itertools import islice

import pytest

from dist_pca.data.collate import Batch
from dist_pca.data.stream import stream
from dist_pca.shards.manifest import Manifest
from tests.support.shards import data_config, make_shards

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")
BATCH, STEPS, SEED = 12, 20, 11
Content = list[tuple[int, str, bytes]]


@pytest.fixture(scope="module")
def manifests(tmp_path_factory: pytest.TempPathFactory) -> list[Manifest]:
    folder = tmp_path_factory.mktemp("resume")
    return [make_shards(folder / "many", [7, 5, 9, 4, 6]), make_shards(folder / "one", [10])]


@pytest.fixture(scope="module")
def uninterrupted(manifests: list[Manifest]) -> list[Content]:
    return run(manifests, start=0, stop=STEPS + 2, ranks=1, workers=0)


def run(manifests: list[Manifest], *, start: int, stop: int, ranks: int, workers: int) -> list[Content]:
    """The content of each step, from all ranks at once."""
    config = data_config(
        source=({"shards": "many", "weight": 2.0}, {"shards": "one", "weight": 1.0}),
        workers=workers,
        sampling={"source": "rare_class", "min_pixels": 1, "min_crop_pixels": 70, "temperature": 0.5},
    )
    with ExitStack() as stack:
        streams = [
            stack.enter_context(
                closing(
                    stream(
                        config,
                        manifests,
                        "source",
                        seed=SEED,
                        rank=rank,
                        world_size=ranks,
                        global_batch=BATCH,
                        accumulation=1,
                        start_step=start,
                    )
                )
            )
            for rank in range(ranks)
        ]
        steps = zip(*(islice(batches, stop - start) for batches in streams), strict=True)
        return [[entry for batch in step for entry in content(batch)] for step in steps]


def content(batch: Batch) -> Content:
    crops = [image.numpy().tobytes() for image in batch.images]
    return list(zip(batch.indices, batch.keys, crops, strict=True))


@pytest.mark.parametrize(
    "seeds",
    [
        pytest.param(range(8), id="some"),
        pytest.param(range(8, 208), id="many", marks=[pytest.mark.slow, pytest.mark.exhaustive]),
    ],
)
def test_samples_after_a_resume_are_those_of_the_uninterrupted_stream(
    manifests: list[Manifest], uninterrupted: list[Content], seeds: range
) -> None:
    for seed in seeds:
        draw = random.Random(seed)
        stop = draw.randrange(1, STEPS)
        old, new = ({"ranks": draw.choice((1, 2, 3, 4)), "workers": draw.choice((0, 1, 2, 3))} for _ in range(2))
        before = run(manifests, start=max(0, stop - 2), stop=stop, **old)
        after = run(manifests, start=stop, stop=stop + 2, **new)
        assert before + after == uninterrupted[max(0, stop - 2) : stop + 2], (seed, stop, old, new)
