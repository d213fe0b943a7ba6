"""A model in transformers computes what it does in minrnn, however it is called, padded, saved or trained."""

from __future__ import annotations

import copy
import inspect
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from minrnn.cli.main import main
from minrnn.mixers import MIXERS
from minrnn.models import (
    DecisionConfig,
    DecisionModel,
    ModelConfig,
    SequenceModel,
    generate,
    load_checkpoint,
)
from minrnn.tasks import TextConfig, Vocabulary
from minrnn.tasks.documents import Piece
from minrnn.tasks.vocabulary import END_OF_TEXT, ByteVocabulary, CharacterVocabulary, SubwordVocabulary
from minrnn.training import RunConfig, RunLog, TrainConfig, Trained, load_trained, read_config, train

if None in map(find_spec, ("transformers", "accelerate")):
    pytest.skip("transformers is not installed: the extra transformers", allow_module_level=True)

import transformers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    DataCollatorWithFlattening,
    TextStreamer,
    Trainer,
    TrainingArguments,
    pipeline,
)

from minrnn.integrations.transformers import (
    STATE_NAME,
    MinRNNConfig,
    MinRNNForCausalLM,
    MinRNNState,
    export_pretrained,
    make_tokenizer,
)
from minrnn.integrations.transformers.resets import find_resets

SIZES: dict[str, Any] = {"vocab_size": 257, "d_model": 16, "num_layers": 2, "num_heads": None}
END = 256
GREEDY = {"do_sample": False, "eos_token_id": None}

every_mixer = pytest.mark.parametrize("mixer", MIXERS)

transformers.utils.logging.disable_progress_bar()


def model_of(mixer: str = "mingru", **settings: Any) -> SequenceModel:
    torch.manual_seed(0)
    return SequenceModel(ModelConfig(**{**SIZES, "mixer": mixer, **settings})).eval()


def wrapped(mixer: str = "mingru", **settings: Any) -> MinRNNForCausalLM:
    marks = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), END)
    return MinRNNForCausalLM.from_model(model_of(mixer, **settings), **marks).eval()


def tokens_of(batch: int, steps: int, seed: int = 1) -> Tensor:
    return torch.randint(250, (batch, steps), generator=torch.Generator().manual_seed(seed))


def padded(rows: list[Tensor], side: str = "left") -> dict[str, Tensor]:
    longest = max(row.numel() for row in rows)
    ids = torch.full((len(rows), longest), END)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        place = slice(longest - row.numel(), None) if side == "left" else slice(None, row.numel())
        ids[index, place], mask[index, place] = row, 1
    return {"input_ids": ids, "attention_mask": mask}


def spied(model: MinRNNForCausalLM, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return the list to which each call of the model adds its number of steps."""
    steps: list[int] = []
    forward = MinRNNForCausalLM.forward

    def counted(self: MinRNNForCausalLM, input_ids: Tensor | None = None, **kwargs: Any) -> Any:
        assert input_ids is not None
        steps.append(input_ids.shape[1])
        return forward(self, input_ids, **kwargs)

    counted.__signature__ = inspect.signature(forward)  # type: ignore[attr-defined]
    monkeypatch.setattr(MinRNNForCausalLM, "forward", counted)
    return steps


# --- one model in two libraries -----------------------------------------------------------------------------


@every_mixer
@pytest.mark.parametrize("tied", [False, True])
def test_a_saved_model_is_read_by_both(mixer: str, tied: bool, tmp_path: Path) -> None:
    model = model_of(mixer, tie_embeddings=tied)
    tokens = tokens_of(2, 7)
    with torch.no_grad():
        expected, _ = model(tokens)
        MinRNNForCausalLM.from_model(model).save_pretrained(tmp_path)
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert torch.equal(theirs(tokens).logits, expected)
        ours, extra = load_checkpoint(tmp_path)
        assert torch.equal(ours.eval()(tokens)[0], expected)
    assert extra == {}
    assert ours.config == model.config
    assert AutoConfig.from_pretrained(tmp_path).settings == model.config
    assert theirs.config.tie_word_embeddings == tied


def test_settings_have_transformers_names_too_and_are_checked() -> None:
    config = MinRNNConfig(hidden_size=24, num_hidden_layers=3, tie_word_embeddings=True, vocab_size=9)
    assert config.settings == ModelConfig(vocab_size=9, d_model=24, num_layers=3, tie_embeddings=True)
    assert (config.hidden_size, config.num_hidden_layers) == (24, 3)
    for name in ("d_model", "hidden_size"):
        with pytest.raises(ValueError, match="d_model must be positive"):
            MinRNNConfig(**{name: -1})
    with pytest.raises(ValueError, match="mixer must be one of"):
        MinRNNConfig(mixer="mingur")


def test_a_directory_says_every_setting(tmp_path: Path) -> None:
    """A default that a later version changes does not change the model."""
    MinRNNConfig().save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert ModelConfig().to_dict().items() <= saved.items()


def test_new_models_have_minrnns_initial_values() -> None:
    torch.manual_seed(3)
    ours = SequenceModel(ModelConfig(**SIZES))
    torch.manual_seed(3)
    theirs = MinRNNForCausalLM(MinRNNConfig(**SIZES))
    for name, tensor in ours.state_dict().items():
        assert torch.equal(theirs.model.state_dict()[name], tensor), name


@every_mixer
def test_what_a_directory_lacks_is_drawn(mixer: str, tmp_path: Path) -> None:
    """As a new model's: what is constant in that is equal, and what is random is as wide."""
    model, lacking = wrapped(mixer, num_layers=3), ("0.down.bias", "blocks.1", "blocks.2", "head")
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, 77.0)
    kept = {name: x for name, x in model.state_dict().items() if not any(each in name for each in lacking)}
    model.save_pretrained(tmp_path, state_dict=dict(kept))
    found = AutoModelForCausalLM.from_pretrained(tmp_path).model.state_dict()
    for name, new in model_of(mixer, num_layers=3).state_dict().items():
        if f"model.{name}" in kept:
            assert bool((found[name] == 77).all()), name
        elif bool((new == new.flatten()[0]).all()):
            assert torch.equal(found[name], new), name
        else:
            assert found[name].isfinite().all(), name
            assert 0.4 * new.std() < found[name].std() < 2.5 * new.std(), name


