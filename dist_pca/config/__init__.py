"""What a run is: one typed tree, read from YAML and `key=value` overrides.

Every value a run depends on is a field here; its docstring is its documentation. Unknown keys, wrong types and
combinations that cannot work are refused before anything starts, naming the key, the file and the nearest valid key.
"""

from dist_pca.config.data import CacheConfig, DataConfig, SamplingConfig, WeightedShards
from dist_pca.config.evaluation import EvaluationConfig
from dist_pca.config.model import ModelConfig
from dist_pca.config.objective import (
    AssociationConfig,
    Exchange,
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
from dist_pca.config.training import OptimizerConfig, ScheduleConfig, TrainingConfig
from dist_pca.config.views import PhotometricConfig

__all__ = [
    "AssociationConfig",
    "CacheConfig",
    "DataConfig",
    "EvaluationConfig",
    "Exchange",
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
