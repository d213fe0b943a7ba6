"""Import transformers, or raise an error that says how to install it.

The package's `__init__` imports this module before all others.
"""

from __future__ import annotations

INSTALL = "install it with: pip install 'minrnn[transformers]'"

OLDEST = (5, 17)
"""The oldest version that is tested."""

try:
    import transformers
except ModuleNotFoundError as error:
    raise ImportError(f"transformers is not installed; {INSTALL}") from error

__all__ = ["STATE_NAME"]

if tuple(map(int, transformers.__version__.split(".")[:2])) < OLDEST:
    oldest = ".".join(map(str, OLDEST))
    raise ImportError(f"transformers must be {oldest} or newer, got {transformers.__version__}; {INSTALL}")

STATE_NAME = (
    "cache"
    if "cache" in transformers.modeling_outputs.CausalLMOutputWithPast.__dataclass_fields__
    else "past_key_values"
)
"""What transformers calls a model's state in arguments and outputs: since 5.24 `cache`."""
