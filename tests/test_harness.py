"""The evaluation harness: what it computes is what direct computation gives, on a task made here."""

import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from minrnn import ModelConfig, SequenceModel
from minrnn.cli.main import main
from minrnn.tasks.vocabulary import ByteVocabulary, CharacterVocabulary, Vocabulary
from minrnn.training import load_trained

lm_eval = pytest.importorskip("lm_eval", reason="needs the extra harness")
from lm_eval.api.instance import Instance  # noqa: E402

from minrnn.integrations import harness  # noqa: E402

TEXTS = ["A heron stood.", "né à Zürich", "x", "aa" * 30]


def model_of(vocabulary: Vocabulary, **settings: Any) -> SequenceModel:
    torch.manual_seed(0)
    config = ModelConfig(vocab_size=vocabulary.size, d_model=16, num_layers=2, **settings)
    return SequenceModel(config).eval()


def adapter(**settings: Any) -> harness.HarnessModel:
    return harness.HarnessModel(model_of(ByteVocabulary(), **settings), ByteVocabulary())


def asked(kind: str, *args: Any) -> Instance:
    return Instance(request_type=kind, doc={}, arguments=args, idx=0)


@torch.no_grad()
def direct(model: SequenceModel, tokens: list[int], context: int) -> tuple[float, bool]:
    """Compute one row by itself, in float64."""
    logits, _ = model.double()(torch.tensor([tokens[:-1]]))
    model.float()
    rest = torch.tensor(tokens[context:])
    scores = logits[0, context - 1 :].log_softmax(-1)
    total = scores.gather(1, rest[:, None]).sum().item()
    return total, bool((scores.argmax(-1) == rest).all())


