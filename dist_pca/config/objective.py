"""`objective.*`: the terms of the training loss."""

from typing import Annotated, Literal

from pydantic import Field, model_validator
from typing_extensions import Self

from dist_pca.config.section import Fraction, NonNegative, Positive, PositiveNumber, Section, Weight

Level = Literal["features", "predictions"]
Scope = Literal["pair", "rank", "node", "world"]
Implementation = Literal["auto", "reference", "blockwise", "triton"]
Communication = Literal["auto", "gather", "ring"]
ProductType = Literal["fp32", "bf16"]


class CrossEntropyConfig(Section):
    """Cross-entropy on the source, whose weight is 1."""

    class_weights: Literal["median_frequency", "inverse_log"] | tuple[Weight, ...] | dict[str, Weight] | None = None
    """Weight of each class: a list in the order of train ids, a map by name (others are 1), or a rule for the pixel
    counts of the source's shards. `median_frequency`: the median over classes of their frequency, divided by the
    class's own, which is its share of the pixels of images in which it occurs (Eigen and Fergus, ICCV 2015).
    `inverse_log`: 1 / ln(1.02 + its share of all pixels) (Paszke et al., ENet, 2016). The loss is the weighted mean
    over pixels, so that only ratios matter. None weighs all pixels alike."""


class DiceConfig(Section):
    """Soft Dice loss on the source (Milletari et al., V-Net, 2016), over the pixels of all ranks."""

    weight: Weight = 0.0
    """Weight of the term."""


class LovaszConfig(Section):
    """Lovasz-Softmax loss on the source."""

    weight: Weight = 0.75
    """Weight of the term."""
    convention: Literal["mean", "released"] = "mean"
    """`mean`: the weight as given. `released`: multiplied by world size and accumulation, as in the authors' released
    run."""
    scope: Literal["rank", "node", "world"] = "world"
    """Pixels over which one loss is computed: those of each rank, of each node, or of all ranks."""
    bins: Positive | None = None
    """Number of bins in which errors are counted instead of sorted, for example 4096. Loss and gradient are then those
    of the sorted errors to within 1 / bins, in memory and traffic that do not depend on the number of ranks. None
    sorts, which gathers the pixels of the scope on every rank."""


