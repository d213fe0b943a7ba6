"""Tasks: the registry TASKS, and each task's configuration, batches, loss and evaluation."""

from minrnn.tasks.decisions import DecisionsConfig as DecisionsConfig
from minrnn.tasks.decisions import DecisionsTask as DecisionsTask
from minrnn.tasks.formal_languages import LANGUAGES as LANGUAGES
from minrnn.tasks.formal_languages import FormalLanguageConfig as FormalLanguageConfig
from minrnn.tasks.formal_languages import FormalLanguageTask as FormalLanguageTask
from minrnn.tasks.labeled import LabeledTask as LabeledTask
from minrnn.tasks.listops import ListOpsConfig as ListOpsConfig
from minrnn.tasks.listops import ListOpsTask as ListOpsTask
from minrnn.tasks.registry import TASKS as TASKS
from minrnn.tasks.registry import make_task as make_task
from minrnn.tasks.selective_copying import SelectiveCopyingConfig as SelectiveCopyingConfig
from minrnn.tasks.selective_copying import SelectiveCopyingTask as SelectiveCopyingTask
from minrnn.tasks.task import IGNORED as IGNORED
from minrnn.tasks.task import Batch as Batch
from minrnn.tasks.task import Task as Task
from minrnn.tasks.task import TaskConfig as TaskConfig
from minrnn.tasks.task import TokenTask as TokenTask
from minrnn.tasks.text import TextConfig as TextConfig
from minrnn.tasks.text import TextTask as TextTask
from minrnn.tasks.vocabulary import VOCABULARIES as VOCABULARIES
from minrnn.tasks.vocabulary import Vocabulary as Vocabulary
