"""The config of a run: one typed tree, read from YAML and `key=value` overrides.

Every value that a run depends on is a field of this tree, and the field's docstring is its documentation. Unknown keys,
wrong types and invalid combinations are refused before anything starts. The error names the file, the key and, for an
unknown key, the nearest valid one.
"""

from dist_pca.config.data import CacheConfig, DataConfig, SamplingConfig, WeightedShards
from dist_pca.config.evaluation import EvaluationConfig
from dist_pca.config.model import ModelConfig
from dist_pca.config.objective import (
    AssociationConfig,
    Communication,
    CrossEntropyConfig,
    DiceConfig,
    FeatureDistanceConfig,
    Implementation,
    Level,
    LovaszConfig,
    MaskedConsistencyConfig,
    ObjectiveConfig,
    ProductType,
    Scope,
    SelfTrainingConfig,
    SmoothnessConfig,
    SourceContrastConfig,
)
from dist_pca.config.run import RunConfig, load_config, save_config, validate_config
from dist_pca.config.telemetry import TelemetryConfig
from dist_pca.config.training import BATCH_KEYS, OptimizerConfig, ScheduleConfig, TrainingConfig
from dist_pca.config.views import PhotometricConfig

__all__ = [
    "BATCH_KEYS",
    "AssociationConfig",
    "CacheConfig",
    "Communication",
    "CrossEntropyConfig",
    "DataConfig",
    "DiceConfig",
    "EvaluationConfig",
    "FeatureDistanceConfig",
    "Implementation",
    "Level",
    "LovaszConfig",
    "MaskedConsistencyConfig",
    "ModelConfig",
    "ObjectiveConfig",
    "OptimizerConfig",
    "PhotometricConfig",
    "ProductType",
    "RunConfig",
    "SamplingConfig",
    "ScheduleConfig",
    "Scope",
    "SelfTrainingConfig",
    "SmoothnessConfig",
    "SourceContrastConfig",
    "TelemetryConfig",
    "TrainingConfig",
    "WeightedShards",
    "load_config",
    "save_config",
    "validate_config",
]
