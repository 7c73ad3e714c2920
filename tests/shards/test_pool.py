import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from dist_pca.shards.build import build_shards
from dist_pca.shards.manifest import load_manifest
from tests.support.raw_data import random_image, save

REPOSITORY = Path(__file__).parents[2]
SECONDS = 60


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """Enough pixels for a build to last for seconds."""
    save(random_image(0, 900, 900), tmp_path / "raw/images/000.png")
    for number in range(1, 60):
        os.link(tmp_path / "raw/images/000.png", tmp_path / f"raw/images/{number:03d}.png")
    return tmp_path / "raw"


@contextmanager
def _half_built(raw: Path, out: Path, begun: Callable[[int], bool]) -> Iterator[subprocess.Popen[bytes]]:
    """A build on two workers, of which `begun` says, given its process id, that it has come far enough."""
    code = (
        "from dist_pca.cli import main; import sys; "
        f"sys.argv = ['dist-pca', 'shards', 'build', 'folder', '--root', {str(raw)!r}, '--out', {str(out)!r}, "
        "'--unlabelled', '--workers', '2', '--samples-per-shard', '30']; main()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    deadline = time.monotonic() + SECONDS
    try:
        while not begun(process.pid):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.005)
        assert not list(out.glob("shard-*.tar"))
        yield process
    finally:
        if process.poll() is None:
            process.kill()


def _writes(out: Path) -> Callable[[int], bool]:
    # One worker is enough: on a busy machine it may be done with its shard before the other has started.
    return lambda pid: any(part.stat().st_size for part in out.glob(".building/shard-*.part"))


def _workers_start(pid: int) -> bool:
    """Whether there is a worker beside multiprocessing's own resource tracker."""
    return len(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()) >= 2


def test_a_killed_build_leaves_no_shard_no_worker_and_nothing_in_the_next_ones_way(raw: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with _half_built(raw, out, _writes(out)) as process:
        process.kill()
        process.communicate(timeout=SECONDS)  # returns once the workers, which share its output, are gone too
    assert [path.name for path in out.iterdir()] == [".building"]
    build_shards("folder", raw, out, unlabelled=True, include=["*/00?.png"], workers=1)
    assert sorted(path.name for path in out.iterdir()) == ["manifest.json", "shard-000000.tar"]
    assert load_manifest(out).samples == 10


def test_a_killed_worker_ends_the_build_with_a_remedy(raw: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with _half_built(raw, out, _writes(out)) as process:
        # The last child is a worker; the first is multiprocessing's own resource tracker.
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(children[-1]), signal.SIGKILL)
        printed, _ = process.communicate(timeout=SECONDS)
    assert process.returncode == 2
    assert b"lower --workers" in printed
    assert b"Traceback" not in printed
    assert not list(out.glob("shard-*.tar"))


def test_a_script_without_a_guard_is_told_what_it_lacks(raw: Path, tmp_path: Path) -> None:
    script = tmp_path / "build.py"
    script.write_text(
        "from pathlib import Path\nfrom dist_pca.shards.build import build_shards\n"
        f"build_shards('folder', Path({str(raw)!r}), Path({str(tmp_path / 'out')!r}), unlabelled=True, "
        "workers=2, samples_per_shard=30)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    result = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, timeout=SECONDS)
    assert result.returncode == 1
    assert 'under `if __name__ == "__main__":`' in result.stderr.splitlines()[-1]


@pytest.mark.parametrize("early", [True, False])
def test_ctrl_c_clears_up_and_exits_130(raw: Path, tmp_path: Path, early: bool) -> None:
    out = tmp_path / "out"
    with _half_built(raw, out, _workers_start if early else _writes(out)) as process:
        os.killpg(process.pid, signal.SIGINT)
        printed, _ = process.communicate(timeout=SECONDS)
    assert process.returncode == 130
    assert b"Traceback" not in printed
    assert not out.exists()
