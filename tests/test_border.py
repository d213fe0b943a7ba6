"""The border between torch and the compiled engine: storages are measured, outputs are as any tensor."""

from __future__ import annotations

import importlib
import io
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import laws
import pytest
import torch
from laws import GATES, compiled_serves, inputs
from selective_laws import NAMES, draw, gradients_like
from torch import Tensor

import minrnn
from minrnn.models import DecisionConfig, DecisionModel, Decoder, ModelConfig, SequenceModel, fused_step
from minrnn.ops import gated_scan, memory, release_memory
from minrnn.ops.registry import load

LOADED = load("cpp")
pytestmark = compiled_serves


def engine() -> Any:
    return LOADED


# ----------------------------------------------------------------------------------------------------------
# Addresses


def freed(x: Tensor) -> Tensor:
    """As FSDP leaves a tensor: its sizes, and no memory."""
    x = x.clone(memory_format=torch.preserve_format)
    x.untyped_storage().resize_(0)
    return x


def shortened(x: Tensor) -> Tensor:
    """A tensor whose last number is gone."""
    x = x.clone(memory_format=torch.preserve_format)
    x.untyped_storage().resize_(x.nbytes - x.itemsize)
    return x


def late(x: Tensor) -> Tensor:
    """A view from the middle of what was long enough."""
    wide = torch.zeros(2 * x.numel(), dtype=x.dtype)
    view = wide[x.numel() :].view(x.shape)
    wide.untyped_storage().resize_(wide.nbytes - 1)
    return view


def elsewhere(x: Tensor) -> Tensor:
    """A shape without memory."""
    return x.to("meta")


def strided(x: Tensor) -> Tensor:
    """Freed, with channels that would have to be copied first."""
    return freed(x.mT.contiguous().mT if x.dim() > 1 else x)


def negated(x: Tensor) -> Tensor:
    """Freed, with numbers that would have to be negated first."""
    return torch._neg_view(freed(x)) if x.is_floating_point() else freed(x)


SPOILT = [freed, shortened, late, elsewhere, strided, negated]


@pytest.mark.parametrize("spoil", SPOILT)
@pytest.mark.parametrize("gate", GATES)
def test_every_tensor_of_the_gated_scan(gate: str, spoil: Callable[[Tensor], Tensor]) -> None:
    """Forward and backward raise RuntimeError for it, packed or not."""
    pre, h0, reset, dh = inputs(gate, 2, 5, 4, torch.float32)
    mode = laws.mode(gate)
    forward, backward = engine().forward, engine().backward
    h = forward(pre, h0, reset, *mode)
    for j in range(len(pre)):
        bad = [spoil(x) if i == j else x for i, x in enumerate(pre)]
        for call in (
            lambda bad=bad: forward(bad, h0, reset, *mode),
            lambda bad=bad: backward(dh, bad, h, h0, reset, *mode),
        ):
            with pytest.raises(RuntimeError, match=r"storage|alloc"):
                call()
    packed = torch.cat(pre, -1)
    for call in (
        lambda: forward([spoil(packed)], h0, reset, *mode),
        lambda: forward(pre, spoil(h0), reset, *mode),
        lambda: forward(pre, h0, spoil(reset), *mode),
        lambda: backward(spoil(dh), pre, h, h0, reset, *mode),
        lambda: backward(dh, pre, spoil(h), h0, reset, *mode),
        lambda: backward(dh, pre, h, spoil(h0), reset, *mode),
        lambda: backward(dh, [spoil(packed)], h, h0, reset, *mode),
    ):  # fmt: skip
        with pytest.raises(RuntimeError, match=r"storage|alloc"):
            call()
    half = [x.bfloat16() for x in pre]
    with pytest.raises(RuntimeError, match=r"storage|alloc"):
        forward(half, freed(h0.bfloat16()), reset, *mode)


@pytest.mark.parametrize(
    "gate", [gate for gate, record in minrnn.ops.GATES.items() if not record.can_be_signed]
)
def test_a_form_without_kernels_is_an_error(gate: str) -> None:
    pre, h0, reset, dh = inputs(gate, 2, 5, 4, torch.float32)
    mode = (gate, "positive", True, False)
    with pytest.raises(ValueError, match=f"'{gate}' has no signed form"):
        engine().forward(pre, h0, reset, *mode)
    with pytest.raises(ValueError, match=f"'{gate}' has no signed form"):
        engine().backward(dh, pre, dh, h0, reset, *mode)