class AssociationConfig(Section):
    """Cycle association of source and target pixels."""

    weight: Weight = 0.1
    """Weight of the sum over levels."""
    levels: tuple[Level, ...] = ("features", "predictions")
    """Levels at which cycles are found, independently of each other: one or both."""
    scope: Scope = "world"
    """Candidates for a match: pixels of the k-th target image for the k-th source image, or those of this rank, this
    node, or all ranks."""
    implementation: Implementation = "auto"
    """Implementation: `reference` (dense), `blockwise` (streamed), `triton` (fused kernels, on GPUs); `auto` takes the
    fastest one that can run."""
    communication: Communication = "auto"
    """How ranks get each other's keys: `gather` collects all keys on every rank, `ring` sends blocks of keys around a
    ring, in memory that does not grow with the number of ranks; `auto` gathers while all keys are few."""
    dtype: ProductType = "fp32"
    """Data type of matmul operands; sums, softmaxes and statistics stay fp32."""
    comm_dtype: ProductType = "fp32"
    """Data type in which keys are sent between ranks; under `dtype: bf16` they are sent in bf16 anyway."""
    deterministic: bool = False
    """Give bitwise equal results in every run; on GPUs this excludes the fastest sums, which have no fixed order."""
    pixel_budget: Positive | None = None
    """Largest number of pixels of each image that are associated; None takes all, as in the paper."""
    pixel_sampling: Literal["grid", "balanced"] = "grid"
    """How pixels are sampled under a budget: `grid` takes the crossings of random rows and columns; `balanced` takes,
    on the source, equally many pixels of each class."""
    detach_statistics: bool = True
    """Stop the gradient through the contrast normalisation's mean and standard deviation."""
    diffusion: Fraction = 0.5
    """Share of each target pixel's feature that is replaced by the similarity-weighted mean over its image before
    association; 0 is off. The teacher's features, which choose the matches with `teacher_matches`, are not diffused."""
    start_step: NonNegative = 0
    """First step with this term."""
    ramp_steps: NonNegative = 0
    """Steps over which the weight rises linearly from 0 after `start_step`."""
    teacher_check: bool = False
    """Keep a cycle only if the teacher's class at the matched target pixel equals the source label."""
    teacher_threshold: Fraction = 0.0
    """Least probability of the teacher's class for `teacher_check` to keep a cycle; 0 lets any class count, however
    unsure."""
    teacher_weight: bool = False
    """Weigh each cycle by the teacher's confidence at the matched target pixel."""
    teacher_matches: bool = False
    """Find matches with the teacher's features and predictions instead of the student's."""
    teacher_keys: bool = False
    """Use the teacher's features as keys for the student's queries, as in MoCo; needs `teacher_matches`."""
    class_balanced: bool = False
    """Average cycles within each class, then over classes; False gives all cycles the same weight."""
    class_weights: Literal["kept_share"] | None = None
    """Weight of each class in the mean over classes. `kept_share`: the share of its labelled source pixels whose cycle
    of features is kept, so that a class whose pixels rarely find their way back counts little, at both levels; needs
    `class_balanced`. None weighs all classes alike."""
    label_share: Fraction = 0.0
    """Least share of a grid cell's pixels that must agree for the cell to have a label; 0 takes the nearest pixel's
    label."""

    @property
    def uses_teacher(self) -> bool:
        """Whether the teacher's output is needed to find, check or weigh cycles."""
        return self.weight > 0 and (self.teacher_check or self.teacher_weight or self.teacher_matches)

    @model_validator(mode="after")
    def _check_keys(self) -> Self:
        if not self.levels:
            raise ValueError("levels: an empty list associates nothing; name a level, or set weight=0")
        if len(set(self.levels)) < len(self.levels):
            raise ValueError(f"levels: [{', '.join(self.levels)}] would add a loss twice; name each level once")
        if self.teacher_keys and not self.teacher_matches:
            raise ValueError("teacher_keys: needs matches found with the same features; set teacher_matches=true too")
        if self.teacher_threshold > 0 and not self.teacher_check:
            raise ValueError(
                "teacher_threshold: bounds the probability of the class that the teacher checks; set "
                "teacher_check=true, or it to 0"
            )
        if self.class_weights and not self.class_balanced:
            raise ValueError(
                "class_weights: weighs the classes of a class-balanced mean; set class_balanced=true, or it to null"
            )
        return self


class SelfTrainingConfig(Section):
    """Cross-entropy on target images with pasted source classes and a teacher's pseudo labels (DACS, 2021)."""

    weight: Weight = 0.0
    """Weight of the term; needs a teacher, so training.ema_decay > 0."""
    threshold: Fraction = 0.968
    """Probability from which a pseudo label is confident. The share of confident pixels is the weight of every target
    pixel."""
    ignore_top: Fraction = 0.0
    """Share of rows at the top of a crop without pseudo labels, for example rectification artefacts (DAFormer: 15 of
    512, so 0.0293)."""
    ignore_bottom: Fraction = 0.0
    """Share of rows at the bottom of a crop without pseudo labels, for example the ego vehicle's bonnet (DAFormer: 120
    of 512, so 0.2344)."""
    ignore_sides: Fraction = 0.0
    """Share of an image's columns at its left and at its right side without pseudo labels (HRDA and MIC: 30 of 2048, so
    0.0146). A crop loses those of them that it shows."""
    start_step: NonNegative = 0
    """First step with the term, and with masked consistency."""


class MaskedConsistencyConfig(Section):
    """Cross-entropy on target images with hidden blocks, with the teacher's pseudo labels (MIC, Hoyer et al. 2023)."""

    weight: Weight = 0.0
    """Weight of the term; threshold, ignored rows and columns and start step are those of self-training."""
    block: Positive = 64
    """Edge length of a hidden block, in pixels; MIC uses 64 for crops of 1024, and 32 at half that size."""
    ratio: Fraction = 0.7
    """Share of blocks that are hidden; they have the mean colour, which the network's normalisation makes 0."""


