"""The registry of tasks."""

from minrnn.files import check_kind
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
"""Task classes by name: `TASKS[config.task](config)`."""


def make_task(config: TaskConfig) -> Task:
    """Return the task of a configuration.

    Raises:
        ValueError: its data are missing, damaged or too small.
        OSError: its data cannot be downloaded or read.
        TypeError: `config` is not a task's configuration.
    """
    check_kind("make_task", "config", config, TaskConfig)
    return TASKS[config.task](config)  # type: ignore[call-arg]  # every task takes its configuration
