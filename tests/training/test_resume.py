"""A run goes on in its own folder, and in no other run's."""

from pathlib import Path

import pytest

from dist_pca.config import RunConfig, load_config, save_config
from dist_pca.errors import UserError
from dist_pca.resources import resource
from dist_pca.training.resume import check_resume


def demo(folder: Path, *overrides: str) -> RunConfig:
    return load_config(resource("configs", "demo"), [f"output={folder}", *overrides])


@pytest.fixture
def made(tmp_path: Path) -> Path:
    config = demo(tmp_path)
    config.folder.mkdir()
    save_config(config, config.folder / "config.yaml")
    return tmp_path


def test_the_same_run_goes_on_by_itself(made: Path) -> None:
    check_resume(demo(made), None)


@pytest.mark.parametrize(
    "override", ["training.zero_stage=3", "training.time_limit=08:00:00", "data.workers=7", "training.log_every=3"]
)
def test_keys_that_say_where_and_how_a_run_is_made_may_change(made: Path, override: str) -> None:
    check_resume(demo(made, override), None)


def test_another_config_is_refused_with_every_key_that_differs(made: Path) -> None:
    changed = demo(made, "optimizer.lr=0.5", "objective.association.scope=rank", "training.log_every=3")
    with pytest.raises(UserError) as refused:
        check_resume(changed, None)
    message = str(refused.value)
    assert "optimizer.lr: 0.0004 -> 0.5" in message
    assert "objective.association.scope: world -> rank" in message
    assert "log_every" not in message
    assert "\n" not in message


def test_resume_consents_to_changed_keys_and_no_resume_to_no_run(made: Path) -> None:
    check_resume(demo(made, "optimizer.lr=0.5"), True)
    with pytest.raises(UserError, match="already holds a run"):
        check_resume(demo(made), False)


@pytest.mark.parametrize("resume", [None, True, False])
def test_a_folder_without_a_run_starts_one(tmp_path: Path, resume: bool | None) -> None:
    check_resume(demo(tmp_path), resume)
