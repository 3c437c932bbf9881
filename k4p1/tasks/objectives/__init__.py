"""Objectives: what a task is about. Classification is here; users register their own."""

from k4p1.tasks.objectives.classification import CLASSIFICATION
from k4p1.tasks.objectives.objective import Objective
from k4p1.tasks.objectives.objective import find
from k4p1.tasks.objectives.objective import known
from k4p1.tasks.objectives.objective import register

__all__ = ["CLASSIFICATION", "Objective", "find", "known", "register"]