class SmoothnessConfig(Section):
    """Adaptive label smoothness on both domains."""

    weight: Weight = 0.01
    """Weight of the term, for each domain."""
    threshold: Annotated[float, Field(gt=0)] = 10.0
    """Mean negative log-probability (nats) below which predictions are sharpened and above which they are smoothed."""


class SourceContrastConfig(Section):
    """InfoNCE of the source's pixels, with their labels (Wang et al. 2021; PiPa, Chen et al. 2023)."""

    weight: Weight = 0.0
    """Weight of the term, which uses the associated features; PiPa uses 0.1, on a projection."""
    temperature: PositiveNumber = 0.1
    """Temperature by which cosine similarities are divided."""
    anchors: Positive = 100
    """Largest number of pixels of each class, drawn from the images of all ranks."""


class ClassStatisticsConfig(Section):
    """Contrast of source and target pixels with each class's distribution of features (SePiCo, Xie et al. 2023)."""

    weight: Weight = 0.0
    """Weight of the term, which uses the associated features; needs a teacher, so training.ema_decay > 0. Target pixels
    take the teacher's class where its probability reaches `objective.self_training.threshold`."""
    temperature: PositiveNumber = 0.1
    """Temperature by which cosine similarities are divided."""
    decay: Fraction = 0.99
    """Share of a class's mean and variance that is kept at each micro-batch with pixels of the class."""
    start_step: NonNegative = 0
    """First step with the term."""


class FeatureDistanceConfig(Section):
    """Distance of the backbone's deepest map to the pretrained backbone's, on source pixels of thing classes
    (DAFormer, 2022)."""

    weight: Weight = 0.0
    """Weight of the term; DAFormer uses 0.005. If it is not 0, every rank keeps a frozen copy of the backbone."""
    classes: tuple[str, ...] | None = None
    """Names of the classes whose grid cells are used; None takes those of Cityscapes' thing classes that the run
    has."""
    share: Fraction = 0.75
    """Least share of a cell's pixels that must be of one of these classes for the cell to be used; 0 takes the nearest
    pixel's label."""


class ObjectiveConfig(Section):
    """The terms of the training loss."""

    adapt: bool = True
    """Whether to adapt; False trains on the source only, and the target is not read at all."""
    cross_entropy: CrossEntropyConfig = CrossEntropyConfig()
    dice: DiceConfig = DiceConfig()
    lovasz: LovaszConfig = LovaszConfig()
    association: AssociationConfig = AssociationConfig()
    smoothness: SmoothnessConfig = SmoothnessConfig()
    self_training: SelfTrainingConfig = SelfTrainingConfig()
    masked_consistency: MaskedConsistencyConfig = MaskedConsistencyConfig()
    source_contrast: SourceContrastConfig = SourceContrastConfig()
    class_statistics: ClassStatisticsConfig = ClassStatisticsConfig()
    feature_distance: FeatureDistanceConfig = FeatureDistanceConfig()

    @property
    def trains_on_pseudo_labels(self) -> bool:
        """Whether self-training or masked consistency is on."""
        return self.adapt and (self.self_training.weight > 0 or self.masked_consistency.weight > 0)

    @property
    def uses_teacher(self) -> bool:
        """Whether any term needs the teacher."""
        return self.trains_on_pseudo_labels or (self.adapt and (self.association.uses_teacher or self.uses_statistics))

    @property
    def shows_source_to_teacher(self) -> bool:
        """Whether the teacher gets the source's images too."""
        association = self.association
        return self.uses_statistics or (self.adapt and association.uses_teacher and association.teacher_matches)

    @property
    def uses_statistics(self) -> bool:
        """Whether pixels are contrasted with class statistics."""
        return self.adapt and self.class_statistics.weight > 0

    @property
    def shows_target(self) -> bool:
        """Whether the student gets the target's images themselves, in addition to mixed and masked ones."""
        return self.adapt and (
            self.association.weight > 0
            or self.smoothness.weight > 0
            or self.class_statistics.weight > 0
            or not self.trains_on_pseudo_labels
        )
