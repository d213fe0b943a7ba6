"""Every task by its name."""

from minrnn.tasks.decisions import DecisionsTask
from minrnn.tasks.formal_languages import FormalLanguageTask
from minrnn.tasks.listops import ListOpsTask
from minrnn.tasks.selective_copying import SelectiveCopyingTask
from minrnn.tasks.task import Task, TaskConfig
from minrnn.tasks.text import TextTask

TASKS: dict[str, type[Task]] = {
    kind.config_type.task: kind
    for kind in (TextTask, SelectiveCopyingTask, FormalLanguageTask, ListOpsTask, DecisionsTask)
}
"""Every task by the name that its configuration has: `TASKS[config.task](config)`."""


def make_task(config: TaskConfig) -> Task:
    """Return the task of a configuration.

    Raises:
        ValueError: its data are missing, damaged or too few.
        OSError: they cannot be downloaded or read.
    """
    return TASKS[config.task](config)  # type: ignore[call-arg]  # every task takes its configuration
