"""`objective.*`: what is minimised."""

from typing import Annotated, Literal

from pydantic import Field

from dist_pca.config.section import Fraction, NonNegative, Positive, Section, Weight

Level = Literal["features", "predictions"]
Scope = Literal["pair", "rank", "node", "world"]
Implementation = Literal["auto", "reference", "blockwise", "triton"]
Exchange = Literal["auto", "gather", "ring"]
ProductType = Literal["fp32", "bf16"]


class LovaszConfig(Section):
    """Lovasz-Softmax on the source."""

    weight: Weight = 0.75
    """Weight of the term."""
    convention: Literal["mean", "released"] = "mean"
    """`mean`: the weight as written. `released`: times world size and accumulation, as the authors' runs had it."""
    scope: Literal["rank", "world"] = "world"
    """Pixels one loss is computed over: this rank's, or those of all ranks."""


class AssociationConfig(Section):
    """Cycle association of both domains' pixels."""

    weight: Weight = 0.1
    """Weight of the summed levels."""
    levels: tuple[Level, ...] = ("features", "predictions")
    """Levels that find cycles, each on its own."""
    scope: Scope = "world"
    """Pool of candidates: k-th source image with k-th target image, this rank, this node, or all ranks."""
    implementation: Implementation = "auto"
    """How it is computed: `reference` (dense), `blockwise` (streamed), `triton` (fused, on GPUs); `auto` takes the
    fastest that can run."""
    exchange: Exchange = "auto"
    """How ranks of a pool see each other's keys: `gather` holds all of them on every rank, `ring` passes them round in
    the same memory for any number of ranks; `auto` gathers while that is small."""
    dtype: ProductType = "fp32"
    """Type of the operands of matrix products; sums, softmaxes and statistics stay fp32."""
    wire_dtype: ProductType = "fp32"
    """Type of keys on their way between ranks; under `dtype: bf16` they travel in bf16 anyway."""
    deterministic: bool = False
    """Same bits on every run, on GPUs too, where the fastest sums have no fixed order."""
    position_budget: Positive | None = None
    """Most positions of each image that take part; None takes all, which the method means."""
    position_sampling: Literal["grid", "balanced"] = "grid"
    """What a budget takes: where random rows and columns cross, or on the source equally many of each class."""
    detach_statistics: bool = True
    """Stop the gradient through the contrast normalisation's mean and standard deviation."""
    diffusion: Fraction = 0.5
    """Share of a target pixel replaced by its image's similarity-weighted mean before association; 0 is off."""
    start_step: NonNegative = 0
    """First step with the term; earlier ones train on the source alone."""
    ramp_steps: NonNegative = 0
    """Steps over which the weight rises linearly from 0 after `start_step`."""


class SmoothnessConfig(Section):
    """Adaptive label smoothness on both domains."""

    weight: Weight = 0.01
    """Weight of the term, for each domain."""
    threshold: Annotated[float, Field(gt=0)] = 10.0
    """Mean negative log-probability (nats) below which predictions are sharpened and above which they are smoothed."""


class ObjectiveConfig(Section):
    """What is minimised."""

    adapt: bool = True
    """False trains on the source alone: the target is not read at all."""
    lovasz: LovaszConfig = LovaszConfig()
    association: AssociationConfig = AssociationConfig()
    smoothness: SmoothnessConfig = SmoothnessConfig()