@pytest.mark.parametrize("spoil", SPOILT)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_tensor_of_the_selective_scan(dtype: torch.dtype, spoil: Callable[[Tensor], Tensor]) -> None:
    """Forward and backward raise RuntimeError for it."""
    selective = importlib.import_module("minrnn.ops.selective.cpu")
    x = draw(2, 5, 4, 3, dtype)
    dy, dlast = gradients_like(x)
    borders = selective.forward(x, True)[2]
    calls = []
    for name in (*NAMES, "reset"):
        bad = x._replace(
            **{name: (freed if name == "reset" and spoil is strided else spoil)(getattr(x, name))}
        )
        calls += [
            lambda bad=bad: selective.forward(bad, True),
            lambda bad=bad: selective.backward(dy, dlast, borders, bad),
        ]
    calls += [
        lambda: selective.backward(spoil(dy), dlast, borders, x),
        lambda: selective.backward(dy, spoil(dlast), borders, x),
    ]
    for call in calls:
        with pytest.raises(RuntimeError, match=r"storage|alloc"):
            call()


@pytest.mark.parametrize("spoil", [freed, shortened, late])
@pytest.mark.parametrize(
    "options", [{}, {"mixer": "minlstm", "norm": "rms", "mlp_activation": "swiglu"}], ids=str
)
def test_every_tensor_of_a_models_step(options: dict[str, Any], spoil: Callable[[Tensor], Tensor]) -> None:
    """When it is read first, as far as it is a weight; at each step, as far as it is not."""

    def build() -> SequenceModel:
        return SequenceModel(ModelConfig(vocab_size=5, d_model=6, num_layers=1, conv_width=3, **options))

    decoder, tokens = Decoder(build()), torch.tensor([1, 4])
    assert decoder.backend == "cpp"
    _, (((window,), (h,)),) = decoder.step(tokens)
    for state in ((((spoil(window),), (h,)),), (((window,), (spoil(h),)),)):
        for rows in (None, torch.tensor([0, 1])):
            with pytest.raises(RuntimeError, match="storage"):
                decoder.step(tokens, state, rows)
    found = 0
    for name in dict(build().named_parameters()):
        model = build()
        parameter = model.get_parameter(name)
        parameter.data = spoil(parameter.data)
        with pytest.raises(RuntimeError, match="storage"):
            Decoder(model)
        found += 1
    assert found >= 13


def test_every_tensor_of_a_policys_step() -> None:
    trunk = ModelConfig(d_model=6, num_layers=1, conv_width=0)
    model = DecisionModel(DecisionConfig(trunk, observation_size=4, action_size=2))
    decoder = Decoder(model)
    assert decoder.backend == "cpp"
    for name in dict(model.named_parameters()):
        other = DecisionModel(model.config)
        parameter = other.get_parameter(name)
        parameter.data = freed(parameter.data)
        with pytest.raises(RuntimeError, match="storage"):
            Decoder(other)


def test_a_models_step_reads_no_negated_view() -> None:
    """What is stored otherwise than it reads is for torch's operations."""
    assert fused_step._is_readable(torch.ones(3), (3,))
    assert not fused_step._is_readable(torch._neg_view(torch.ones(3)), (3,))


def test_indices_of_a_models_step_are_checked_where_they_are_read() -> None:
    """Whoever passes them: tokens of the vocabulary, and rows that the pool's memory holds."""
    decoder = Decoder(SequenceModel(ModelConfig(vocab_size=5, d_model=6, num_layers=1)))
    assert decoder._fused is not None
    pool = decoder.new_state(2)
    for row in (-1, 2, 1 << 60):
        with pytest.raises(IndexError, match=r"rows must lie in 0 \.\. 1"):
            decoder._fused.run(torch.tensor([1]), 1, pool, [row])
    for rows in ([0, 1], [0, 1, 0]):
        with pytest.raises(ValueError, match="one token and one row"):
            decoder._fused.run(torch.tensor([1]), 1, pool, rows)
    for token in (-1, 5, 1 << 60):
        with pytest.raises(IndexError, match=r"tokens must lie in 0 \.\. 4"):
            decoder._fused.run(torch.tensor([token]), 1, pool, [0])


