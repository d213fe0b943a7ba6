"""A run is trained here, continued by transformers' Trainer in another process, and read back here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from minrnn.cli.main import main
from minrnn.training import load_trained

if None in map(find_spec, ("transformers", "accelerate")):
    pytest.skip("transformers is not installed: the extra transformers", allow_module_level=True)

pytestmark = pytest.mark.timeout(1200)

STEPS = 50

TRAINER = """
import sys
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorWithFlattening
from transformers import Trainer, TrainingArguments

assert "minrnn" not in sys.modules
given, written, text, steps = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(given)
model = AutoModelForCausalLM.from_pretrained(given, trust_remote_code=True)
paragraphs = Path(text).read_text().split("\\n\\n")[:200]
end = tokenizer.eos_token_id
data = [{"input_ids": [*tokenizer(each).input_ids, end]} for each in paragraphs]
assert all(each["input_ids"][0] == end for each in data)
arguments = TrainingArguments(
    output_dir=written,
    max_steps=int(steps),
    per_device_train_batch_size=4,
    learning_rate=1e-3,
    logging_steps=10,
    save_steps=25,
    eval_strategy="steps",
    eval_steps=25,
    report_to=[],
    use_cpu=True,
    disable_tqdm=True,
)
trainer = Trainer(
    model,
    arguments,
    train_dataset=data[:160],
    eval_dataset=data[160:],
    data_collator=DataCollatorWithFlattening(),
    processing_class=tokenizer,
)
trainer.train()
trainer.save_model(written)
"""

RUN = """
minrnn train demo --run run --task.source shakespeare --task.vocabulary {vocabulary} --task.window 64
--model.d-model 32 --model.num-layers 2 --train.steps 60 --train.warmup-steps 5 --train.eval-every 0
--train.device cpu --train.batch-size 8 --train.final-eval-tokens 4000
"""


def minrnn(said: str) -> int:
    return main(said.split()[1:])


@pytest.mark.parametrize("vocabulary", ["bytes", "bpe --task.vocab-size 300"])
def test_a_run_goes_to_transformers_and_comes_back(
    vocabulary: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MINRNN_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    assert minrnn(RUN.format(vocabulary=vocabulary)) == 0
    assert minrnn("minrnn export run out --format transformers") == 0
    before = scores("out", capsys)
    assert before == scores("run", capsys)
    continued = subprocess.run(
        [sys.executable, "-c", TRAINER, "out", "further", text_of_shakespeare(), str(STEPS)],
        env={**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert continued.returncode == 0, continued.stderr
    for place in ("further", "further/checkpoint-25", "further/checkpoint-50"):
        assert minrnn(f"minrnn sample {place} --prompt The --tokens 30") == 0
        assert capsys.readouterr().out.startswith("The")
    assert scores("further", capsys)["val_loss"] < before["val_loss"] - 0.1
    first, last = (
        load_trained(Path("further", f"checkpoint-{n}"), "best", torch.device("cpu")) for n in (25, 50)
    )
    assert (
        first.vocabulary
        == last.vocabulary
        == load_trained(Path("run"), "best", torch.device("cpu")).vocabulary
    )
    assert not torch.equal(first.model.embedding.weight, last.model.embedding.weight)


def scores(place: str, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert minrnn(f"minrnn evaluate {place} --max-tokens 4000") == 0
    capsys.readouterr()
    found = json.loads(Path(place, "evaluation.json").read_text())
    return {
        name: found[name] for name in ("val_loss", "val_loss_windowed", "bits_per_byte", "val_tokens", "step")
    }


def text_of_shakespeare() -> str:
    from minrnn.tasks.sources import find_corpus

    return str(find_corpus("shakespeare", is_joined=False, column="text").files[0])
