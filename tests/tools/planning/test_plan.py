import json
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from typer.testing import CliRunner

from dist_pca.cli import app
from dist_pca.config import AssociationConfig, RunConfig
from dist_pca.errors import UserError
from dist_pca.tools.planning import association, report
from dist_pca.tools.planning.advice import SLOWER, as_overrides, best_choice, stages
from dist_pca.tools.planning.association import Candidates
from dist_pca.tools.planning.hardware import Assumptions, Cluster, find_gpu
from dist_pca.tools.planning.live import LiveBytes
from dist_pca.tools.planning.network import NetworkStep, run_network
from dist_pca.tools.planning.predict import Prediction, find_candidates, predict, sweep
from dist_pca.train import resolve_config
from tests.tools.planning.recipe import PLAIN, TEACHER

TINY = ("model.backbone=test_resnet", "model.weights=scratch", "model.output_stride=null", *PLAIN)


def tiny(*more: str) -> RunConfig:
    return resolve_config("demo", [*TINY, *more])


@cache
def network(*more: str, images: int = 1) -> NetworkStep:
    return run_network(tiny(*more), 10, images, images)


def plan(
    *more: str, network_with: tuple[str, ...] = (), nodes: int = 1, per_node: int = 8, gpu: str = "h100", stage: int = 2
) -> Prediction:
    cluster = Cluster(find_gpu(gpu), nodes, per_node)
    run = tiny("objective.association.start_step=0", *network_with, *more)
    return predict(run, network(*network_with), cluster, Assumptions(), images=(1, 1), stage=stage, steps=100)


def test_more_bands_take_more_work_in_the_first_convolution() -> None:
    rgb, many = network(), network("model.bands=12")
    assert many.convolution_flops > rgb.convolution_flops
    assert many.product_flops == rgb.product_flops


def test_live_bytes_are_those_of_storages_that_are_still_there() -> None:
    with LiveBytes() as live:
        live.begin("made")
        first = torch.zeros(1000)
        view = first[:10]
        second = first + 1
        assert live.bytes == 8000
        del first, second
        live.begin("view left")
        assert live.bytes == 4000
        del view
        assert live.bytes == 0
    assert live.peaks == {"made": 8000, "view left": 4000}


def test_operations_and_activations_are_those_of_the_images() -> None:
    one, two = network(images=1), network(images=2)
    assert two.convolution_flops == 2 * one.convolution_flops
    assert dict(two.phases)["forward"] == pytest.approx(2 * dict(one.phases)["forward"], rel=0.02)
    assert one.parameters == two.parameters


def test_autocast_takes_less_activations() -> None:
    plain = dict(network().phases)["backward"]
    assert dict(network("training.precision=bf16").phases)["backward"] < 0.8 * plain


def test_each_view_of_the_student_takes_activations_and_operations() -> None:
    plain, masked, both = network(), network(*TEACHER), network(*TEACHER, "objective.self_training.weight=1")
    for step, views in ((masked, 3), (both, 4)):
        assert dict(step.phases)["forward"] == pytest.approx(views / 2 * dict(plain.phases)["forward"], rel=0.05)
        assert step.backward_flops == pytest.approx(views / 2 * plain.backward_flops, rel=0.05)


def test_target_images_that_no_term_sees_are_not_shown() -> None:
    plain, unseen = (
        network(),
        network(*TEACHER, "objective.association.weight=0", "objective.smoothness.weight=0"),
    )
    assert unseen.backward_flops == pytest.approx(plain.backward_flops, rel=0.05)


def test_a_teacher_passes_forward_alone_and_keeps_no_activations() -> None:
    def forward(step: NetworkStep) -> int:
        return step.convolution_flops + step.product_flops - step.backward_flops

    plain, taught = network(), network(*TEACHER)
    # The teacher sees one image, the student three in place of two.
    assert forward(taught) == pytest.approx(4 / 2 * forward(plain), rel=0.05)
    assert taught.backward_flops == pytest.approx(3 / 2 * plain.backward_flops, rel=0.05)
    assert dict(taught.phases)["teacher"] < dict(plain.phases)["forward"] / 2
    assert "teacher" not in dict(plain.phases)


