from dataclasses import replace
from functools import cache

import pytest

from dist_pca.config import RunConfig
from dist_pca.tools.planning.candidates import Candidates, candidate_costs
from dist_pca.tools.planning.hardware import Assumptions, Cluster, find_gpu
from dist_pca.tools.planning.network import NetworkStep, run_network
from dist_pca.train import resolve_config
from tests.tools.planning.recipe import PLAIN

CLUSTER = Cluster(find_gpu("h100"), 16, 8)


def run(*more: str) -> RunConfig:
    tiny = ("model.backbone=test_resnet", "model.weights=scratch", "model.output_stride=null")
    return resolve_config("demo", [*tiny, *PLAIN, *more])


@cache
def network() -> NetworkStep:
    return run_network(run(), 10, 1, 1)


def costs(cluster: Cluster, *more: str) -> list[Candidates]:
    return candidate_costs(run(*more), network(), cluster, Assumptions(), images=(1, 1))


def test_candidates_of_all_ranks_cost_a_rank_as_much_more_as_there_are_ranks() -> None:
    found = costs(CLUSTER)
    half, given, twice = (cost for cost in found if cost.scope == "world" and cost.budget is None)
    assert [cost.gpus for cost in (half, given, twice)] == [64, 128, 256]
    for few, many in ((half, given), (given, twice)):
        assert many.pixels == 2 * few.pixels
        assert many.flops == pytest.approx(2 * few.flops)
        assert many.sent_bytes == pytest.approx(2 * few.sent_bytes, rel=0.05)


def test_a_budget_keeps_candidates_of_all_nodes_at_the_operations_of_one() -> None:
    by_scope = {(cost.scope, cost.budget is None): cost for cost in costs(CLUSTER) if cost.gpus == CLUSTER.size}
    rank, node, world, budget = (
        by_scope[key] for key in (("rank", True), ("node", True), ("world", True), ("world", False))
    )
    assert rank.flops < node.flops < world.flops
    assert 0.8 * node.flops < budget.flops <= node.flops
    assert node.pixels < budget.pixels < world.pixels
    assert budget.seconds <= node.seconds


def test_the_configs_own_pairs_are_shown_first_and_a_single_node_has_no_world_beyond_it() -> None:
    assert [cost.scope for cost in costs(replace(CLUSTER, nodes=1), "objective.association.scope=pair")] == [
        *("pair", "rank", "world"),
    ]


def test_nothing_is_shown_for_one_gpu_or_without_association() -> None:
    assert costs(replace(CLUSTER, nodes=1, per_node=1)) == []
    assert costs(CLUSTER, "objective.association.weight=0") == []
