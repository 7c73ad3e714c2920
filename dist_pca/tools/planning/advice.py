"""Which ZeRO stage, scope and communication to take."""

from collections.abc import Iterator

from dist_pca.config import RunConfig
from dist_pca.tools.planning.hardware import Assumptions, Cluster
from dist_pca.tools.planning.network import NetworkStep
from dist_pca.tools.planning.predict import Prediction, predict

SLOWER = 1.25
"""A wider scope may cost so many times the time of the fastest that fits: it has more candidates for each pixel."""
BINS = 4096
"""Bins of Lovasz-Softmax that are considered where the config sorts: its loss to within 1 / 4096."""
_WIDTH = ("pair", "rank", "node", "world")


def best_choice(
    config: RunConfig,
    network: NetworkStep,
    cluster: Cluster,
    assumptions: Assumptions,
    *,
    images: tuple[int, int],
) -> Prediction | None:
    """Choose ZeRO stage, scope and communication.

    Of all that fit into memory and are at most `SLOWER` times as slow as the fastest of them, the one with the most
    candidates is chosen, then with Lovasz-Softmax over all pixels, then the fastest. ZeRO 2
    where stages are equal. None if nothing fits.
    """
    fitting = [
        prediction
        for stage in stages(config)
        for variant in _variants(config, images)
        if (
            prediction := predict(
                variant, network, cluster, assumptions, images=images, stage=stage, steps=config.training.steps
            )
        ).fits
    ]
    if not fitting:
        return None
    limit = SLOWER * min(prediction.timing.step for prediction in fitting)

    def worth(prediction: Prediction) -> tuple[int, bool, float]:
        objective = prediction.config.objective
        width = _WIDTH.index(objective.association.scope)
        return width, objective.lovasz.scope == "world", -round(prediction.timing.step, 4)

    return max((prediction for prediction in fitting if prediction.timing.step <= limit), key=worth)


def stages(config: RunConfig) -> tuple[int, ...]:
    """ZeRO stages that the run may have, the preferred one first."""
    offload = config.training.offload
    if offload.moves_parameters or offload.optimizer == "nvme":
        return (3,)
    return (2, 1) if config.model.compile else (2, 1, 3)


def as_overrides(prediction: Prediction) -> list[str]:
    """A choice as `key=value`s."""
    objective = prediction.config.objective
    chosen = [f"training.zero_stage={prediction.stage}"]
    if objective.lovasz.weight > 0:
        chosen.append(f"objective.lovasz.scope={objective.lovasz.scope}")
        if objective.lovasz.bins is not None:
            chosen.append(f"objective.lovasz.bins={objective.lovasz.bins}")
    if objective.adapt and objective.association.weight > 0:
        chosen.append(f"objective.association.scope={objective.association.scope}")
        if objective.association.scope in ("node", "world"):
            chosen.append(f"objective.association.communication={objective.association.communication}")
    return chosen


def _variants(config: RunConfig, images: tuple[int, int]) -> Iterator[RunConfig]:
    objective = config.objective
    associates = objective.adapt and objective.association.weight > 0
    together = objective.lovasz.model_copy(update={"scope": "world"})
    lovasz_terms = [
        together,
        together.model_copy(update={"bins": objective.lovasz.bins or BINS}),
        objective.lovasz.model_copy(update={"scope": "rank"}),
    ]
    scopes = [scope for scope in _WIDTH if scope != "pair" or images[0] == images[1]]
    for scope in scopes if associates else [objective.association.scope]:
        for communication in ("gather", "ring") if scope in ("node", "world") else ("auto",):
            for lovasz in lovasz_terms:
                yield config.model_copy(
                    update={
                        "objective": objective.model_copy(
                            update={
                                "association": objective.association.model_copy(
                                    update={"scope": scope, "communication": communication}
                                ),
                                "lovasz": lovasz,
                            }
                        )
                    }
                )
