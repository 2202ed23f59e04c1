"""The training engine: one loop for all methods and tasks, checkpoints, processes, logging. It knows no method and no data set."""

from geossl.engine.distributed import World, start_world, stop_world
from geossl.engine.guard import NonFiniteError
from geossl.engine.loop import BatchLoader, Hooks, Result, TrainConfig, Trainer, train
from geossl.engine.optim import OptimConfig, build_optimizer, learning_rate
from geossl.engine.seeds import seed_everything, step_generator

__all__ = [
    "BatchLoader",
    "Hooks",
    "NonFiniteError",
    "OptimConfig",
    "Result",
    "TrainConfig",
    "Trainer",
    "World",
    "build_optimizer",
    "learning_rate",
    "seed_everything",
    "start_world",
    "step_generator",
    "stop_world",
    "train",
]