def test_what_reaches_the_border_through_the_operator_is_measured_too() -> None:
    pre, h0, _, _ = inputs("mingru", 2, 5, 4, torch.float32)
    with pytest.raises(
        RuntimeError, match=r"h0 .* requires a storage of 32 bytes, its data has 0: was it freed"
    ):
        gated_scan("mingru", *pre, h0=freed(h0))
    with pytest.raises(RuntimeError, match=r"h0 .* requires a storage"):  # shapes are not checked there
        torch.ops.minrnn.gated_scan(pre, h0[:1].clone(), None, *laws.mode("mingru"))


# ----------------------------------------------------------------------------------------------------------
# Views


def inside(x: Tensor) -> Tensor:
    """In the middle of other numbers."""
    return torch.cat([torch.ones_like(x.flatten()), x.flatten()])[x.numel() :].view(x.shape)


def apart(x: Tensor) -> Tensor:
    """Every other number of a memory, from its second on."""
    return torch.stack([torch.ones_like(x), x], -1)[..., 1]


def minus(x: Tensor, lay: Callable[[Tensor], Tensor] = lambda x: x) -> Tensor:
    """What memory holds is -x, which a view negates; torch cannot negate flags."""
    return torch._neg_view(lay(-x)) if x.is_floating_point() else lay(x)


VIEWS = {
    "inside": inside,
    "apart": apart,
    "minus": minus,
    "minus inside": partial(minus, lay=inside),
    "minus apart": partial(minus, lay=apart),
}
views = pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)


def all_equal(actual: Any, expected: Any) -> bool:
    return all(torch.equal(x, y) for x, y in zip(actual, expected, strict=True))


@views
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_tensor_of_the_gated_scan_may_be_a_view(
    dtype: torch.dtype, view: Callable[[Tensor], Tensor]
) -> None:
    """Each alone, whatever its view makes of memory, is read as the numbers that it shows."""
    pre, h0, reset, dh = inputs("minlstm", 2, 5, 4, dtype)
    mode = laws.mode("minlstm")
    h = engine().forward(pre, h0, reset, *mode)
    tensors = [dh, *pre, h, h0, reset]
    gradients = engine().backward(dh, pre, h, h0, reset, *mode)
    for j, x in enumerate(tensors):
        dh, *pre, h_, h0, reset = [view(x) if i == j else x for i, x in enumerate(tensors)]
        assert torch.equal(engine().forward(pre, h0, reset, *mode), h)
        assert all_equal(engine().backward(dh, pre, h_, h0, reset, *mode), gradients)


@views
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_tensor_of_the_selective_scan_may_be_a_view(
    dtype: torch.dtype, view: Callable[[Tensor], Tensor]
) -> None:
    selective = importlib.import_module("minrnn.ops.selective.cpu")
    plain = draw(2, 5, 4, 3, dtype)
    gradients = gradients_like(plain)
    outputs = selective.forward(plain, True)
    expected = selective.backward(*gradients, outputs[2], plain)
    for name in (*NAMES, "reset"):
        x = plain._replace(**{name: view(getattr(plain, name))})
        assert all_equal(selective.forward(x, True), outputs), name
        assert all_equal(selective.backward(*gradients, outputs[2], x), expected), name
    for j in range(2):
        viewed = [view(d) if i == j else d for i, d in enumerate(gradients)]
        assert all_equal(selective.backward(*viewed, outputs[2], plain), expected)


# ----------------------------------------------------------------------------------------------------------
# Outputs

LARGE = (4, 512, 1024)
"""float32: 8 MiB, so that the memory of outputs is kept."""


def large(shape: tuple[int, int, int] = LARGE, dtype: torch.dtype = torch.float32) -> Tensor:
    return engine().new_output(torch.empty(shape, dtype=dtype), shape[2]).zero_()


every_dtype = pytest.mark.parametrize("dtype", laws.TOLERANCE, ids=str)


@every_dtype
def test_the_memory_of_an_output_serves_the_next_one(dtype: torch.dtype) -> None:
    release_memory()
    first = large(dtype=dtype)
    address = first.data_ptr()
    view = first[1:]
    del first
    second = large(dtype=dtype)
    assert second.data_ptr() != address, "a view still holds it"
    del view
    assert large(dtype=dtype).data_ptr() == address
    assert release_memory() == second.nbytes
    assert second.sum() == 0


