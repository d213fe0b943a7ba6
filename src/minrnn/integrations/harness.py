"""Language models of runs in EleutherAI's Language Model Evaluation Harness."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from minrnn.models import SequenceModel, generate
from minrnn.models.sequence import ModelState
from minrnn.tasks import Vocabulary
from minrnn.tasks.task import device_of, evaluation_mode

try:
    import lm_eval
    from lm_eval.api.model import TemplateLM
    from lm_eval.tasks import TaskManager
except ImportError as error:
    raise ImportError(
        f"minrnn.integrations.harness needs the extra harness ({error}): pip install 'minrnn[harness]'"
    ) from error

CHUNK = 4096
"""Tokens of a batch that are computed at a time, in all rows together; the state is carried between them."""

ROWS = 16
"""Rows of a batch."""

MOST_GENERATED = 256
"""Tokens to generate where a task does not say."""

BOOTSTRAPS = 1000
"""Samples of the harness's estimates of standard errors; its own default of 100,000 takes minutes."""


class Row(NamedTuple):
    """Tokens, of which those after the first few are scored."""

    tokens: Sequence[int]
    """A context of at least one token, and what follows it."""
    context: int
    """Number of tokens of the context."""


class HarnessModel(TemplateLM):
    """A trained language model with the interface of lm_eval.

    A context is the beginning of a document. A text of any length is read whole: the state is carried, where
    other models see windows. Log-likelihoods are sums of natural logarithms.

    Args:
        model: the model, in evaluation mode.
        vocabulary: the vocabulary that it was trained with.

    Source: https://github.com/EleutherAI/lm-evaluation-harness, lm_eval.api.model.
    """

    def __init__(self, model: SequenceModel, vocabulary: Vocabulary) -> None:
        super().__init__()
        self.model, self.vocabulary = model, vocabulary

    @property
    def eot_token_id(self) -> int:
        """The token before each document, which stands for an empty context.

        Raises:
            ValueError: there is none, as the model was trained on joined documents.
        """
        end = self.vocabulary.end_of_text
        if end is None:
            raise ValueError(
                "harness: a text without a context needs a model that knows where documents start; this one "
                "was trained with task.documents = joined"
            )
        return end

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **options: Any) -> list[int]:
        """Return the tokens of a text, after that of a document's start if there is one."""
        if add_special_tokens is False:
            ids: list[int] = self.vocabulary.encode(string).tolist()
            return ids
        return self.vocabulary.encode_beginning(string)

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood of each text, read as a document."""
        start = self.eot_token_id
        rows = [Row([start, *self.tok_encode(request.args[0], False)], 1) for request in requests]
        return [total for total, _ in self._score(rows)]

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **options: Any
    ) -> list[tuple[float, bool]]:
        return self._score([Row([*context, *rest], len(context)) for _, context, rest in requests])

    def _score(self, rows: Sequence[Row]) -> list[tuple[float, bool]]:
        """Return each row's log-likelihood after its context, and whether each token was the likeliest."""
        order = sorted(range(len(rows)), key=lambda i: -len(rows[i].tokens))
        found: dict[int, tuple[float, bool]] = {}
        for start in range(0, len(order), ROWS):
            batch = order[start : start + ROWS]
            found.update(zip(batch, self._score_batch([rows[i] for i in batch]), strict=True))
        return [found[i] for i in range(len(rows))]

    @torch.inference_mode()
    def _score_batch(self, rows: Sequence[Row]) -> list[tuple[float, bool]]:
        device = device_of(self.model)
        totals = torch.zeros(len(rows), dtype=torch.float64)
        greedy = torch.ones(len(rows), dtype=torch.bool)
        state: ModelState | None = None
        for inputs, targets, scored in _chunks(rows):
            logits, state = self.model(inputs.to(device), state)
            nats = functional.cross_entropy(
                logits.transpose(1, 2).float(), targets.to(device), reduction="none"
            )
            totals -= nats.cpu().double().masked_fill(~scored, 0).sum(1)
            greedy &= ((logits.argmax(-1).cpu() == targets) | ~scored).all(1)
        return list(zip(totals.tolist(), greedy.tolist(), strict=True))

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Return a continuation of each context, up to the first stop string or the document's end."""
        return [self._generate(*request.args) for request in requests]

    def _generate(self, context: str, settings: Mapping[str, Any]) -> str:
        until = settings.get("until") or []
        stops = [until] if isinstance(until, str) else list(until)
        end, text = self.vocabulary.end_of_text, ""
        tokens = generate(
            self.model,
            torch.tensor([self.tok_encode(context)], device=device_of(self.model)),
            int(settings.get("max_gen_toks", MOST_GENERATED)),
            temperature=float(settings.get("temperature", 0.0)) if settings.get("do_sample") else 0.0,
            end=end,
        )
        ids = takewhile(lambda token: token != end, map(int, tokens))
        for piece in self.vocabulary.decode_stream(ids):
            text += piece
            ends = [text.index(stop) for stop in stops if stop and stop in text]
            if ends:
                return text[: min(ends)]
        return text


