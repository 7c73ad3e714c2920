"""What a container allows counts, where it is less than what the machine has."""

from collections.abc import Callable
from pathlib import Path

import pytest

from dist_pca import cores

Groups = Callable[[str, dict[str, str]], None]


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Groups:
    """Makes control groups of a membership and files."""
    monkeypatch.setattr(cores, "CONTROL_GROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(cores, "MEMBERSHIP", tmp_path / "membership")
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(64)))

    def make(membership: str, files: dict[str, str]) -> None:
        (tmp_path / "membership").write_text(membership)
        for name, text in files.items():
            path = tmp_path / "cgroup" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)

    return make


@pytest.mark.parametrize(
    ("membership", "files", "expected"),
    [
        ("0::/\n", {"cpu.max": "250000 100000\n"}, 3),
        ("0::/\n", {"cpu.max": "max 100000\n"}, 64),
        ("0::/\n", {"cpu.max": "10000 100000\n"}, 1),
        # The tightest of a group and those above it.
        ("0::/pod/box\n", {"pod/box/cpu.max": "max 100000\n", "pod/cpu.max": "800000 100000\n"}, 8),
        ("3:cpu,cpuacct:/box\n", {"cpu/box/cpu.cfs_quota_us": "400000\n", "cpu/box/cpu.cfs_period_us": "100000\n"}, 4),
        ("3:cpu:/box\n", {"cpu/box/cpu.cfs_quota_us": "-1\n", "cpu/box/cpu.cfs_period_us": "100000\n"}, 64),
        ("", {}, 64),
        ("0::/\n", {"cpu.max": "nonsense\n"}, 64),
    ],
)
def test_cores_are_those_of_the_quota(groups: Groups, membership: str, files: dict[str, str], expected: int) -> None:
    groups(membership, files)
    assert cores.usable_cores() == expected


@pytest.mark.parametrize(
    ("membership", "files", "expected"),
    [
        (
            "0::/\n",
            {"memory.max": "3000\n", "memory.current": "1500\n", "memory.stat": "anon 900\ninactive_file 500\n"},
            2000,
        ),
        (
            "5:memory:/box\n",
            {
                "memory/box/memory.limit_in_bytes": "4000\n",
                "memory/box/memory.usage_in_bytes": "1000\n",
                "memory/box/memory.stat": "total_inactive_file 100\n",
            },
            3100,
        ),
        ("0::/\n", {"memory.max": "1000\n", "memory.current": "5000\n", "memory.stat": "anon 1\n"}, 0),
    ],
)
def test_memory_is_what_the_limit_leaves(groups: Groups, membership: str, files: dict[str, str], expected: int) -> None:
    groups(membership, files)
    assert cores.available_memory() == expected


def test_without_a_limit_memory_is_what_the_machine_has_free(groups: Groups) -> None:
    groups("0::/\n", {"memory.max": "max\n", "memory.current": "5\n", "memory.stat": "anon 1\n"})
    assert cores.available_memory() > 10**6


def test_there_may_be_no_shared_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cores, "SHARED_MEMORY", tmp_path / "none")
    assert cores.free_shared_memory() is None
    monkeypatch.setattr(cores, "SHARED_MEMORY", tmp_path)
    assert cores.free_shared_memory()
