from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given, settings

from dist_pca.config import RunConfig, load_config, save_config
from dist_pca.errors import UserError
from dist_pca.resources import names, resource
from dist_pca.training.accumulation import fit_batches
from dist_pca.training.optimizer import learning_rate_factor
from tests.support.nasty import NASTY, STEPS, check_one_line, few_or_many, replaced

DEMO = resource("configs", "demo")
FINITE = (
    *("training.stall_timeout", "training.time_limit", "data.cache.timeout", "data.cache.min_rate"),
    *("optimizer.lr", "optimizer.clip_norm", "optimizer.weight_decay", "optimizer.head_multiplier"),
    *("objective.association.weight", "objective.source_contrast.temperature", "schedule.power"),
)
"""Keys whose value may be any number, but not infinity."""


@pytest.mark.parametrize("name", names("configs"))
def test_every_shipped_config_is_a_run_and_survives_being_saved(name: str, tmp_path: Path) -> None:
    config = load_config(resource("configs", name))
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config
    assert config.unused_terms() == []


def test_the_papers_recipe_is_what_the_configs_say() -> None:
    gta5 = load_config(resource("configs", "gta5_to_cityscapes_paper"))
    synthia = load_config(resource("configs", "synthia_to_cityscapes_paper"))
    assert (gta5.training.steps, gta5.schedule.horizon) == (10416, 11160)
    assert (synthia.training.steps, synthia.schedule.horizon) == (2976, 3720)
    assert synthia.data.classes == "synthia_16"
    for config in (gta5, synthia):
        assert (config.data.shorter_edge, config.data.crop, config.data.flip) == ((760, 988), (730, 730), 0.5)
        assert (config.model.backbone, config.model.output_stride, config.model.head) == ("resnet101", 8, "deeplab_v2")
        optimizer = config.optimizer
        assert (optimizer.name, optimizer.lr, optimizer.momentum, optimizer.weight_decay) == ("sgd", 2.5e-4, 0.9, 5e-4)
        assert (config.training.source_batch, config.training.target_batch) == (8, 8)
        objective = config.objective
        assert (objective.lovasz.weight, objective.association.weight, objective.smoothness.weight) == (0.75, 0.1, 0.01)
        assert config.evaluation.input_size == (730, 1460)
        assert (config.model.association_features, config.model.association_stride) == ("backbone", None)
        assert (objective.association.label_share, objective.association.class_balanced) == (0, False)
        association = objective.association
        assert (association.scope, association.levels) == ("pair", ("features", "predictions"))
        assert (association.diffusion, association.pixel_budget, association.start_step) == (0.5, None, 0)
        assert (config.model.batch_norm, config.model.joint_batch) == ("sync", True)
        assert not objective.uses_teacher
        assert (objective.source_contrast.weight, objective.feature_distance.weight) == (0, 0)
        assert not config.data.photometric.changes


