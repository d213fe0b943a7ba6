"""A training step with a large vocabulary takes the memory of the model, not of all logits."""

from __future__ import annotations

import json
import subprocess
import sys

PROGRAM = """
import json, resource, sys, torch
from minrnn.models import ModelConfig, SequenceModel
from minrnn.tasks.task import nats
torch.set_num_threads(1)
torch.manual_seed(0)
model = SequenceModel(ModelConfig(vocab_size=32768, d_model=192, num_layers=3))
tokens = torch.randint(32768, (16, 512))
before = resource.getrusage(resource.RUSAGE_SELF)
if sys.argv[1] == "chunks":
    loss, _ = model.loss(tokens, tokens)
else:
    loss = nats(model(tokens)[0], tokens, "mean")
loss.backward()
after = resource.getrusage(resource.RUSAGE_SELF)
print(json.dumps({
    "loss": loss.item(), "mb": (after.ru_maxrss - before.ru_maxrss) / 1e3,
    "cpu_seconds": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
}))
"""


def test_a_step_of_16_by_512_tokens_out_of_32768() -> None:
    found = {}
    for how in ("chunks", "all"):
        command = [sys.executable, "-c", PROGRAM, how]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found[how] = json.loads(done.stdout)
        print(f"\n{how}: {found[how]['mb']:.0f} MB, {found[how]['cpu_seconds']:.1f} CPU seconds")
    assert abs(found["chunks"]["loss"] - found["all"]["loss"]) < 1e-4
    assert found["all"]["mb"] > 3 * 16 * 512 * 32768 * 4 / 1e6 * 0.9  # logits, their logarithms and gradients
    assert found["chunks"]["mb"] < found["all"]["mb"] / 3