def _chunks(rows: Sequence[Row]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield inputs, targets and which targets are scored, (rows, steps) each, for parts of a batch.

    Rows are padded at the end, which changes nothing before it.
    """
    longest = max(len(row.tokens) for row in rows)
    tokens = torch.zeros(len(rows), longest, dtype=torch.int64)
    scored = torch.zeros(len(rows), longest, dtype=torch.bool)
    for i, row in enumerate(rows):
        tokens[i, : len(row.tokens)] = torch.tensor(row.tokens)
        scored[i, row.context : len(row.tokens)] = True
    steps = max(1, CHUNK // len(rows))
    for start in range(0, longest - 1, steps):
        stop = min(start + steps, longest - 1)
        yield tokens[:, start:stop], tokens[:, start + 1 : stop + 1], scored[:, start + 1 : stop + 1]


def evaluate(
    model: SequenceModel,
    vocabulary: Vocabulary,
    tasks: Sequence[str],
    *,
    folder: Path | None = None,
    shots: int | None = None,
    limit: int | None = None,
) -> dict[str, dict[str, Any]]:
    """Evaluate a model on tasks of the harness.

    Args:
        model: the language model.
        vocabulary: its vocabulary.
        tasks: names of tasks, such as lambada_openai.
        folder: a folder with tasks of one's own, as the harness reads them.
        shots: examples before each question; None for what the task says.
        limit: questions of each task; None for all.

    Returns:
        The metrics of each task and group of tasks, under the harness's names.

    Raises:
        ValueError: a task is unknown, or needs what the model cannot do.
    """
    manager = _find(tasks, folder)
    with evaluation_mode(model):
        found = lm_eval.simple_evaluate(
            model=HarnessModel(model, vocabulary),
            tasks=list(tasks),
            num_fewshot=shots,
            limit=limit,
            task_manager=manager,
            log_samples=False,
            bootstrap_iters=BOOTSTRAPS,
        )
    assert found is not None  # None on other ranks than the first
    return {name: dict(metrics) for name, metrics in {**found["results"], **found.get("groups", {})}.items()}


def _find(tasks: Sequence[str], folder: Path | None) -> TaskManager:
    """Return what knows these tasks; to list the harness's own takes a while, and is left out if possible."""
    where = "lm_eval's"
    if folder is not None:
        if not folder.is_dir():
            raise ValueError(f"harness: the folder of tasks must be a directory, got {folder}")
        manager = TaskManager(include_path=str(folder), include_defaults=False)
        if tasks and set(tasks) <= set(manager.all_tasks):
            return manager
        where += f" or in {folder}"
    manager = TaskManager(include_path=None if folder is None else str(folder))
    unknown = sorted(set(tasks) - set(manager.all_tasks))
    if unknown or not tasks:
        raise ValueError(f"harness: tasks must be {where}, got {', '.join(unknown) or 'none'}")
    return manager
