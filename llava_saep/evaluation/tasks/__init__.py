"""Benchmarks, one file each: what they ask, how answers are scored, and what is uploaded where labels are hidden.

A plain file here is a benchmark and is found by its name; an underscore marks what several of them share.
"""

from ._base import (
    Answer,
    CategoryRow,
    EmbeddedImage,
    Exclusion,
    JudgedTask,
    JudgeRequest,
    Metric,
    Requirement,
    Review,
    Task,
    TaskQuestion,
    TaskResult,
)
from ._registry import TaskSplit, find_task, select_tasks, task_names

__all__ = [
    "Answer",
    "CategoryRow",
    "EmbeddedImage",
    "Exclusion",
    "JudgeRequest",
    "JudgedTask",
    "Metric",
    "Requirement",
    "Review",
    "Task",
    "TaskQuestion",
    "TaskResult",
    "TaskSplit",
    "find_task",
    "select_tasks",
    "task_names",
]
