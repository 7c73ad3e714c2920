"""`objective.*`: what is minimised."""

from typing import Annotated, Literal

from pydantic import Field, model_validator
from typing_extensions import Self

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
    teacher_check: bool = False
    """Keep a cycle only where the teacher's class of the matched target pixel is the source label."""
    teacher_weight: bool = False
    """Weigh each cycle by the teacher's confidence at the matched target pixel."""
    teacher_matches: bool = False
    """Let the teacher's features and predictions choose the matches, in place of the student's."""
    teacher_keys: bool = False
    """Pull the student's queries towards the teacher's pixels, as in MoCo; needs `teacher_matches`."""
    class_balanced: bool = False
    """Take the mean over cycles within each class, then over classes; False weighs all cycles alike."""
    label_share: Fraction = 0.0
    """A grid cell has a label where at least this share of its pixels agrees; 0 takes the nearest pixel's label."""

    @property
    def uses_teacher(self) -> bool:
        """Whether the teacher has a say in which cycles count, and how."""
        return self.weight > 0 and (self.teacher_check or self.teacher_weight or self.teacher_matches)

    @model_validator(mode="after")
    def _check_keys(self) -> Self:
        if self.teacher_keys and not self.teacher_matches:
            raise ValueError("teacher_keys: needs matches found on the same pixels; set teacher_matches=true too")
        return self


class SelfTrainingConfig(Section):
    """Cross-entropy on target images with pasted source classes and a teacher's pseudo labels (DACS, 2021)."""

    weight: Weight = 0.0
    """Weight of the term; needs a teacher, so training.ema_decay."""
    threshold: Fraction = 0.968
    """Probability from which a pseudo label is confident. Every target pixel weighs the share of confident pixels."""
    ignore_top: Fraction = 0.0
    """Share of rows at the top of a crop without pseudo labels, such as rectification leaves (DAFormer: 0.03)."""
    ignore_bottom: Fraction = 0.0
    """Share of rows at the bottom of a crop without pseudo labels, such as the own car's bonnet (DAFormer: 0.23)."""
    start_step: NonNegative = 0
    """First step with the term, and with masked consistency."""


class MaskedConsistencyConfig(Section):
    """Cross-entropy on target images with hidden blocks, with the teacher's pseudo labels (MIC, Hoyer et al. 2023)."""

    weight: Weight = 0.0
    """Weight of the term; thresholds, ignored rows and start are those of self-training."""
    block: Positive = 64
    """Edge of a hidden block, in pixels; MIC takes 64 for crops of 1024 and 32 at half the size."""
    ratio: Fraction = 0.7
    """Share of blocks hidden."""


class SmoothnessConfig(Section):
    """Adaptive label smoothness on both domains."""

    weight: Weight = 0.01
    """Weight of the term, for each domain."""
    threshold: Annotated[float, Field(gt=0)] = 10.0
    """Mean negative log-probability (nats) below which predictions are sharpened and above which they are smoothed."""


class SourceContrastConfig(Section):
    """InfoNCE of the source's pixels, with their labels (Wang et al. 2021; PiPa, Chen et al. 2023)."""

    weight: Weight = 0.0
    """Weight of the term, on the features that are associated; PiPa takes 0.1, on a projection."""
    temperature: Annotated[float, Field(gt=0)] = 0.1
    """What cosines are divided by."""
    anchors: Positive = 100
    """Most pixels of each class that take part, drawn from the images of all ranks."""


class FeatureDistanceConfig(Section):
    """Distance of the backbone's deepest map to the pretrained one's, on the source's things (DAFormer, 2022)."""

    weight: Weight = 0.0
    """Weight of the term; DAFormer takes 0.005. Every rank then has a frozen copy of the backbone."""
    classes: tuple[str, ...] | None = None
    """Names of the classes whose cells count; None takes Cityscapes' thing classes, as far as the run has them."""
    share: Fraction = 0.75
    """A cell counts where at least this share of its pixels is of one of these classes; 0 takes the nearest pixel's."""


class ObjectiveConfig(Section):
    """What is minimised."""

    adapt: bool = True
    """False trains on the source alone: the target is not read at all."""
    lovasz: LovaszConfig = LovaszConfig()
    association: AssociationConfig = AssociationConfig()
    smoothness: SmoothnessConfig = SmoothnessConfig()
    self_training: SelfTrainingConfig = SelfTrainingConfig()
    masked_consistency: MaskedConsistencyConfig = MaskedConsistencyConfig()
    source_contrast: SourceContrastConfig = SourceContrastConfig()
    feature_distance: FeatureDistanceConfig = FeatureDistanceConfig()

    @property
    def trains_on_pseudo_labels(self) -> bool:
        """Whether self-training or masked consistency is on."""
        return self.adapt and (self.self_training.weight > 0 or self.masked_consistency.weight > 0)

    @property
    def uses_teacher(self) -> bool:
        """Whether any term needs the teacher."""
        return self.trains_on_pseudo_labels or (self.adapt and self.association.uses_teacher)

    @property
    def shows_target(self) -> bool:
        """Whether the student sees the target's images as they are, beside mixed and masked ones."""
        return self.adapt and (
            self.association.weight > 0 or self.smoothness.weight > 0 or not self.trains_on_pseudo_labels
        )
