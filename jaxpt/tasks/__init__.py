"""What the vectors of texts are good for: similarity (STS) and retrieval, during training and after it."""

from jaxpt.tasks.measure import TASKS, Task, measure_task, open_task, open_tasks, parse_task, task_metrics
from jaxpt.tasks.vectors import Vectors, encode, make_vectors, vectors_of

__all__ = [
    "TASKS",
    "Task",
    "Vectors",
    "encode",
    "make_vectors",
    "measure_task",
    "open_task",
    "open_tasks",
    "parse_task",
    "task_metrics",
    "vectors_of",
]
