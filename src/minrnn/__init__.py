"""Recurrent networks that train in parallel over time: minGRU, minLSTM, and models and tasks built on them.

>>> import torch
>>> from minrnn import MinGRU
>>> output, h_n = MinGRU(input_size=4, hidden_size=8, batch_first=True)(torch.zeros(1, 10, 4))
>>> output.shape, h_n.shape
(torch.Size([1, 10, 8]), torch.Size([1, 1, 8]))

Importing minrnn does not import torch: the names below are imported on first use, which keeps `minrnn --help`
fast. It does register the operators `torch.ops.minrnn.*`, which programs saved by torch.export and torch.jit
call by name: immediately if torch is already imported, otherwise when it is.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from minrnn.export import Exported as Exported
    from minrnn.export import export_sequence as export_sequence
    from minrnn.export import export_step as export_step
    from minrnn.mixers import MIXERS as MIXERS
    from minrnn.mixers import MinEMA as MinEMA
    from minrnn.mixers import MinEMACell as MinEMACell
    from minrnn.mixers import MinGRU as MinGRU
    from minrnn.mixers import MinGRUCell as MinGRUCell
    from minrnn.mixers import MinLSTM as MinLSTM
    from minrnn.mixers import MinLSTMCell as MinLSTMCell
    from minrnn.mixers import PairedMinLSTM as PairedMinLSTM
    from minrnn.mixers import PairedMinLSTMCell as PairedMinLSTMCell
    from minrnn.mixers import convert_rnns as convert_rnns
    from minrnn.mixers import from_mingru_pytorch as from_mingru_pytorch
    from minrnn.models import DecisionConfig as DecisionConfig
    from minrnn.models import DecisionModel as DecisionModel
    from minrnn.models import Decoder as Decoder
    from minrnn.models import ModelConfig as ModelConfig
    from minrnn.models import Policy as Policy
    from minrnn.models import SequenceModel as SequenceModel
    from minrnn.models import generate as generate
    from minrnn.models import load_checkpoint as load_checkpoint
    from minrnn.models import save_checkpoint as save_checkpoint
    from minrnn.ops import CANDIDATES as CANDIDATES
    from minrnn.ops import GATES as GATES
    from minrnn.ops import decompositions as decompositions
    from minrnn.ops import engines as engines
    from minrnn.ops import gated_scan as gated_scan
    from minrnn.ops import release_memory as release_memory
    from minrnn.ops import scan as scan
    from minrnn.ops import selective_scan as selective_scan
    from minrnn.tasks import TASKS as TASKS
    from minrnn.tasks import TextConfig as TextConfig
    from minrnn.tasks import TextTask as TextTask
    from minrnn.training import RunConfig as RunConfig
    from minrnn.training import RunLog as RunLog
    from minrnn.training import TrainConfig as TrainConfig
    from minrnn.training import train as train

    __version__: str
else:
    import sys
    from importlib import import_module

    # The names above, by subpackage.
    _ROOMS = {
        "export": ("Exported", "export_sequence", "export_step"),
        "mixers": (
            "MIXERS",
            "MinEMA",
            "MinEMACell",
            "MinGRU",
            "MinGRUCell",
            "MinLSTM",
            "MinLSTMCell",
            "PairedMinLSTM",
            "PairedMinLSTMCell",
            "convert_rnns",
            "from_mingru_pytorch",
        ),
        "models": (
            "DecisionConfig",
            "DecisionModel",
            "Decoder",
            "ModelConfig",
            "Policy",
            "SequenceModel",
            "generate",
            "load_checkpoint",
            "save_checkpoint",
        ),
        "ops": (
            "CANDIDATES",
            "GATES",
            "decompositions",
            "engines",
            "gated_scan",
            "release_memory",
            "scan",
            "selective_scan",
        ),
        "tasks": ("TASKS", "TextConfig", "TextTask"),
        "training": ("RunConfig", "RunLog", "TrainConfig", "train"),
    }
    __all__ = sorted(name for names in _ROOMS.values() for name in names)

    def __getattr__(name):
        if name == "__version__":
            return import_module("importlib.metadata").version("minrnn")
        for room, names in _ROOMS.items():
            if name in names:
                return getattr(import_module(f"minrnn.{room}"), name)
        raise AttributeError(f"module 'minrnn' has no attribute {name!r}")

    def __dir__():
        return [*globals(), *__all__]

    class _TorchFinder:
        """An import hook that registers the operators once torch has been imported."""

        @classmethod
        def find_spec(cls, name, path=None, target=None):
            if name != "torch":
                return None
            sys.meta_path.remove(cls)
            spec = import_module("importlib.util").find_spec(name)
            if spec is not None:
                spec.loader.exec_module = cls._followed(spec.loader.exec_module)
            return spec

        @staticmethod
        def _followed(exec_module):
            def exec_module_and_register(module):
                exec_module(module)
                try:
                    import_module("minrnn.ops")
                except (ImportError, RuntimeError, ValueError) as error:  # importing torch still succeeds
                    import_module("warnings").warn(f"minrnn's operators could not be registered: {error}")

            return exec_module_and_register

    if "torch" in sys.modules:
        import_module("minrnn.ops")
    else:
        sys.meta_path.insert(0, _TorchFinder)
