"""What to learn: the table TASKS, and each task's configuration and batches."""

from minrnn.tasks.text import Batch, TextConfig, TextTask
from minrnn.tasks.vocabulary import VOCABULARIES, Vocabulary

TASKS = {"text": TextTask}

__all__ = ["TASKS", "VOCABULARIES", "Batch", "TextConfig", "TextTask", "Vocabulary"]