def test_later_overrides_win_and_are_typed() -> None:
    config = load_config(DEMO, ["training.steps=7", "training.steps=9", "objective.association.levels=[features]"])
    assert config.training.steps == 9
    assert config.objective.association.levels == ("features",)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.stepz=3", "training.stepz: unknown key; the nearest is training.steps"),
        ("objective.asociation.weight=1", "objective.asociation: unknown key; the nearest is objective.association"),
        ("training.steps=many", "training.steps: .* got 'many'"),
        ("training.zero_stage=4", "training.zero_stage: .*got 4"),
        ("training.steps", "write key=value"),
        ("data.shorter_edge=[200,100]", r"data.shorter_edge: the range \[200, 100\] is empty"),
        ("data.source_shorter_edge=[9,8]", r"data.source_shorter_edge: the range \[9, 8\] is empty"),
        ("data.target=null", "data.target: missing while objective.adapt is true"),
        ("schedule.horizon=1", "schedule.horizon: 1 is below training.steps"),
        ("model.backbone=null", "model.backbone: "),
        ("objective.association.class_weights=kept", "objective.association.class_weights: .*got 'kept'"),
        ("objective.source_contrast.temperature=0", "objective.source_contrast.temperature: .*got 0"),
        ("objective.source_contrast.anchors=0", "objective.source_contrast.anchors: .*got 0"),
        ("objective.feature_distance.share=75", "objective.feature_distance.share: .*got 75"),
        ("objective.feature_distance.classes=car", "objective.feature_distance.classes: .*got 'car'"),
        ("objective.association.levels=[]", "objective.association.levels: an empty list associates nothing; name a "),
        (
            "objective.association.levels=[features,features]",
            r"objective.association.levels: \[features, features\] would add a loss twice; name each level once",
        ),
        ("optimizer.betas=[0.9,1.0]", "optimizer.betas.1: Input should be less than 1, got 1.0"),
        ("optimizer.betas=[1,0.999]", "optimizer.betas.0: Input should be less than 1, got 1"),
        (f"seed={2**64}", f"seed: Input should be less than {2**64}, got {2**64}"),
        ("seed=-1", "seed: Input should be greater than or equal to 0, got -1"),
        *((f"{key}=.inf", f"{key}: Input should be a finite number, got inf") for key in FINITE),
    ],
)
def test_what_cannot_be_is_refused_by_name(override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_config(DEMO, [override])


def test_the_largest_seed_is_one_that_torch_takes() -> None:
    torch.manual_seed(load_config(DEMO, [f"seed={2**64 - 1}"]).seed)


def test_a_constant_learning_rate_has_no_horizon() -> None:
    keys = ["training.steps=20", "schedule.horizon=10", "schedule.warmup_steps=0"]
    with pytest.raises(UserError, match=r"schedule\.horizon: 10 is below training.steps 20"):
        load_config(DEMO, [*keys, "schedule.name=poly"])
    constant = load_config(DEMO, [*keys, "schedule.name=constant"])
    assert learning_rate_factor(constant, 19) == 1


@pytest.mark.parametrize(
    ("key", "needed"),
    [
        ("class_weights=kept_share", "class_balanced"),
        ("teacher_keys=true", "teacher_matches"),
        ("teacher_threshold=0.8", "teacher_check"),
    ],
)
def test_a_key_of_association_that_needs_another_says_so(key: str, needed: str) -> None:
    settings = [f"objective.association.{setting}" for setting in (f"{needed}=false", key)]
    with pytest.raises(UserError, match=f"objective.association.{key.split('=')[0]}: .*{needed}=true"):
        load_config(DEMO, settings)


def test_a_term_that_would_start_after_the_last_step_is_named() -> None:
    late = ["objective.association.start_step=60", "objective.self_training.start_step=49", "training.steps=50"]
    (warning,) = load_config(DEMO, late).unused_terms()
    assert warning.startswith("objective.association.start_step: 60 is not below training.steps 50,")
    assert "lower it, for example to 25" in warning
    assert len(load_config(DEMO, [*late, "objective.self_training.start_step=50"]).unused_terms()) == 2
    for off in ("objective.association.weight=0", "objective.adapt=false"):
        assert load_config(DEMO, [*late, off]).unused_terms() == []


def test_pairs_need_as_many_targets_as_sources() -> None:
    with pytest.raises(UserError, match=r"`pair` needs training.source_batch equal to training.target_batch"):
        load_config(DEMO, ["objective.association.scope=pair", "training.target_batch=2"])


PER_RANK = ("training.source_batch_per_rank=2", "training.target_batch_per_rank=2")


def test_pairs_need_as_many_targets_as_sources_on_a_rank() -> None:
    pairs = "objective.association.scope=pair"
    load_config(DEMO, [pairs, *PER_RANK])
    with pytest.raises(UserError, match=r"source_batch_per_rank equal to .*target_batch_per_rank, got 2 and none"):
        load_config(DEMO, [pairs, PER_RANK[0]])


def test_a_batch_on_each_rank_takes_the_place_of_the_files_batch_on_all_and_is_what_is_saved(tmp_path: Path) -> None:
    given = load_config(DEMO, PER_RANK)
    on_four, on_two = (fit_batches(given, ranks) for ranks in (4, 2))
    assert on_four.batches == {"training.source_batch": 8, "training.target_batch": 8}
    assert on_two.batches == {"training.source_batch": 4, "training.target_batch": 4}
    save_config(on_four, tmp_path / "config.yaml")
    assert fit_batches(load_config(tmp_path / "config.yaml"), 2) == on_two
    # The other way round.
    in_all = load_config(tmp_path / "config.yaml", ["training.source_batch=6", "training.target_batch=6"])
    assert fit_batches(in_all, 2) == in_all
    assert (in_all.training.source_batch, in_all.training.source_batch_per_rank) == (6, None)


@pytest.mark.parametrize("domain", ["source", "target"])
def test_a_batch_that_is_given_twice_is_refused(domain: str) -> None:
    with pytest.raises(
        UserError,
        match=rf"training\.{domain}_batch: is 8, and {domain}_batch_per_rank is 2; give one of the two$",
    ):
        load_config(DEMO, [f"training.{domain}_batch=8", f"training.{domain}_batch_per_rank=2"])


def test_scaling_by_the_batch_needs_the_batch_that_the_rate_is_for() -> None:
    with pytest.raises(UserError, match=r"schedule\.base_batch: missing, but batch_scaling needs it"):
        load_config(DEMO, ["schedule.batch_scaling=linear"])


def test_a_missing_file_and_broken_yaml_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere\.yaml: no such file"):
        load_config(tmp_path / "nowhere.yaml")
    (tmp_path / "broken.yaml").write_text("name: [")
    with pytest.raises(UserError, match=r"broken\.yaml: "):
        load_config(tmp_path / "broken.yaml")
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(UserError, match=r"list\.yaml: "):
        load_config(tmp_path / "list.yaml")


def test_every_key_documents_itself() -> None:
    def undocumented(section: type) -> list[str]:
        fields = section.model_fields  # type: ignore[attr-defined]
        inner = [f.annotation for f in fields.values() if hasattr(f.annotation, "model_fields")]
        own = [n for n, f in fields.items() if not f.description and not hasattr(f.annotation, "model_fields")]
        return own + [name for nested in inner for name in undocumented(nested)]

    assert undocumented(RunConfig) == []


@few_or_many(30, 3000)
def test_whatever_a_file_holds_is_a_run_or_refused_in_one_line(
    tmp_path_factory: pytest.TempPathFactory, examples: int
) -> None:
    whole = load_config(DEMO).model_dump(mode="json")

    @settings(max_examples=examples)
    @given(steps=STEPS, value=NASTY)
    def check(steps: list[int], value: object) -> None:
        file = tmp_path_factory.mktemp("config") / "run.yaml"
        file.write_text(yaml.safe_dump(replaced(whole, steps, value)))
        check_one_line(lambda: load_config(file), 3000)

    check()


@pytest.mark.parametrize(
    "content", [b"\xff\xfe\0", b"[", b"a: &a [*a]", b"a: " + b"[" * 50_000, b"\0", b"a: b: c", b"- 1", b"1", b"1:2:3"]
)
def test_bytes_that_are_no_config_are_refused_in_one_short_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "run.yaml").write_bytes(content)
    with pytest.raises(UserError) as refused:
        load_config(tmp_path / "run.yaml")
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 500