def test_a_teacher_that_chooses_matches_sees_the_source_too() -> None:
    one, two = (network(*TEACHER, f"objective.association.teacher_matches={matches}") for matches in ("false", "true"))
    assert two.backward_flops == pytest.approx(one.backward_flops, rel=0.01)
    assert two.convolution_flops > 1.05 * one.convolution_flops


@pytest.mark.parametrize(("stage", "copies"), [(1, 2), (2, 2), (3, 1)])
def test_the_teacher_is_a_second_copy_of_the_weights_where_they_are_not_shared_out(stage: int, copies: int) -> None:
    plain, taught = plan(stage=stage), plan(stage=stage, network_with=TEACHER)
    trained = 4 * network().parameters
    assert "teacher" not in plain.memory.phases
    more = taught.memory.most["weights"] - plain.memory.most["weights"]
    assert more == pytest.approx((copies - 1) * trained, rel=0.01, abs=1)
    assert taught.memory.phases["teacher"] < taught.memory.phases["forward"]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_teacher_is_gathered_once_for_every_micro_batch(stage: int) -> None:
    def sent(*more: str) -> dict[str, float]:
        found = plan(*more, network_with=TEACHER, stage=stage)
        return {part.kind: part.bytes for part in found.traffic}

    assert "teacher" not in {part.kind for part in plan(stage=stage).traffic}
    # Stage 3 gathers what it shares out, and sends small parameters for the teacher and again for the student.
    assert sent()["teacher"] == pytest.approx(7 * 4 * network().parameters / 8 * (2 if stage == 3 else 1), rel=0.2)
    assert sent("training.accumulation=2")["teacher"] == pytest.approx(2 * sent()["teacher"])


def test_in_turn_every_view_has_batch_statistics_of_its_own() -> None:
    in_turn = "model.joint_batch=false"
    joint, two, three = network(), network(in_turn), network(*TEACHER, in_turn)
    assert (joint.passes, two.passes, three.passes) == (1, 2, 3)

    def statistics(*with_: str) -> float:
        found = plan("model.batch_norm=sync", network_with=with_)
        return next(part.bytes for part in found.traffic if part.kind == "batch norm")

    assert statistics(*TEACHER, in_turn) == pytest.approx(3 * statistics())


def test_both_levels_are_associated_on_the_grid_of_the_features() -> None:
    cluster = Cluster(find_gpu("h100"), 1, 8)
    step = network()
    candidates_by_level = dict(find_candidates(tiny(), step, cluster, (1, 1)))
    channels, height, width = step.features
    assert {(candidates.source, candidates.target) for candidates in candidates_by_level.values()} == {
        (height * width, height * width)
    }
    assert (candidates_by_level["features"].channels, candidates_by_level["predictions"].channels) == (
        channels,
        step.logits[0],
    )
    assert step.logits[1:] != step.features[1:]


def test_one_gpu_sends_nothing() -> None:
    alone = plan(per_node=1)
    assert alone.traffic == []
    assert alone.timing.exposed_communication == 0


@given(
    communication=st.sampled_from(["gather", "ring"]),
    ranks=st.integers(2, 64),
    rows=st.integers(1, 5000),
    channels=st.integers(1, 512),
)
def test_a_ring_takes_the_same_memory_on_any_number_of_ranks_and_gathering_more(
    communication: str, ranks: int, rows: int, channels: int
) -> None:
    config = AssociationConfig(communication=communication)  # type: ignore[arg-type]
    few, many = (
        association.memory(config, "features", Candidates(rows, rows, channels, 10, n, 1), "h100").forward
        for n in (ranks, 2 * ranks)
    )
    numbers = 8 * ranks * 6 * rows
    assert many - few == numbers if communication == "ring" else many - few >= numbers


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_optimizer_states_are_shared_out(stage: int) -> None:
    eight, sixteen = plan(stage=stage), plan(nodes=2, stage=stage)
    assert sixteen.memory.parts["optimizer"] == pytest.approx(eight.memory.parts["optimizer"] / 2, rel=0.01)


