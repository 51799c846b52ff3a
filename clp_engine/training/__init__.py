"""Training: reinforcement learning of one conditioned policy over many weightings at once."""

from clp_engine.training.config import CLPTrainingConfig
from clp_engine.training.optimizer import Padam
from clp_engine.training.reward_statistics import RewardStatistics
from clp_engine.training.trainer import CLPTrainer

__all__ = ["CLPTrainer", "CLPTrainingConfig", "Padam", "RewardStatistics"]