@pytest.mark.parametrize("like_others", [True, False])
def test_the_vocabulary_can_grow(like_others: bool, tmp_path: Path) -> None:
    model = wrapped()
    before = model(tokens_of(1, 3)).logits
    model.resize_token_embeddings(300, mean_resizing=like_others)
    model.save_pretrained(tmp_path)
    found = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert found.config.settings.vocab_size == 300
    torch.testing.assert_close(found(tokens_of(1, 3)).logits[..., :257], before)
    assert found.model.embedding.weight[257:].std() < 0.1
    assert model.model.config == found.model.config  # so that minrnn's `generate` takes the new tokens


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_model_keeps_its_dtype(dtype: torch.dtype) -> None:
    model = model_of().to(dtype)
    found = MinRNNForCausalLM.from_model(model).eval()
    assert found.dtype == dtype
    assert torch.equal(found(tokens_of(1, 4)).logits, model(tokens_of(1, 4))[0])


def test_bfloat16(tmp_path: Path) -> None:
    wrapped().to(torch.bfloat16).save_pretrained(tmp_path)
    found = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert {parameter.dtype for parameter in found.parameters()} == {torch.bfloat16}
    tokens = tokens_of(2, 5)
    expected, _ = load_checkpoint(tmp_path)[0].eval()(tokens)
    logits = found(tokens).logits
    assert logits.dtype == torch.bfloat16
    assert torch.equal(logits, expected)
    assert found.generate(tokens, max_new_tokens=4, **GREEDY).shape == (2, 9)


# --- generating ---------------------------------------------------------------------------------------------


