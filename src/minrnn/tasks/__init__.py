"""What to learn: the table TASKS, and each task's configuration and batches."""

from minrnn.tasks.decisions import DecisionsConfig, DecisionsTask
from minrnn.tasks.formal_languages import LANGUAGES, FormalLanguageConfig, FormalLanguageTask
from minrnn.tasks.labelled import LabelledTask
from minrnn.tasks.listops import ListOpsConfig, ListOpsTask
from minrnn.tasks.registry import TASKS, make_task
from minrnn.tasks.selective_copying import SelectiveCopyingConfig, SelectiveCopyingTask
from minrnn.tasks.task import IGNORED, Batch, Task, TaskConfig, TokenTask
from minrnn.tasks.text import TextConfig, TextTask
from minrnn.tasks.vocabulary import VOCABULARIES, Vocabulary

__all__ = [
    "IGNORED",
    "LANGUAGES",
    "TASKS",
    "VOCABULARIES",
    "Batch",
    "DecisionsConfig",
    "DecisionsTask",
    "FormalLanguageConfig",
    "FormalLanguageTask",
    "LabelledTask",
    "ListOpsConfig",
    "ListOpsTask",
    "SelectiveCopyingConfig",
    "SelectiveCopyingTask",
    "Task",
    "TaskConfig",
    "TextConfig",
    "TextTask",
    "TokenTask",
    "Vocabulary",
    "make_task",
]