@pytest.mark.parametrize(
    "hold",
    [
        lambda h: h.untyped_storage(),
        lambda h: h.numpy(),
        lambda h: h.detach(),
        lambda h: torch.utils.dlpack.to_dlpack(h),
        lambda h: memoryview(h.numpy()),
        lambda h: h.requires_grad_().exp().grad_fn,
        lambda h: torch._lazy_clone(h),
    ],
    ids=["storage", "numpy", "detached", "dlpack", "memoryview", "autograd", "lazy clone"],
)
def test_what_is_held_is_never_given_away(hold: Callable[[Tensor], Any]) -> None:
    release_memory()
    h = large()
    held = hold(h)
    del h
    others = [large().fill_(1) for _ in range(3)]
    if isinstance(held, torch.UntypedStorage):
        held = torch.empty(0).set_(held)
    if hasattr(held, "any"):
        assert not held.any()
    assert len({x.data_ptr() for x in others}) == 3


@pytest.mark.parametrize("T", [480, 500, 511])
@every_dtype
def test_an_output_has_its_own_memory_and_no_more(T: int, dtype: torch.dtype) -> None:
    """torch saves the whole storage: of one that is a little larger, former numbers would be written too."""
    release_memory()
    large(dtype=dtype).fill_(7)
    h = large((4, T, 1024), dtype)
    held = h.untyped_storage().nbytes()  # apart: pytest would show the storage, number by number
    assert held == h.numel() * h.element_size()
    torch.save(h, file := io.BytesIO())
    assert bytes(torch.full((64,), 7, dtype=dtype).untyped_storage()) not in file.getvalue()


def test_outputs_are_as_any_tensor() -> None:
    """They can be resized, written to, saved, pickled and shared."""
    release_memory()
    large().numpy()  # whose storage has a fixed size from then on
    h = large()
    h.resize_(2 * h.numel())
    assert h.untyped_storage().nbytes() == 16 << 20
    h.untyped_storage().resize_(0)
    out = large()
    torch.add(torch.ones(5, 7), 1, out=out.resize_(0))
    assert out.shape == (5, 7)
    torch.mul(torch.ones(LARGE), 3, out=(out := large()))
    assert (out == 3).all()
    buffer = io.BytesIO()
    torch.save(out, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer), out)
    assert torch.equal(pickle.loads(pickle.dumps(out)), out)
    address = out.share_memory_().data_ptr()
    assert out.is_shared()
    del out
    assert not any(large().data_ptr() == address for _ in range(3)), "another process may read it"


def _in_child(queue: Any) -> None:
    torch.set_num_threads(1)
    a = torch.full(LARGE, 0.5)
    found: list[float] = []
    thread = threading.Thread(target=lambda: found.append(float(minrnn.scan(a, a)[0, -1, 0])), daemon=True)
    thread.start()
    thread.join(20)
    queue.put(found[0] if found else "it waits for ever")
    queue.close()
    queue.join_thread()


def test_processes_that_are_forked_compute_too() -> None:
    """With what is kept, and while another thread makes outputs."""
    kept = [large() for _ in range(3)]
    del kept
    done = threading.Event()

    def go_on() -> None:
        while not done.is_set():
            memory.take(8 << 20, lambda *_: None)

    thread = threading.Thread(target=go_on)
    thread.start()
    try:
        for _ in range(3):
            context = torch.multiprocessing.get_context("fork")
            queue = context.Queue()
            child = context.Process(target=_in_child, args=(queue,))
            child.start()
            assert queue.get(timeout=60) == pytest.approx(1)
            child.join(60)
            assert child.exitcode == 0
    finally:
        done.set()
        thread.join()
    assert large().shape == LARGE


