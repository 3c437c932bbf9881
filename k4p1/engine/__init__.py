"""How parameters move: pure training step, optimizers, store, training loop, checkpoints."""

from k4p1.engine.checkpoints import Checkpoints
from k4p1.engine.groups import plan_groups
from k4p1.engine.optimizer_config import OptimizerConfig
from k4p1.engine.optimizer_config import k4p1_rmsprop
from k4p1.engine.store import Store
from k4p1.engine.training import Trainer

__all__ = ["Checkpoints", "OptimizerConfig", "Store", "Trainer", "k4p1_rmsprop", "plan_groups"]
