"""A task: data + loss + metrics + patch."""

from k4p1.tasks.prepare import PreparedTask
from k4p1.tasks.prepare import prepare_tasks
from k4p1.tasks.task import Task

__all__ = ["PreparedTask", "Task", "prepare_tasks"]