@every_mixer
def test_greedy_decoding_takes_single_steps_and_is_minrnns(
    mixer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, prompt = wrapped(mixer), tokens_of(2, 7)
    steps = spied(model, monkeypatch)
    found = model.generate(prompt, max_new_tokens=6, **GREEDY)
    assert steps == [7, 1, 1, 1, 1, 1]
    again = model.generate(prompt, max_new_tokens=6, use_cache=False, return_dict_in_generate=True, **GREEDY)
    assert torch.equal(again.sequences, found)
    assert again.get(STATE_NAME) is None
    assert steps[6:] == [7, 8, 9, 10, 11, 12]
    ours = torch.stack(list(generate(model_of(mixer), prompt, 6, temperature=0)), dim=1)
    assert torch.equal(found[:, 7:], ours)


WAYS: dict[str, dict[str, Any]] = {
    "sampling": {"do_sample": True, "top_k": 20, "temperature": 2.0},
    "several samples": {"do_sample": True, "num_return_sequences": 3},
    "beams": {"num_beams": 3, "do_sample": False},
    "beams that are sampled": {"num_beams": 3, "do_sample": True},
    "several beams": {"num_beams": 4, "num_return_sequences": 2, "do_sample": False},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("mixer", ["mingru", "attention"])
def test_every_way_of_decoding_is_the_same_without_a_state(way: str, mixer: str) -> None:
    model, prompt = wrapped(mixer), tokens_of(2, 5)
    found = []
    for use_cache in (True, False):
        torch.manual_seed(0)
        settings = {**WAYS[way], "use_cache": use_cache, "eos_token_id": None}
        found.append(model.generate(prompt, max_new_tokens=6, **settings))
    assert torch.equal(*found)


@every_mixer
def test_padding_on_the_left_is_exact(mixer: str) -> None:
    model, rows = wrapped(mixer), [tokens_of(1, n, n)[0] for n in (3, 9, 1, 6)]
    batch = padded(rows)
    logits = model(**batch).logits
    others = {**batch, "input_ids": torch.where(batch["attention_mask"] == 0, 7, batch["input_ids"])}
    assert torch.equal(
        model(**others).logits[batch["attention_mask"] == 1], logits[batch["attention_mask"] == 1]
    )
    for index, row in enumerate(rows):
        alone = model(row[None]).logits[0]
        torch.testing.assert_close(logits[index, -row.numel() :], alone, rtol=1e-5, atol=1e-6)
    found = model.generate(**batch, max_new_tokens=5, **GREEDY)
    for index, row in enumerate(rows):
        alone = model.generate(row[None], max_new_tokens=5, **GREEDY)
        assert torch.equal(found[index, -5:], alone[0, -5:])


@pytest.mark.parametrize("mixer", ["mingru", "lstm", "attention"])
@pytest.mark.parametrize("size", [1, 2, 4, 100])
def test_a_prompt_in_chunks(mixer: str, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks may end between the padding and the first token."""
    model, batch = wrapped(mixer), padded([tokens_of(1, n, n)[0] for n in (3, 9, 5)])
    expected = model.generate(**batch, max_new_tokens=4, **GREEDY)
    steps = spied(model, monkeypatch)
    assert torch.equal(model.generate(**batch, max_new_tokens=4, prefill_chunk_size=size, **GREEDY), expected)
    assert max(steps) == min(size, 9)


@pytest.mark.parametrize("mixer", ["mingru", "lstm", "attention"])
def test_a_returned_state_is_continued(mixer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompt = wrapped(mixer), tokens_of(2, 6)
    whole = model.generate(prompt, max_new_tokens=9, **GREEDY)
    first = model.generate(prompt, max_new_tokens=4, return_dict_in_generate=True, **GREEDY)
    state = first[STATE_NAME]
    assert isinstance(state, MinRNNState)
    assert state.get_seq_length() == 9  # the last token has not been read
    kept = copy.deepcopy(state)
    steps = spied(model, monkeypatch)
    for each in (kept, state):
        again = model.generate(first.sequences, max_new_tokens=5, **{STATE_NAME: each}, **GREEDY)
        assert torch.equal(again, whole)
    assert steps == [1] * 10


@every_mixer
def test_calls_continue_a_state(mixer: str) -> None:
    model, tokens = wrapped(mixer), tokens_of(2, 9)
    whole = model(tokens, use_cache=True)
    first = model(tokens[:, :4], use_cache=True)
    state = first[STATE_NAME]
    second = model(tokens[:, 4:], **{STATE_NAME: state})
    logits = torch.cat([first.logits, second.logits], dim=1)
    torch.testing.assert_close(logits, whole.logits, rtol=1e-4, atol=1e-5)
    assert second[STATE_NAME] is state
    assert state.get_seq_length() == 9
    assert model(tokens, logits_to_keep=1).logits.shape == (2, 1, 257)
    kept = torch.tensor([0, 5])
    assert torch.equal(model(tokens, logits_to_keep=kept).logits, whole.logits[:, kept])


def test_a_state_is_returned_where_it_can_be_continued() -> None:
    model, tokens = wrapped(), tokens_of(2, 4)
    right = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    assert isinstance(model(tokens).get(STATE_NAME), MinRNNState)
    assert model(tokens, attention_mask=right.flip(1)).get(STATE_NAME) is not None
    assert model(tokens, attention_mask=right).get(STATE_NAME) is None
    assert model(tokens, use_cache=False).get(STATE_NAME) is None
    model.config.use_cache = False
    assert model(tokens).get(STATE_NAME) is None
    assert model(tokens, use_cache=True).get(STATE_NAME) is not None
    model.config.use_cache = True
    assert model.train()(tokens).get(STATE_NAME) is None


def test_outputs_can_be_a_tuple() -> None:
    model, tokens = wrapped(), tokens_of(2, 4)
    named = model(tokens, labels=tokens)
    loss, logits, state = model(tokens, labels=tokens, return_dict=False)
    assert torch.equal(loss, named.loss)
    assert torch.equal(logits, named.logits)
    assert isinstance(state, MinRNNState)
    model.config.return_dict = False
    assert isinstance(model(tokens), tuple)


@pytest.mark.parametrize("mixer", ["mingru", "attention"])
def test_positions_and_padding_go_together(mixer: str) -> None:
    """Two documents in a row that starts with padding, whose positions are none of a start."""
    model, first, second = wrapped(mixer), tokens_of(1, 3, 1)[0], tokens_of(1, 4, 2)[0]
    batch = padded([torch.cat([first, second]), tokens_of(1, 9)[0]])
    positions = torch.tensor([[1, 1, 0, 1, 2, 0, 1, 2, 3], list(range(9))])
    logits = model(**batch, position_ids=positions).logits
    alone = torch.cat([model(row[None]).logits[0] for row in (first, second)])
    torch.testing.assert_close(logits[0, 2:], alone, rtol=1e-5, atol=1e-6)
    late = model(**batch, position_ids=positions.clamp(min=1)).logits  # where padding ends is enough
    torch.testing.assert_close(late[0, 2:5], alone[:3], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(late[0, 5:], alone[3:])


def test_one_row_of_positions_is_for_all_rows() -> None:
    model, tokens, positions = wrapped(), tokens_of(3, 6), torch.tensor([[0, 1, 0, 1, 2, 0]])
    expected = model(tokens, position_ids=positions.expand(3, 6).clone()).logits
    assert torch.equal(model(tokens, position_ids=positions).logits, expected)
    assert positions.tolist() == [[0, 1, 0, 1, 2, 0]]


def test_without_padding_nothing_is_reset() -> None:
    """A call without resets is faster."""
    ones, shape = torch.ones(2, 5), torch.Size((2, 5))
    assert find_resets(ones, torch.arange(5)[None], shape, 0) is None
    assert find_resets(None, None, shape, 0) is None
    assert find_resets(torch.ones(2, 8), torch.arange(3, 8)[None], shape, 3) is None
    ones[0, :2] = 0
    (found,) = [find_resets(ones, None, shape, 0)]
    assert found is not None
    assert found.nonzero().tolist() == [[0, 2]]


def test_a_state_takes_part_in_what_caches_do() -> None:
    model, tokens = wrapped(), tokens_of(3, 4)
    state = model(tokens, use_cache=True)[STATE_NAME]
    state.batch_select_indices(torch.tensor([2, 0]))
    state.batch_repeat_interleave(2)
    expected = model(tokens[[2, 2, 0, 0]], use_cache=True)[STATE_NAME]
    for ours, theirs in zip(parts(state.state), parts(expected.state), strict=True):
        assert torch.equal(ours, theirs)
    with pytest.raises(ValueError, match="cannot go back"):
        state.crop(2)
    state.reset()
    assert (state.state, state.get_seq_length()) == (None, 0)


def parts(state: Any) -> Iterator[Tensor]:
    if isinstance(state, Tensor):
        yield state
    else:
        for part in state:
            yield from parts(part)


@pytest.mark.parametrize("mixer", ["mingru", "lstm", "attention"])
@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_padding_may_end_between_two_calls(mixer: str, size: int) -> None:
    """Without positions, which generate gives, the mask alone says so."""
    model, batch = wrapped(mixer), padded([tokens_of(1, n, n)[0] for n in (3, 9, 5)])
    tokens, mask = batch.values()
    expected, state, found = model(**batch).logits, None, []
    for start in range(0, 9, size):
        end = min(start + size, 9)
        given = {STATE_NAME: state} if state is not None else {}
        output = model(tokens[:, start:end], attention_mask=mask[:, :end], use_cache=True, **given)
        state = output[STATE_NAME]
        found.append(output.logits)
    torch.testing.assert_close(torch.cat(found, dim=1)[mask == 1], expected[mask == 1], rtol=1e-4, atol=1e-5)


def test_stop_strings_streamers_and_pipelines(capsys: pytest.CaptureFixture[str]) -> None:
    model, tokenizer = wrapped(), make_tokenizer(ByteVocabulary())
    prompt = tokenizer("ab", return_tensors="pt")
    found = model.generate(
        **prompt, max_new_tokens=12, streamer=TextStreamer(tokenizer, skip_prompt=True), **GREEDY
    )
    text = tokenizer.decode(found[0, 3:])
    assert capsys.readouterr().out.rstrip("\n") == text.rstrip("\n")
    printable = next(c for c in text if c.isascii() and c.isprintable())
    stopped = model.generate(
        **prompt, max_new_tokens=12, stop_strings=[printable], tokenizer=tokenizer, **GREEDY
    )
    assert tokenizer.decode(stopped[0, 3:]) == text[: text.index(printable) + 1]
    writes = pipeline("text-generation", model=model, tokenizer=tokenizer)
    settings = {"max_new_tokens": 6, "do_sample": False}
    alone = [writes(each, **settings) for each in ("ab", "a longer text", "")]
    assert writes(["ab", "a longer text", ""], batch_size=3, **settings) == alone


# --- training -----------------------------------------------------------------------------------------------


def gradients(model: MinRNNForCausalLM, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: x.grad.clone() for name, x in model.named_parameters() if x.grad is not None}


def assert_same_gradients(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-6)


def test_the_loss_is_the_models() -> None:
    model, tokens = wrapped().train(), tokens_of(2, 9)
    found = gradients(model, model(tokens, labels=tokens).loss)
    loss, _ = model.model.loss(tokens[:, :-1], tokens[:, 1:])
    torch.testing.assert_close(model(tokens, labels=tokens).loss, loss)
    assert_same_gradients(found, gradients(model, loss))
    halves = model(tokens, labels=tokens, num_items_in_batch=32).loss
    torch.testing.assert_close(halves, loss / 2)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_not_trained_on(side: str) -> None:
    model, rows = wrapped().train(), [tokens_of(1, n, n)[0] for n in (4, 9)]
    batch = padded(rows, side)
    mask = batch["attention_mask"]
    labels = batch["input_ids"].masked_fill(mask == 0, -100)
    labels[:, 1:][mask[:, :-1] == 0] = -100  # a first token has no step before it
    found = model(**batch, labels=labels)
    assert found.get(STATE_NAME) is None
    alone = [model(row[None], labels=row[None]).loss * (row.numel() - 1) for row in rows]
    expected = sum(alone) / 11
    torch.testing.assert_close(found.loss, expected)
    assert_same_gradients(gradients(model, found.loss), gradients(model, expected))


@every_mixer
def test_flattened_batches_restart_where_positions_do(mixer: str) -> None:
    model, rows = wrapped(mixer), [tokens_of(1, n, n)[0].tolist() for n in (4, 9, 2)]
    batch = DataCollatorWithFlattening()([{"input_ids": row} for row in rows])
    assert batch["input_ids"].shape == (1, 15)
    logits = model(**{name: value for name, value in batch.items() if name != "labels"}).logits
    alone = torch.cat([model(torch.tensor([row])).logits[0] for row in rows])
    torch.testing.assert_close(logits[0], alone, rtol=1e-4, atol=1e-5)
    total = sum(model(torch.tensor([r]), labels=torch.tensor([r])).loss * (len(r) - 1) for r in rows)
    torch.testing.assert_close(model(**batch).loss, total / 12)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_computes_blocks_again(
    reentrant: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokens = wrapped(dropout=0.1).train(), tokens_of(2, 9)
    batch = {"input_ids": tokens, "labels": tokens, "position_ids": torch.arange(9).remainder(4)[None]}
    torch.manual_seed(0)
    expected = gradients(model, model(**batch).loss)
    calls = counted_blocks(model)
    kind = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"  # since 5.24
    getattr(model, f"{kind}_checkpointing_enable")({"use_reentrant": reentrant})
    torch.manual_seed(0)
    assert_same_gradients(gradients(model, model(**batch).loss), expected)
    assert len(calls) == 4
    model.eval()(**batch).loss.backward()
    getattr(model, f"{kind}_checkpointing_disable")()
    model.train()(**batch).loss.backward()
    assert len(calls) == 8


def counted_blocks(model: MinRNNForCausalLM) -> list[int]:
    calls: list[int] = []
    for block in model.model.blocks:
        block.register_forward_pre_hook(lambda *_: calls.append(1))
    return calls


def arguments(folder: Path, **settings: Any) -> TrainingArguments:
    given = {
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "logging_strategy": "no",
        **settings,
    }
    return TrainingArguments(output_dir=str(folder), **given)


@pytest.mark.parametrize("flat", [False, True])
def test_trainer_trains_evaluates_and_resumes(flat: bool, tmp_path: Path) -> None:
    tokenizer = make_tokenizer(ByteVocabulary())
    data = [{"input_ids": tokenizer(f"ab{'ab' * (n % 5)}").input_ids} for n in range(24)]
    collator = DataCollatorWithFlattening() if flat else DataCollatorForLanguageModeling(tokenizer, mlm=False)
    settings = {
        "max_steps": 6,
        "eval_strategy": "steps",
        "eval_steps": 3,
        "save_steps": 3,
        "save_strategy": "steps",
    }

    def trainer(folder: str) -> Trainer:
        return Trainer(
            wrapped(),
            arguments(tmp_path / folder, **settings),
            train_dataset=data,
            eval_dataset=data[:8],
            data_collator=collator,
            processing_class=tokenizer,
        )

    whole = trainer("whole")
    before = whole.evaluate()["eval_loss"]
    whole.train()
    assert whole.evaluate()["eval_loss"] < before - 0.5
    again = trainer("again")
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], tensor), name
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "whole" / "checkpoint-6")
    tokens = tokens_of(1, 4)
    assert torch.equal(loaded(tokens).logits, whole.model.eval()(tokens).logits)


def test_trainer_predicts_logits(tmp_path: Path) -> None:
    data = [{"input_ids": tokens_of(1, 6, n)[0], "labels": tokens_of(1, 6, n)[0]} for n in range(5)]
    found = Trainer(wrapped(), arguments(tmp_path, use_cache=True)).predict(data)
    assert found.predictions.shape == (5, 6, 257)


# --- what cannot be -----------------------------------------------------------------------------------------


REFUSED: dict[str, tuple[Callable[[MinRNNForCausalLM, Tensor], Any], str]] = {
    "assisted decoding": (lambda m, x: m.generate(x[:1], assistant_model=wrapped()), "stateful models"),
    "prompt lookup": (lambda m, x: m.generate(x[:1], prompt_lookup_num_tokens=2), "stateful models"),
    "continuous batching": (lambda m, x: m.generate_batch([[1, 2]]), "continuous batching is for keys"),
    "its manager": (lambda m, x: m.init_continuous_batching(), "continuous batching is for keys"),
    "a static cache": (
        lambda m, x: m.generate(x, max_new_tokens=2, cache_implementation="static"),
        "must be None, got 'static'",
    ),
    "embeddings": (lambda m, x: m(inputs_embeds=torch.zeros(2, 3, 16)), "embeddings .* are not taken"),
    "hidden states": (lambda m, x: m(x, output_hidden_states=True), "output_hidden_states must be False"),
    "attentions": (lambda m, x: m(x, output_attentions=True), "output_attentions must be False"),
    "another mask": (
        lambda m, x: m(x, attention_mask=torch.ones(2, 5)),
        r"attention_mask must be \(2, 3\), with the 0 steps .* got \(2, 5\)",
    ),
    "a hole": (lambda m, x: m(x, attention_mask=torch.tensor([[1, 0, 1], [1, 1, 1]])), "between tokens"),
    "other positions": (
        lambda m, x: m(x, position_ids=torch.zeros(2, 4)),
        r"position_ids must be \(2, 3\), got \(2, 4\)",
    ),
    "a state after padding": (
        lambda m, x: m(x, attention_mask=torch.tensor([[1, 1, 0], [1, 1, 1]]), use_cache=True),
        "padding on the left",
    ),
    "padding after a state": (
        lambda m, x: m(
            x,
            attention_mask=torch.tensor([[1, 1, 0], [1, 1, 1]]),
            **{STATE_NAME: m(x, use_cache=True)[STATE_NAME]},
        ),
        "padding on the left",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_is_refused(what: str) -> None:
    call, message = REFUSED[what]
    with pytest.raises(ValueError, match=message):
        call(wrapped(), tokens_of(2, 3))


def test_embeddings_beside_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match=r"embeddings .* are not taken"):
        wrapped()(tokens_of(2, 3), inputs_embeds=torch.zeros(2, 3, 16))


def test_a_state_of_another_kind_is_refused() -> None:
    with pytest.raises(TypeError, match="must be a MinRNNState, got DynamicCache"):
        wrapped()(tokens_of(1, 2), **{STATE_NAME: transformers.DynamicCache()})


# --- tokenizers ---------------------------------------------------------------------------------------------

WORDS = "the quick brown fox's 1234 jumps\n\tover -- the  lazy dog; née, 漢字漢字.\n"
texts = st.text(st.characters(exclude_categories=["Cs"]))


def vocabularies(is_marked: bool) -> dict[str, Vocabulary]:
    piece = Piece((WORDS * 20).encode(), True, False, "a text", 0, 0)
    return {
        "bytes": ByteVocabulary(is_marked),
        "characters": CharacterVocabulary("".join(sorted(set(WORDS + END_OF_TEXT))), is_marked),
        "bpe": SubwordVocabulary.learn([piece], 300, is_marked=is_marked),
    }


@pytest.fixture(scope="module", params=["bytes", "characters", "bpe"])
def pair(request: pytest.FixtureRequest) -> tuple[Vocabulary, Any]:
    vocabulary = vocabularies(True)[request.param]
    return vocabulary, make_tokenizer(vocabulary)


@given(data=st.data())
def test_a_tokenizer_gives_the_vocabularys_ids(pair: tuple[Vocabulary, Any], data: st.DataObject) -> None:
    vocabulary, tokenizer = pair
    pieces = st.lists(st.sampled_from([*WORDS.split(" "), " ", "\n", END_OF_TEXT])).map("".join)
    text = data.draw(pieces if vocabulary.kind == "characters" else texts | pieces)
    ids = vocabulary.encode(text).tolist()
    assert tokenizer(text, add_special_tokens=False).input_ids == ids
    assert tokenizer(text).input_ids == [vocabulary.end_of_text, *ids]
    assert tokenizer.decode(ids) == text


@given(data=st.data())
def test_a_tokenizer_decodes_as_the_vocabulary(pair: tuple[Vocabulary, Any], data: st.DataObject) -> None:
    """Of bytes that are not UTF-8 too; a document's end stands between characters."""
    vocabulary, tokenizer = pair
    ids = data.draw(st.lists(st.integers(0, vocabulary.size - 1), max_size=12))
    ids = [index for index in ids if index != vocabulary.end_of_text]
    assert tokenizer.decode(ids) == vocabulary.decode(ids)
    assert len(tokenizer) == vocabulary.size


def test_a_tokenizer_pads_on_the_left(pair: tuple[Vocabulary, Any]) -> None:
    vocabulary, tokenizer = pair
    batch = tokenizer(["the", ""], padding=True)
    assert batch.input_ids[1] == [vocabulary.end_of_text] * len(batch.input_ids[0])
    assert batch.attention_mask == [[1] * len(batch.input_ids[0]), [0] * (len(batch.input_ids[0]) - 1) + [1]]


def test_a_tokenizer_of_characters_refuses_others() -> None:
    with pytest.raises(Exception, match="WordLevel error"):
        make_tokenizer(CharacterVocabulary("abc"))("abcd")


@pytest.mark.parametrize("kind", ["bytes", "characters", "bpe"])
def test_a_tokenizer_without_an_end_of_text(kind: str) -> None:
    vocabulary = vocabularies(False)[kind]
    tokenizer = make_tokenizer(vocabulary)
    assert tokenizer("dog").input_ids == vocabulary.encode("dog").tolist()
    assert (tokenizer.eos_token, tokenizer.pad_token) == (None, None)


# --- runs ---------------------------------------------------------------------------------------------------


def run_of(folder: Path, vocabulary: str) -> Path:
    """Train a run for two steps on a text of its own."""
    text = folder / "text"
    text.mkdir()
    for index in range(8):
        (text / f"{index}.txt").write_text(WORDS * 12)
    config = RunConfig(
        model=ModelConfig(d_model=16, num_layers=2),
        task=TextConfig(source=str(text), vocabulary=vocabulary, window=16, eval_chunk=64, vocab_size=300)
        if vocabulary == "bpe"
        else TextConfig(source=str(text), vocabulary=vocabulary, window=16, eval_chunk=64),
        train=TrainConfig(steps=2, batch_size=2, warmup_steps=1, log_every=1, device="cpu"),
    )
    train(config, folder / "run", log=RunLog())
    return folder / "run"


@pytest.fixture(params=["bytes", "characters", "bpe"])
def run(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MINRNN_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return run_of(tmp_path, request.param)


def test_a_run_is_exported_and_read_as_a_runs_checkpoint(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(run), "out", "--format", "transformers"]) == 0
    said = capsys.readouterr()
    assert said.out.startswith("out: transformers, ")
    assert said.err == ""
    assert len({path.stat().st_mode for path in Path("out").iterdir()}) == 1
    sample = ["--prompt", "the", "--tokens", "20", "--temperature", "0"]
    tokenizer = AutoTokenizer.from_pretrained("out")
    model = AutoModelForCausalLM.from_pretrained("out")
    copied = tmp_path / "copied"  # as Trainer leaves it
    tokenizer(["a", "bc"], padding=True)
    tokenizer.save_pretrained(copied)
    model.save_pretrained(copied)
    written, evaluations = [], []
    capsys.readouterr()
    for place in (str(run), "out", str(copied)):
        assert main(["sample", place, *sample]) == 0
        written.append(capsys.readouterr().out)
        assert main(["evaluate", place]) == 0
        capsys.readouterr()
        evaluations.append(json.loads(Path(place, "evaluation.json").read_text()))
    assert written[1:] == [written[0]] * 2
    assert evaluations[1:] == [evaluations[0]] * 2
    trained, again = (load_trained(place, "best", torch.device("cpu")) for place in (run, copied))
    assert (again.vocabulary, again.step, again.corpus) == (trained.vocabulary, trained.step, trained.corpus)
    assert read_config(copied) == read_config(run)
    settings = model.generation_config
    marks = {settings.bos_token_id, settings.eos_token_id, settings.pad_token_id}
    assert trained.vocabulary is not None
    assert marks == {trained.vocabulary.end_of_text}
    ids = model.generate(**tokenizer("the", return_tensors="pt"), max_new_tokens=20, do_sample=False)
    text = tokenizer.decode(ids[0], skip_special_tokens=True)
    assert written[0].startswith(text)


def test_a_directory_loads_where_minrnn_was_not_imported(tmp_path: Path) -> None:
    wrapped().save_pretrained(tmp_path / "out")
    named = json.loads((tmp_path / "out" / "config.json").read_text())["auto_map"]
    assert named == {
        "AutoConfig": "modeling_minrnn.MinRNNConfig",
        "AutoModelForCausalLM": "modeling_minrnn.MinRNNForCausalLM",
    }
    code = (
        "import sys; from transformers import AutoModelForCausalLM; assert 'minrnn' not in sys.modules\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
        "print(type(model).__module__); model.save_pretrained(sys.argv[2])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "out"), str(tmp_path / "again")],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "minrnn.integrations.transformers.modeling"
    for name in ("config.json", "modeling_minrnn.py"):
        assert (tmp_path / "again" / name).read_text() == (tmp_path / "out" / name).read_text()


def test_what_is_there_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    trained = Trained(model_of(), None, 1, "")
    with pytest.raises(FileExistsError, match="exists; remove it, or choose another name"):
        export_pretrained(trained, RunConfig(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_a_policy_is_no_language_model(tmp_path: Path) -> None:
    policy = DecisionModel(DecisionConfig(ModelConfig(d_model=8, num_layers=1), 3, 1))
    with pytest.raises(ValueError, match="transformers takes language models, got a policy"):
        export_pretrained(Trained(policy, None, 1, ""), RunConfig(), tmp_path / "out")


def test_a_model_of_another_task_has_no_tokenizer(tmp_path: Path) -> None:
    model = model_of()
    export_pretrained(Trained(model, None, 3, "digest"), RunConfig(), tmp_path / "out")
    assert not list((tmp_path / "out").glob("tokenizer*"))
    found, extra = load_checkpoint(tmp_path / "out")
    assert extra == {"vocabulary": None, "step": 3, "corpus": "digest"}
    assert torch.equal(found.eval()(tokens_of(1, 4))[0], model(tokens_of(1, 4))[0])


def test_exporting_shows_no_progress_bar(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    transformers.utils.logging.enable_progress_bar()
    try:
        export_pretrained(Trained(model_of(), ByteVocabulary(), 1, ""), RunConfig(), tmp_path / "out")
        assert transformers.utils.logging.is_progress_bar_enabled()
    finally:
        transformers.utils.logging.disable_progress_bar()
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("what", ["model", "tokenizer"])
def test_what_is_written_is_compared_first(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vocabulary = ByteVocabulary()
    if what == "model":
        save = MinRNNForCausalLM.save_pretrained

        def damaged(self: MinRNNForCausalLM, *args: Any, **kwargs: Any) -> None:
            with torch.no_grad():
                self.model.embedding.weight[3] += 1
            save(self, *args, **kwargs)

        monkeypatch.setattr(MinRNNForCausalLM, "save_pretrained", damaged)
    else:
        swapped = json.loads(vocabulary.to_tokenizer())
        swapped["model"]["vocab"] |= {"A": ord("B"), "B": ord("A")}
        monkeypatch.setattr(ByteVocabulary, "to_tokenizer", lambda self: json.dumps(swapped))
    with pytest.raises(RuntimeError, match="computes something else" if what == "model" else "other tokens"):
        export_pretrained(Trained(model_of(), vocabulary, 1, ""), RunConfig(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["sample", "out", "--checkpoint", "last"], "has no checkpoint 'last': a directory for transformers"),
        (
            ["train", "--run", "out", "--resume"],
            "out is a directory for transformers, which has no optimizer's",
        ),
        (["export", "run", "run", "--format", "transformers"], "run exists; remove it"),
        (["export", "run", "new", "--format", "transformers", "--target-return", "1"], "goes with a policy"),
    ],
)
def test_what_a_directory_does_not_hold_is_said(
    options: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("MINRNN_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    run_of(tmp_path, "bytes")
    export_pretrained(
        load_trained(Path("run"), "best", torch.device("cpu")), read_config(Path("run")), Path("out")
    )
    config = Path("out/config.json").read_text()
    capsys.readouterr()
    assert main(options) == 2
    assert message in capsys.readouterr().err
    assert Path("out/config.json").read_text() == config
