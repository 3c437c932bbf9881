"""How parameters move: pure training step, optimizers, store, training loop, checkpoints."""

from k4p1.engine.checkpoints import Checkpoints
from k4p1.engine.groups import plan_groups
from k4p1.engine.optimization import Optimization
from k4p1.engine.optimization import k4p1_rmsprop
from k4p1.engine.store import Store
from k4p1.engine.training import Trainer

__all__ = ["Checkpoints", "Optimization", "Store", "Trainer", "k4p1_rmsprop", "plan_groups"]