def test_a_rank_holds_and_sends_no_more_on_more_ranks_unless_it_seeks_matches_on_them() -> None:
    constant = ("model.batch_norm=sync", "objective.lovasz.bins=4096", "objective.association.scope=node")
    few, many = (plan(*constant, network_with=TEACHER, nodes=nodes) for nodes in (2, 128))
    sent, sent_by_many = ({part.kind: part.bytes for part in found.traffic} for found in (few, many))
    assert {"batch norm", "lovasz", "teacher", "gradients", "weights"} < set(sent)
    for kind, size in sent.items():
        # A ring of two nodes leaves out more of what it would send at the most. Shares of weights are rounded up.
        assert sent_by_many[kind] == pytest.approx(size, rel=0.08), kind
        assert [part.calls for part in few.traffic if part.kind == kind] == [
            part.calls for part in many.traffic if part.kind == kind
        ]
    assert many.memory.peak <= 1.01 * few.memory.peak
    assert many.association_flops == few.association_flops
    wider = ("objective.association.scope=world", "objective.lovasz.bins=null")
    wide = plan(*constant, *wider, network_with=TEACHER, nodes=128)
    assert wide.association_flops > 100 * many.association_flops
    assert wide.memory.most["lovasz"] > 100 * many.memory.most["lovasz"]


def test_the_bound_is_what_is_slowest() -> None:
    run, cluster = tiny(), Cluster(find_gpu("h100"), 4, 8)
    settings = {"images": (1, 1), "stage": 2, "steps": 1}
    lame = replace(cluster, gpu=replace(cluster.gpu, network=1e6, link=1e6))
    for assumptions, on, bound in (
        (Assumptions(loader_rate=0.01), cluster, "loader"),
        (Assumptions(loader_rate=1e6), lame, "network"),
        (Assumptions(loader_rate=1e6, network_efficiency=1e-6), cluster, "compute"),
    ):
        assert predict(run, network(), on, assumptions, **settings).timing.bound == bound  # type: ignore[arg-type]


def test_a_sweep_keeps_images_per_gpu_and_images_in_all() -> None:
    run, cluster = tiny("training.steps=1024"), Cluster(find_gpu("h100"), 1, 8)
    swept = sweep(run, network(), cluster, Assumptions(), images=(1, 1), stage=2, largest=1024)
    assert [other.cluster.size for other in swept] == [2**power for power in range(11)]
    assert {other.steps * other.cluster.size for other in swept} == {8 * 1024}
    assert all(other.images == (1, 1) for other in swept)


@pytest.mark.parametrize(
    ("per_node", "sizes"), [(6, [1, 2, 4, 6, 12, 24, 48]), (3, [1, 2, 3, 6, 12, 24, 48]), (1, [1, 2, 4, 8])]
)
def test_a_sweep_goes_over_full_nodes_of_any_size(per_node: int, sizes: list[int]) -> None:
    cluster = Cluster(find_gpu("h100"), 2, per_node)
    swept = sweep(tiny(), network(), cluster, Assumptions(), images=(1, 1), stage=2, largest=max(sizes))
    assert [other.cluster.size for other in swept] == sizes


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("training.offload.parameters=cpu", {3}),
        ("model.compile=true", {1, 2}),
        ("training.precision=bf16", {1, 2, 3}),
    ],
)
def test_advice_takes_a_stage_that_the_run_may_have(key: str, expected: set[int]) -> None:
    assert set(stages(tiny(key))) == expected


