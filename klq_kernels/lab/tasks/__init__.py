"""Tasks that need nothing but this package: a trainer can be tried out, tested and measured anywhere, without a hub.

    summarize    say in a few bytes what a note complains of; a rule scores it
    constant     the same notes, and the same reward for everything: the policy must stay where it is
    arithmetic   sums of three numbers in two steps, checked by their result
    star-graph   the way through a star graph, whose first step cannot be copied

Each comes with a tokenizer, a small model, writers of mixed quality to warm-start it on, reward functions, and a judge
with criteria of its own. ``task`` holds what they share, ``warm_start`` the supervised start.
"""

from __future__ import annotations

from .arithmetic import ARITHMETIC
from .star_graph import STAR_GRAPH
from .summarize import CONSTANT, SUMMARIZE
from .task import Case, Example, Task
from .warm_start import warm_started

_TASKS = {task.name: task for task in (SUMMARIZE, CONSTANT, ARITHMETIC, STAR_GRAPH)}
TASKS = tuple(_TASKS)

__all__ = ["TASKS", "Case", "Example", "Task", "load_task", "warm_started"]


def load_task(name: str) -> Task:
    """The task of that name; a ValueError names those there are."""
    if name not in _TASKS:
        raise ValueError(f"task: must be one of {', '.join(TASKS)}, got {name!r}")
    return _TASKS[name]
