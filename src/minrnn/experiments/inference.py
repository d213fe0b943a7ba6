"""Appendix D.2: time and memory of generating a token, against the length of the context."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from minrnn.benchmarks.measure import System
from minrnn.benchmarks.plots import draw_lines, finish, new_figure
from minrnn.benchmarks.timing import Phases, clock
from minrnn.experiments.experiment import Record, Table
from minrnn.experiments.published import published
from minrnn.experiments.timed import TimedExperiment, TimedSize, growth, scaled, series
from minrnn.experiments.variants import every_mixer, model_of
from minrnn.models import Decoder, SequenceModel

if TYPE_CHECKING:
    from matplotlib.figure import Figure

VOCABULARY = 65
LAYERS = 3
TOKENS = 16
"""Tokens that are generated after the context."""


@dataclass(frozen=True)
class InferenceSize(TimedSize):
    """The settings of a scale."""

    batches: tuple[int, ...]
    width: int
    contexts: tuple[int, ...]


class Inference(TimedExperiment):
    """Read a context, and generate tokens from it."""

    name = "inference"
    title = "Inference against context length (appendix D.2)"
    question = (
        "A model of three layers (a convolution, a mixer and an MLP each) reads a context in one call, "
        "then takes 16 steps from its carried state, all sequences of a batch at once; medians, measured in "
        "turns within one process. *Token* is the mean step, including the choice of the most likely token; "
        "*state* is the carried state of all sequences together. A recurrence's time per token does not "
        "depend on the context; attention's grows with its length."
    )
    changes = (
        "The paper gives neither widths nor the number of layers. cpu: width 128, contexts to 2,048, at "
        "least three rounds in place of 50. paper: width 384, 50 rounds."
    )
    sizes: ClassVar = {
        "cpu": InferenceSize(1.0, 20, (8, 16, 32, 64), 128, (64, 256, 1024, 2048)),
        "paper": InferenceSize(30.0, 50, (8, 16, 32, 64), 384, (64, 128, 256, 512, 1024, 2048)),
        "tiny": InferenceSize(0.01, 3, (2,), 8, (4, 8, 16)),
    }

    def systems(self) -> Sequence[str]:
        return every_mixer()

    def settings(self, size: InferenceSize) -> Iterator[dict[str, Any]]:
        for batch in size.batches:
            for context in size.contexts:
                yield {"B": batch, "D": size.width, "context": context}

    def inputs(self, setting: Mapping[str, Any], device: torch.device) -> Tensor:
        return torch.randint(VOCABULARY, (setting["B"], setting["context"]), device=device)

    def build(self, system: str, setting: Mapping[str, Any], inputs: Tensor) -> System:
        prompt, device = inputs, inputs.device
        config = model_of(system, vocab_size=VOCABULARY, d_model=setting["D"], num_layers=LAYERS)
        model = SequenceModel(config).to(device).eval()
        decoder = Decoder(model)

        @torch.inference_mode()
        def generate() -> Phases:
            start = clock(device)
            logits, state = decoder.prefill(prompt)
            token = logits.argmax(dim=-1)
            middle = clock(device)
            for _ in range(TOKENS):
                logits, state = decoder.step(token, state)
                token = logits.argmax(dim=-1)
            end = clock(device)
            return {"context": middle - start, "token": (end - middle) / TOKENS, "whole": end - start}

        with torch.inference_mode():
            _, state = decoder.prefill(prompt)
        parameters = sum(parameter.numel() for parameter in model.parameters())
        facts = {"parameters": parameters, "state_bytes": state_bytes(state)}
        return System(generate, facts=facts)

    def tables(self, records: Sequence[Record]) -> list[Table]:
        batches = sorted({record["setting"]["B"] for record in records})
        return [*(_table(records, batch) for batch in batches), published_table()]

    def draw(self, records: Sequence[Record]) -> Figure:
        batches = sorted({record["setting"]["B"] for record in records})
        shown = list(dict.fromkeys([batches[0], batches[-1]]))
        figure, panels = new_figure(len(shown), 3)
        for row, batch in enumerate(shown):
            token, whole, state = panels[3 * row : 3 * row + 3]
            draw_lines(token, scaled(series(records, "context", "token", B=batch), 1e3))
            finish(token, f"batch {batch}: a token", "context", "milliseconds", log="xy")
            draw_lines(whole, scaled(series(records, "context", "context", B=batch), 1e3))
            finish(whole, f"batch {batch}: reading the context", "context", "milliseconds", log="xy")
            draw_lines(state, scaled(series(records, "context", "state_bytes", B=batch), 1e-3))
            finish(state, f"batch {batch}: carried state", "context", "kB", log="xy")
        return figure


def published_table() -> Table:
    """Return the paper's published figures, measured on its own machine, by batch size."""
    rows = [
        ["minGRU faster than Mamba by", *map(str, map(published, ("6.6 %", "4.1 %", "4.9 %", "2.9 %")))],
        ["minLSTM slower than Mamba by", *map(str, map(published, ("3.6 %", "2.9 %", "0 %", "1.3 %")))],
        ["minGRU faster than GRU by", "", "", "", str(published("19.6 %"))],
        ["minLSTM faster than LSTM by", "", "", "", str(published("41.5 %"))],
    ]
    head = ["published, lengths to 2,048", *(f"batch {batch}" for batch in (8, 16, 32, 64))]
    return Table("Published: inference, context processing included", head, rows)


def _table(records: Sequence[Record], batch: int) -> Table:
    contexts = sorted({record["setting"]["context"] for record in records if record["setting"]["B"] == batch})
    tokens = series(records, "context", "token", B=batch)
    reading = series(records, "context", "context", B=batch)
    states = series(records, "context", "state_bytes", B=batch)
    rows = []
    for name, line in tokens.items():
        at, read, state = dict(line), dict(reading[name]), dict(states[name])
        rows.append(
            [
                name,
                *(f"{1e3 * at[context]:.3g}" if context in at else "failed" for context in contexts),
                growth(line),
                f"{1e3 * read[contexts[-1]]:.3g}" if contexts[-1] in read else "failed",
                f"{state[contexts[0]] / 1e3:.3g} to {state[contexts[-1]] / 1e3:.3g}"
                if {contexts[0], contexts[-1]} <= state.keys()
                else "",
            ]
        )
    head = ["mixer", *(f"token after {context:,}, ms" for context in contexts), "growth"]
    head += [f"reading {contexts[-1]:,}, ms", "state, kB"]
    return Table(f"Batch {batch}", head, rows)


def state_bytes(state: Any) -> int:
    """Return the bytes of all tensors of a state."""
    if isinstance(state, Tensor):
        return state.numel() * state.element_size()
    return sum(map(state_bytes, state))


EXPERIMENT = Inference()