@pytest.mark.parametrize("mixer", ["mingru", "mamba", "attention"])
@pytest.mark.parametrize("chunk", [7, 4096])
def test_log_likelihoods_are_those_of_rows_by_themselves(
    mixer: str, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(harness, "CHUNK", chunk)
    monkeypatch.setattr(harness, "ROWS", 3)
    lm = adapter(mixer=mixer)
    pairs = [(a, b) for a in ("", *TEXTS) for b in TEXTS]
    found = lm.loglikelihood([asked("loglikelihood", *pair) for pair in pairs], disable_tqdm=True)
    for (context, rest), (total, greedy) in zip(pairs, found, strict=True):
        before, after = list(context.encode()), list(rest.encode())
        expected = direct(lm.model, [256, *before, *after], 1 + len(before))
        assert total == pytest.approx(expected[0], abs=1e-4, rel=1e-6)
        assert greedy == expected[1]


def test_rolling_reads_the_whole_text() -> None:
    lm = adapter()
    found = lm.loglikelihood_rolling([asked("loglikelihood_rolling", text) for text in TEXTS])
    for text, total in zip(TEXTS, found, strict=True):
        expected, _ = direct(lm.model, [256, *text.encode()], 1)
        assert total == pytest.approx(expected, abs=1e-4, rel=1e-6)


@pytest.mark.parametrize("chunk", [4, 4096])
def test_greedy_is_said_of_what_the_model_would_write(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "CHUNK", chunk)
    vocabulary = CharacterVocabulary("abc", is_marked=False)
    lm = harness.HarnessModel(model_of(vocabulary), vocabulary)
    request = asked("generate_until", "ab", {"until": [], "max_gen_toks": 3})
    (text,) = lm.generate_until([request])
    others = [text[:k] + "abc"[("abc".index(text[k]) + 1) % 3] + text[k + 1 :] for k in range(3)]
    pairs = [asked("loglikelihood", "ab", rest) for rest in (text, *others)]
    assert [greedy for _, greedy in lm.loglikelihood(pairs, disable_tqdm=True)] == [True, False, False, False]


def test_generation_stops() -> None:
    """At the first of the stop strings, at the document's end, or after the most tokens."""
    vocabulary = CharacterVocabulary("abc")
    model = model_of(vocabulary)
    with torch.no_grad():  # a model that writes b after a, c after b, ends after c, whatever was before
        for parameter in model.parameters():
            parameter.zero_()
    follow = {0: 1, 1: 2, 2: 3, 3: 0}
    order = []

    def written(module: Any, args: Any, output: Any) -> Any:
        logits = torch.full_like(output[0], -9.0)
        for i, token in enumerate(args[0].flatten().tolist()):
            logits.view(-1, 4)[i, follow[token]] = 9.0
            order.append(token)
        return logits, output[1]

    model.register_forward_hook(written)
    lm = harness.HarnessModel(model, vocabulary)
    cases = [
        (["c"], 9, "b"),
        ("bc", 9, ""),
        ("cb", 9, "bc"),
        ([], 9, "bc"),
        ([], 1, "b"),
        (["x", ""], 9, "bc"),
        (["c", "bc"], 9, ""),
    ]
    for until, most, expected in cases:
        (text,) = lm.generate_until([asked("generate_until", "a", {"until": until, "max_gen_toks": most})])
        assert text == expected, until


def test_a_model_of_joined_documents_needs_a_context() -> None:
    vocabulary = ByteVocabulary(is_marked=False)
    lm = harness.HarnessModel(model_of(vocabulary), vocabulary)
    ((total, _),) = lm.loglikelihood([asked("loglikelihood", "ab", "c")], disable_tqdm=True)
    assert total == pytest.approx(direct(lm.model, [97, 98, 99], 2)[0], abs=1e-4)
    for kind, args in (("loglikelihood", ("", "c")), ("loglikelihood_rolling", ("c",))):
        with pytest.raises(ValueError, match="joined"):
            getattr(lm, kind)([asked(kind, *args)])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Tasks with data of their own: a choice, and perplexity."""
    rows = [
        {"q": "one and", "good": " two", "bad": " hat", "text": "one and two"},
        {"q": "b", "good": "c", "bad": "zzz", "text": "bc"},
    ]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    common = (
        f"dataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {data}\ntest_split: test\n"
        "metadata:\n  version: 1\n"
    )
    (tmp_path / "choice.yaml").write_text(
        f'task: tiny_choice\noutput_type: multiple_choice\ndoc_to_text: "{{{{q}}}}"\ndoc_to_target: 0\n'
        f'doc_to_choice: "{{{{[good, bad]}}}}"\ntarget_delimiter: ""\n{common}'
        "metric_list:\n  - metric: acc\n    aggregation: mean\n    higher_is_better: true\n",
        encoding="utf-8",
    )
    (tmp_path / "rolling.yaml").write_text(
        'task: tiny_rolling\noutput_type: loglikelihood_rolling\ndoc_to_text: ""\n'
        'doc_to_target: "{{text}}"\n'
        f"{common}metric_list:\n  - metric: bits_per_byte\n"
        "    aggregation: bits_per_byte\n    higher_is_better: false\n",
        encoding="utf-8",
    )
    return tmp_path


def test_the_harness_evaluates(folder: Path) -> None:
    lm = adapter()
    lm.model.train()
    found = harness.evaluate(lm.model, lm.vocabulary, ["tiny_choice", "tiny_rolling"], folder=folder)
    assert lm.model.training
    lm.model.eval()

    def total(context: str, rest: str) -> float:
        return direct(lm.model, [256, *context.encode(), *rest.encode()], 1 + len(context))[0]

    right = [total("one and", " two") > total("one and", " hat"), total("b", "c") > total("b", "zzz")]
    assert found["tiny_choice"]["acc,none"] == sum(right) / 2
    nats = total("", "one and two") + total("", "bc")
    bits = -nats / 13 / torch.log(torch.tensor(2.0)).item()
    assert found["tiny_rolling"]["bits_per_byte,none"] == pytest.approx(bits, abs=1e-4)
    one = harness.evaluate(lm.model, lm.vocabulary, ["tiny_choice"], folder=folder, limit=1)
    assert one["tiny_choice"]["acc,none"] == float(right[0])


def test_unknown_tasks_are_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To list all tasks of the harness takes too long here."""
    lm = adapter()
    monkeypatch.setattr(harness, "TaskManager", partial(harness.TaskManager, include_defaults=False))
    with pytest.raises(ValueError, match=r"tasks must be lm_eval's, got no_such_task"):
        harness.evaluate(lm.model, lm.vocabulary, ["no_such_task"])
    with pytest.raises(ValueError, match=rf"lm_eval's or in {re.escape(str(folder))}, got nor_this$"):
        harness.evaluate(lm.model, lm.vocabulary, ["tiny_choice", "nor_this"], folder=folder)
    with pytest.raises(ValueError, match="got none"):
        harness.evaluate(lm.model, lm.vocabulary, [], folder=folder)
    with pytest.raises(ValueError, match="must be a directory, got nowhere"):
        harness.evaluate(lm.model, lm.vocabulary, ["tiny_choice"], folder=Path("nowhere"))


def test_the_command_writes_what_the_harness_found(
    folder: Path, corpus: Path, tmp_path: Path, cache: None
) -> None:
    run = tmp_path / "run"
    sizes = ["--model.d-model", "16", "--model.num-layers", "1", "--task.window", "32", "--train.steps", "2"]
    source = ["--task.source", str(corpus), "--task.vocabulary", "bytes"]
    assert main(["train", "demo", "--run-dir", str(run), *sizes, *source, "--train.device", "cpu"]) == 0
    options = [
        "--harness",
        "tiny_choice, tiny_rolling",
        "--harness-folder",
        str(folder),
        "--harness-limit",
        "1",
    ]
    assert main(["evaluate", str(run), *options, "--device", "cpu"]) == 0
    record = json.loads((run / "harness.json").read_text(encoding="utf-8"))
    model, vocabulary, *_ = load_trained(run, "best", torch.device("cpu"))
    assert vocabulary is not None
    assert isinstance(model, SequenceModel)
    expected = harness.evaluate(model, vocabulary, ["tiny_choice", "tiny_rolling"], folder=folder, limit=1)
    assert record["tasks"] == json.loads(json.dumps(expected))
    assert record["limit"] == 1
    assert "commit" in record
