"""The configuration: a pydantic tree that refuses unknown keys, read from YAML with dotted overrides."""

from dvpo_service.config.algorithm import AlgorithmConfig
from dvpo_service.config.load import load_config, shipped_configs, to_yaml
from dvpo_service.config.pools import CriticConfig, KLConfig, OptimConfig, PolicyConfig
from dvpo_service.config.rewards import RewardConfig, RewardPart
from dvpo_service.config.rollouts import Backend, RolloutConfig
from dvpo_service.config.schema import (
    ClusterConfig,
    Config,
    DataConfig,
    ModelConfig,
    TrackingConfig,
    TrainerConfig,
    WarmstartConfig,
)
from dvpo_service.config.serve import ServeConfig

__all__ = [
    "AlgorithmConfig",
    "Backend",
    "ClusterConfig",
    "Config",
    "CriticConfig",
    "DataConfig",
    "KLConfig",
    "ModelConfig",
    "OptimConfig",
    "PolicyConfig",
    "RewardConfig",
    "RewardPart",
    "RolloutConfig",
    "ServeConfig",
    "TrackingConfig",
    "TrainerConfig",
    "WarmstartConfig",
    "load_config",
    "shipped_configs",
    "to_yaml",
]
