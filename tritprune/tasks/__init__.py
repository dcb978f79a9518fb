"""Tasks: a model, its data and its metric in one object; ``pydocs`` and ``digits`` need no download, ``glue`` the rest.

Importing this package files the tasks, and the constructors of their own models in ``tritprune.registry.models``.
"""

from tritprune.tasks.base import Task, TaskData, get_task, register_task, tasks
from tritprune.tasks.digits import Digits, DigitsViT
from tritprune.tasks.glue import Glue
from tritprune.tasks.pydocs import PyDocs

__all__ = ["Digits", "DigitsViT", "Glue", "PyDocs", "Task", "TaskData", "get_task", "register_task", "tasks"]