class _Scanned(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> Tensor:
        return minrnn.scan(torch.full(LARGE, 0.5), torch.full(LARGE, float(index)))


def test_data_loaders_send_them() -> None:
    large()
    batches = list(torch.utils.data.DataLoader(_Scanned(), num_workers=1, multiprocessing_context="fork"))
    assert batches[0].sum() == 0
    assert batches[1][0, 0, -1, 0] == pytest.approx(2)


# ----------------------------------------------------------------------------------------------------------
# Bounds


def test_what_is_kept_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs in use count too, as they may be dropped without another call; more of them are torch's."""
    release_memory()
    monkeypatch.setattr(memory, "LIMIT", 20 << 20)
    outputs = [large() for _ in range(5)]
    assert sum(kept.storage.nbytes() for kept in memory._POOL.kept) <= 20 << 20
    assert len({x.data_ptr() for x in outputs}) == 5
    del outputs
    assert release_memory() == 16 << 20
    monkeypatch.setattr(memory, "LIMIT", 1 << 20)
    large()
    assert release_memory() == 0


def test_what_is_idle_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    release_memory()
    large()
    monkeypatch.setattr(memory, "IDLE", 0.0)
    memory._POOL.looked = 0.0
    large((4, 512, 2048))
    assert all(kept.storage.nbytes() != 8 << 20 for kept in memory._POOL.kept)
    release_memory()


def kept_bytes() -> list[int]:
    return [kept.storage.nbytes() >> 20 for kept in memory._POOL.kept]


def test_what_was_used_longest_ago_goes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    release_memory()
    monkeypatch.setattr(memory, "LIMIT", 24 << 20)
    for megabytes in (4, 8, 12):
        large((1, megabytes << 8, 1024))
    assert kept_bytes() == [4, 8, 12]
    large((1, 4 << 8, 1024))
    assert kept_bytes() == [8, 12, 4]
    large((1, 6 << 8, 1024))
    assert kept_bytes() == [12, 4, 6]
    release_memory()


def test_time_is_counted_from_the_last_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten seconds, in which nobody holds the memory."""
    release_memory()
    now = 100.0
    monkeypatch.setattr(memory, "time", SimpleNamespace(monotonic=lambda: now))
    monkeypatch.setattr(memory._POOL, "looked", now)

    def use(at: float, megabytes: int) -> None:
        nonlocal now
        now = at
        large((1, megabytes << 8, 1024))

    use(100, 8)
    use(102, 4)  # sees that 8 is free
    use(111, 4)  # nine seconds later
    assert sorted(kept_bytes()) == [4, 8]
    use(111, 8)
    use(113, 4)  # 8 was free when it was last looked at, at 102, but used since
    assert sorted(kept_bytes()) == [4, 8]
    use(124, 4)
    assert kept_bytes() == [4]
    release_memory()


def test_only_new_memory_is_prepared() -> None:
    release_memory()
    seen: list[tuple[int, int]] = []
    storage = memory.take(8 << 20, lambda *place: seen.append(place))
    assert storage is not None
    assert seen == [(storage.data_ptr(), 8 << 20)]
    del storage
    memory.take(8 << 20, lambda *place: seen.append(place))
    assert len(seen) == 1
    release_memory()


OUT_OF_MEMORY = """
import resource, torch, minrnn
from minrnn.ops import cpu, memory
shape = (16, 1024, 4096)  # 256 MiB
cpu.new_output(torch.empty(1).expand(shape), 4096).zero_()
def used(): return int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used() + (64 << 20), -1))
h = cpu.new_output(torch.empty(1).expand(16, 1024, 2048), 2048)  # fits once what is kept has been given back
assert h.shape == (16, 1024, 2048)
for attempt in range(2):
    try:
        cpu.new_output(torch.empty(1).expand(1 << 20, 1 << 20, 1 << 10), 1 << 10)
    except RuntimeError as error:
        assert "DefaultCPUAllocator: can't allocate memory: you tried to allocate" in str(error), error
    else:
        raise AssertionError
one, many = torch.ones(1, 1, 1), torch.ones(1, 1, 1_000_000)
try:
    minrnn.selective_scan(one, one, -many[0], many, many)  # of small tensors, but of as many states
except RuntimeError as error:
    assert "minrnn: can't allocate the engine's workspace" in str(error), error
else:
    raise AssertionError
del h
a = torch.full((4, 512, 1024), 0.5)
assert minrnn.scan(a, a).isfinite().all()
print("usable")
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits a process's memory as Linux does")
def test_where_there_is_no_memory() -> None:
    """What is kept is given back and the output tried again; the error is torch's; all stays usable."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", OUT_OF_MEMORY], env=environment, capture_output=True, text=True
    )
    assert done.stdout == "usable\n", done.stderr
