"""The configuration of a model in transformers: the fields of ModelConfig, and what minrnn keeps besides."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, ClassVar

from transformers import PreTrainedConfig

from minrnn.integrations.transformers.available import STATE_NAME
from minrnn.models import ModelConfig
from minrnn.models.pretrained import MODEL_TYPE, SETTINGS, TABLE_VERSION

SHIM = "modeling_minrnn.py"
"""The module that transformers runs where minrnn has not been imported."""

SHIM_TEXT = '''"""The model's classes are those of the package minrnn: pip install 'minrnn[transformers]'."""

from minrnn.integrations.transformers import MinRNNConfig, MinRNNForCausalLM

__all__ = ["MinRNNConfig", "MinRNNForCausalLM"]
'''


class MinRNNConfig(PreTrainedConfig):
    """The configuration of a MinRNNForCausalLM.

    Args:
        kwargs: the fields of ModelConfig, such as vocab_size, d_model, num_layers and mixer, or their names
            in transformers (hidden_size, num_hidden_layers, tie_word_embeddings); bos_token_id, eos_token_id
            and pad_token_id; use_cache, whether calls return the state; and other settings of
            PreTrainedConfig.

    Raises:
        TypeError: a setting of the model has the wrong type.
        ValueError: it is out of range.
    """

    model_type = MODEL_TYPE
    keys_to_ignore_at_inference: ClassVar[list[str]] = [STATE_NAME]
    attribute_map: ClassVar[dict[str, str]] = {
        "hidden_size": "d_model",
        "num_hidden_layers": "num_layers",
        "tie_word_embeddings": "tie_embeddings",
    }

    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    use_cache: bool = True
    minrnn: dict[str, Any] | None = None
    """The table that `minrnn.models.pretrained` describes."""

    def __post_init__(self, **kwargs: Any) -> None:
        named = {self.attribute_map.get(name, name): value for name, value in kwargs.items()}
        settings = ModelConfig.from_dict({name: named.pop(name) for name in SETTINGS if name in named})
        for name, value in settings.to_dict().items():
            setattr(self, name, value)
        if self.minrnn is None:
            self.minrnn = {"format_version": TABLE_VERSION, "extra": {}}
        named.setdefault(
            "auto_map",
            {
                "AutoConfig": f"{Path(SHIM).stem}.MinRNNConfig",
                "AutoModelForCausalLM": f"{Path(SHIM).stem}.MinRNNForCausalLM",
            },
        )
        super().__post_init__(**named)

    @property
    def settings(self) -> ModelConfig:
        """The configuration of the SequenceModel."""
        return ModelConfig.from_dict({name: getattr(self, name) for name in SETTINGS})

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """Write config.json, and beside it the module that it names."""
        super().save_pretrained(save_directory, *args, **kwargs)
        (Path(save_directory) / SHIM).write_text(SHIM_TEXT, encoding="utf-8")

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoConfig") -> None:
        """Do nothing: registered, transformers would copy this package's files into each directory."""