def test_advice_fits_is_near_the_fastest_and_is_a_config() -> None:
    run, cluster = tiny(), Cluster(find_gpu("h100"), 2, 8)
    best = best_choice(run, network(), cluster, Assumptions(), images=(1, 1))
    assert best is not None
    assert best.fits
    asked = tiny(*as_overrides(best))
    same = predict(asked, network(), cluster, Assumptions(), images=(1, 1), stage=best.stage, steps=1)
    assert same.timing.step == pytest.approx(best.timing.step)
    assert best.timing.step <= SLOWER * plan(nodes=2).timing.step


def test_where_nothing_fits_there_is_no_advice() -> None:
    cluster = Cluster(replace(find_gpu("h100"), memory=1e6), 1, 8)
    assert best_choice(tiny(), network(), cluster, Assumptions(), images=(1, 1)) is None


def test_an_unknown_gpu_is_refused_with_those_there_are() -> None:
    with pytest.raises(UserError, match=r"--gpu h1000.*h100"):
        find_gpu("h1000")


def test_the_command_needs_no_shards_and_gives_json_and_a_picture(tmp_path: Path) -> None:
    done = CliRunner().invoke(
        app,
        [
            *("plan", "demo", *TINY, f"data.source={tmp_path}/none", "--nodes", "1", "--gpus-per-node", "4"),
            *("--gpu", "a100", "--memory", "30", "--json", "--plot", str(tmp_path / "plan.png")),
        ],
    )
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert told["gpus"] == 4
    parts = ("weights", "gradients", "optimizer", "activations", "lovasz", "association")
    assert sum(told["memory_bytes"][part] for part in parts) == pytest.approx(told["memory_bytes"]["peak"], abs=5)
    assert told["memory_bytes"]["usable"] == pytest.approx(27e9)
    assert told["sweep"][-1]["gpus"] == 1024
    assert told["recommended"]["fits"]
    assert (tmp_path / "plan.png").stat().st_size > 10_000


def test_a_batch_that_does_not_share_out_is_refused_with_what_would() -> None:
    eight = ("training.source_batch=8", "training.target_batch=8")
    done = CliRunner().invoke(app, ["plan", "demo", *TINY, *eight, "--nodes", "3"])
    assert isinstance(done.exception, UserError)
    said, _, given = str(done.exception).partition(", for example ")
    assert said.startswith("training.source_batch: 8 samples")
    assert given == "training.source_batch=24 training.target_batch=24"
    assert CliRunner().invoke(app, ["plan", "demo", *TINY, "--nodes", "3", *given.split()]).exit_code == 0


def test_sizes_that_do_not_fit_are_marked_by_a_word_and_a_sweep_names_all_its_sizes() -> None:
    cluster = Cluster(replace(find_gpu("h100"), memory=1e6), 1, 4)
    swept = sweep(tiny(), network(), cluster, Assumptions(), images=(1, 1), stage=2, largest=16)
    printer = Console(width=120, record=True)
    printer.print(report.sweep_table(swept), report.sweep_table([plan()]))
    assert printer.export_text().count("too much") == len(swept)
    assert "on 1 to 16 x h100, 4 per node" in report.headline(*swept)
    assert "on 8 x h100, 1 node:" in report.headline(plan())


@given(st.floats(0.001, 1e15))
def test_figures_are_told_without_exponents(value: float) -> None:
    assert "e" not in report.number(value) + report.size(value) + report.duration(value)


def test_lovasz_is_a_part_of_its_own() -> None:
    assert plan("objective.lovasz.weight=0").memory.most["lovasz"] == 0
    one, two = (plan(nodes=nodes).memory.most["lovasz"] for nodes in (1, 2))
    assert two > one > 0
    parts = plan().memory.parts
    assert sum(parts.values()) == pytest.approx(plan().memory.peak)


def test_ranks_of_one_processor_share_it() -> None:
    alone, shared = (plan(per_node=ranks, gpu="cpu") for ranks in (1, 4))
    assert shared.usable == pytest.approx(alone.usable / 4)
    assert shared.timing.network_compute == pytest.approx(4 * alone.timing.network_compute)
