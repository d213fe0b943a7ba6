"""Checkpoints: what is read is what was written, damage is refused, and no accident loses the one before."""

import errno
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import minrnn.files.writing as writing
import minrnn.models.checkpoint as checkpoint
from minrnn.files import find_directory, write_directory
from minrnn.mixers import MIXERS
from minrnn.models import (
    DecisionConfig,
    DecisionModel,
    ModelConfig,
    SequenceModel,
    load_checkpoint,
    save_checkpoint,
)
from minrnn.models.checkpoint import (
    CONFIG_FILE,
    FORMAT_VERSION,
    TENSORS_FILE,
    load_tensors,
    save_tensors,
)


def build(seed: int = 0, **options: Any) -> SequenceModel:
    torch.manual_seed(seed)
    return SequenceModel(ModelConfig(**{"vocab_size": 7, "d_model": 8, "num_layers": 2, **options}))


def same(ours: SequenceModel, theirs: SequenceModel) -> bool:
    one, other = ours.state_dict(), theirs.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def edit_config(directory: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    path = directory / CONFIG_FILE
    config = json.loads(path.read_text())
    edit(config)
    path.write_text(json.dumps(config | {"sha256": checkpoint._digest(config)}))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A checkpoint of `build()`."""
    save_checkpoint(tmp_path / "last", build(), extra={"step": 1})
    return tmp_path / "last"


# --- round trips --------------------------------------------------------------------------------------


def test_no_model_needs_torchs_compiler_to_be_loaded(tmp_path: Path) -> None:
    """Importing it takes longer than all else that `minrnn sample` does.

    It is needed where a mixer computes with its initial values: torch's arithmetic on the meta device
    imports it.
    """
    mixers = sorted(set(MIXERS) - {"s4d", "mamba"})
    for mixer in mixers:
        save_checkpoint(tmp_path / mixer, build(mixer=mixer))
    trunk = ModelConfig(vocab_size=7, d_model=8, num_layers=1)
    save_checkpoint(tmp_path / "policy", DecisionModel(DecisionConfig(trunk, 3, 2, max_steps=9)))
    program = """
import sys
from pathlib import Path
import torch
from minrnn.models import SequenceModel, load_checkpoint
for path in Path(sys.argv[1]).iterdir():
    model, _ = load_checkpoint(path)
    if isinstance(model, SequenceModel):
        model(torch.zeros(1, 4, dtype=torch.long))
    print(path.name, "torch._dynamo" in sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-c", program, tmp_path], capture_output=True, text=True, check=True
    )
    assert sorted(done.stdout.splitlines()) == sorted(f"{name} False" for name in (*mixers, "policy"))


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("tie_embeddings", [True, False])
def test_round_trip(tmp_path: Path, mixer: str, tie_embeddings: bool) -> None:
    model = build(mixer=mixer, tie_embeddings=tie_embeddings)
    extra = {"vocabulary": {"kind": "bytes"}, "step": 3, "loss": 1.5, "tags": ["a", None, True]}
    save_checkpoint(tmp_path / "a" / "b", model, extra=extra)
    random_state = torch.get_rng_state()
    loaded, loaded_extra = load_checkpoint(tmp_path / "a" / "b")
    assert torch.equal(torch.get_rng_state(), random_state)
    assert loaded_extra == extra
    assert loaded.config == model.config
    assert same(loaded, model)
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    tokens = torch.randint(7, (2, 5))
    assert torch.equal(loaded(tokens)[0], model(tokens)[0])


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o002, 0o664), (0o077, 0o600)])
def test_files_are_readable_by_whom_the_umask_allows(tmp_path: Path, mask: int, mode: int) -> None:
    before = os.umask(mask)
    try:
        save_checkpoint(tmp_path / "a", build())
    finally:
        assert os.umask(before) == mask
    assert {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "a").iterdir()} == {
        CONFIG_FILE: mode,
        TENSORS_FILE: mode,
    }


def test_dtype_survives(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "c", build().double())
    loaded, extra = load_checkpoint(tmp_path / "c")
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float64}
    assert extra == {}


def test_directory_holds_two_files_and_a_readable_config(saved: Path) -> None:
    assert sorted(path.name for path in saved.iterdir()) == [CONFIG_FILE, TENSORS_FILE]
    assert [path.name for path in saved.parent.iterdir()] == ["last"]
    config = json.loads((saved / CONFIG_FILE).read_text())
    assert config["format_version"] == FORMAT_VERSION
    assert config["model"]["d_model"] == 8
    assert config["files"][TENSORS_FILE]["bytes"] == (saved / TENSORS_FILE).stat().st_size


def test_relative_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_checkpoint(Path("last"), build())
    save_checkpoint(Path("last"), build(1))
    assert same(load_checkpoint(Path("last"))[0], build(1))


def test_a_path_may_start_at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    save_checkpoint(Path("~/last"), build())
    assert (tmp_path / "last" / CONFIG_FILE).is_file()
    assert same(load_checkpoint(Path("~/last"))[0], build())


def test_tensors_round_trip(tmp_path: Path) -> None:
    tensors = {
        "transposed": torch.randn(3, 4).T,
        "empty": torch.zeros(2, 0, 3),
        "scalar": torch.tensor(7),
        "bool": torch.tensor([True, False]),
        "half": torch.randn(3).bfloat16(),
        "needs grad": torch.randn(2, requires_grad=True),
    }
    save_tensors(tmp_path / "t.safetensors", tensors)
    loaded = load_tensors(tmp_path / "t.safetensors")
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)
        assert loaded[name].data_ptr() % 16 == 0


def test_replacing_takes_the_other_files_along(saved: Path) -> None:
    (saved / "trainer.json").write_text("old")
    save_checkpoint(saved, build(1), extra={"step": 2})
    assert not (saved / "trainer.json").exists()
    loaded, extra = load_checkpoint(saved)
    assert extra == {"step": 2}
    assert same(loaded, build(1))
    assert [path.name for path in saved.parent.iterdir()] == ["last"]


# --- damage -------------------------------------------------------------------------------------------


def refused(directory: Path, message: str, error: type[Exception] = ValueError) -> None:
    with pytest.raises(error, match=message):
        load_checkpoint(directory)


def test_cut_short_tensors_are_refused(saved: Path) -> None:
    path = saved / TENSORS_FILE
    path.write_bytes(path.read_bytes()[:-3])
    refused(saved, "cut short or altered")


def test_altered_tensors_are_refused(saved: Path) -> None:
    path = saved / TENSORS_FILE
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    refused(saved, "cut short or altered")


def test_tensors_without_their_record_are_refused(saved: Path) -> None:
    edit_config(saved, lambda config: config["files"].clear())
    refused(saved, "cut short or altered")


@pytest.mark.parametrize("name", [CONFIG_FILE, TENSORS_FILE])
def test_missing_file_is_named(saved: Path, name: str) -> None:
    (saved / name).unlink()
    refused(saved, name, FileNotFoundError)


def test_missing_directory_is_named(tmp_path: Path) -> None:
    refused(tmp_path / "nothing", "no checkpoint directory.*nothing", FileNotFoundError)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b'{"model": {}}'])
def test_config_that_is_none_is_refused(saved: Path, content: bytes) -> None:
    (saved / CONFIG_FILE).write_bytes(content)
    refused(saved, "config.json (is not valid JSON|names no format_version)")


@pytest.mark.parametrize(
    "edit",
    [
        lambda config: config["extra"].update(step=3),
        lambda config: config.pop("sha256"),
        lambda config: config.update(more=1),
    ],
)
def test_a_config_that_was_altered_is_refused(saved: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    path = saved / CONFIG_FILE
    config = json.loads(path.read_text())
    edit(config)
    path.write_text(json.dumps(config))
    refused(saved, "config.json was cut short or altered: its SHA-256 is not the recorded one")


def test_a_checkpoint_of_format_1_is_read_and_says_what_it_did_not_list(saved: Path) -> None:
    (saved / "more.json").write_text("{}")
    with pytest.raises(ValueError, match=r"more\.json was cut short or altered"):
        checkpoint.check_files(saved, ["more.json"])
    path = saved / CONFIG_FILE
    config = json.loads(path.read_text()) | {"format_version": 1}
    del config["sha256"]
    path.write_text(json.dumps(config))
    assert same(load_checkpoint(saved)[0], build())
    assert checkpoint.check_files(saved, [TENSORS_FILE, "more.json"]) == ["more.json"]


def test_newer_format_is_refused(saved: Path) -> None:
    edit_config(saved, lambda config: config.update(format_version=FORMAT_VERSION + 1))
    refused(saved, f"format version {FORMAT_VERSION + 1}, .* up to {FORMAT_VERSION}; upgrade minrnn")


def test_a_checkpoint_of_before_kinds_is_a_sequence_models(saved: Path) -> None:
    edit_config(saved, lambda config: config.pop("kind"))
    assert same(load_checkpoint(saved)[0], build())


def test_a_kind_that_is_unknown_is_refused(saved: Path) -> None:
    edit_config(saved, lambda config: config.update(kind="oracle"))
    with pytest.raises(ValueError, match=r"must be of a model among sequence, decision, got 'oracle'"):
        load_checkpoint(saved)


@pytest.mark.parametrize("key", ["model", "files", "extra"])
def test_incomplete_config_is_refused(saved: Path, key: str) -> None:
    edit_config(saved, lambda config: config.pop(key))
    refused(saved, f"{key} is missing")


def test_unknown_config_key_names_the_nearest(saved: Path) -> None:
    edit_config(saved, lambda config: config["model"].update(num_layer=3))
    refused(saved, "unknown key 'num_layer'; did you mean 'num_layers'")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_layers": 3}, "missing: blocks.2.conv.bias, "),
        ({"num_layers": 1}, "unexpected: blocks.1.conv.bias, "),
        ({"vocab_size": 9}, r"of another shape: embedding.weight \(\(9, 8\) expected, got \(7, 8\)\)"),
        ({"tie_embeddings": True}, "unexpected: head.weight"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(saved: Path, change: dict[str, Any], message: str) -> None:
    edit_config(saved, lambda config: config["model"].update(change))
    refused(saved, message)


def test_a_device_is_any_of_torchs(saved: Path) -> None:
    for device in ("meta", torch.device("meta"), "cpu"):
        model, _ = load_checkpoint(saved, device=device)
        assert {x.device for x in model.state_dict().values()} == {torch.device(device)}
    for wrong in ("nowhere", None, [0]):
        with pytest.raises(TypeError, match="load_checkpoint: device must be one of torch's, got") as caught:
            load_checkpoint(saved, device=wrong)  # type: ignore[arg-type]
        assert "\n" not in str(caught.value)


def test_load_tensors_refuses_what_is_no_safetensors_file(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    with pytest.raises(FileNotFoundError):
        load_tensors(path)
    save_tensors(path, {"a": torch.zeros(5)})
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        load_tensors(path)


def test_of_a_long_message_of_the_library_the_start_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: Path) -> None:
        raise checkpoint.safetensors.SafetensorError("invalid " + "x" * 10_000)

    monkeypatch.setattr(checkpoint.safetensors.torch, "load_file", fail)
    with pytest.raises(ValueError, match=r"not a whole safetensors file \(invalid x{192}\)$"):
        load_tensors(tmp_path / "t.safetensors")


# --- accidents ----------------------------------------------------------------------------------------


def no_space(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("where", ["save_tensors", "_flush", "_sha256"])
@pytest.mark.parametrize("existing", [True, False])
def test_full_disk_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, existing: bool
) -> None:
    directory = tmp_path / "last"
    if existing:
        save_checkpoint(directory, build(), extra={"step": 1})
    with monkeypatch.context() as patch:
        patch.setattr(writing if where == "_flush" else checkpoint, where, no_space)
        with pytest.raises(OSError, match=r"could not write .*last \(No space left") as caught:
            save_checkpoint(directory, build(1))
    assert caught.value.errno == errno.ENOSPC
    assert [path.name for path in tmp_path.iterdir()] == (["last"] if existing else [])
    if existing:
        assert same(load_checkpoint(directory)[0], build())


def test_failing_rename_puts_the_old_one_back(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rename = Path.rename

    def fail_into_place(path: Path, target: Path) -> Path:
        if path.name.endswith(".partial"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fail_into_place)
    with pytest.raises(OSError, match="could not write"):
        save_checkpoint(saved, build(1))
    assert [path.name for path in saved.parent.iterdir()] == ["last"]
    assert same(load_checkpoint(saved)[0], build())


def test_a_real_write_error_is_an_oserror(tmp_path: Path) -> None:
    """A limit on file sizes makes the system refuse the write inside the safetensors library."""
    save_checkpoint(tmp_path / "last", build(), extra={"step": 1})
    script = """
import resource, signal, sys
from pathlib import Path
from minrnn.models import ModelConfig, SequenceModel, save_checkpoint
model = SequenceModel(ModelConfig(vocab_size=7, d_model=8, num_layers=2))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    save_checkpoint(Path(sys.argv[1]), model)
except OSError as error:
    print(error)
"""
    pytest.importorskip("resource", reason="file size limits need a POSIX system")
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "last")], capture_output=True, text=True, check=True
    )
    assert "could not write the checkpoint" in done.stdout
    assert "File too large" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["last"]
    assert same(load_checkpoint(tmp_path / "last")[0], build())


def test_extra_that_is_no_json_is_refused_before_anything_is_written(saved: Path) -> None:
    cases: list[tuple[Any, str]] = [
        ({"path": object()}, "fit into JSON; .* not JSON serializable"),
        ({1: 2, "1": 3}, r"have strings as keys, got 1 \(int\)"),
        ({"a": [{None: 2}]}, r"have strings as keys, got None \(NoneType\)"),
        ([1], "be a dict or None, got list"),
    ]
    for extra, message in cases:
        with pytest.raises(TypeError, match=f"save_checkpoint: extra must {message}"):
            save_checkpoint(saved, build(1), extra=extra)
    assert load_checkpoint(saved)[1] == {"step": 1}
    assert [path.name for path in saved.parent.iterdir()] == ["last"]


def test_interrupted_body_leaves_what_was_there(saved: Path) -> None:
    def write_half() -> None:
        with write_directory(saved) as folder:
            (folder / "half").write_text("x")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_half()
    assert [path.name for path in saved.parent.iterdir()] == ["last"]
    assert load_checkpoint(saved)[1] == {"step": 1}


@pytest.mark.parametrize("target", ["file", "file/last", "folder"])
def test_other_things_are_never_replaced(tmp_path: Path, target: str) -> None:
    (tmp_path / "file").write_text("precious")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis.tex").write_text("precious")
    with pytest.raises(OSError, match="could not write the checkpoint"):
        save_checkpoint(tmp_path / target, build())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]
    assert (tmp_path / "file").read_text() == "precious"
    assert (tmp_path / "folder" / "thesis.tex").read_text() == "precious"
    save_checkpoint(tmp_path / "folder" / "last", build())


KILLED_WRITER = """
import os, signal, sys
from pathlib import Path
import torch
import minrnn.files.writing as writing
import minrnn.models.checkpoint as checkpoint
from minrnn.models import ModelConfig, SequenceModel, save_checkpoint

kill_at, calls = int(sys.argv[2]), 0

def counted(function):
    def call(*args, **kwargs):
        global calls
        calls += 1
        if calls == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)
    return call

# Every operation on the file system that a save goes through, in the order in which they come.
for name in ("save_tensors", "_sha256"):
    setattr(checkpoint, name, counted(getattr(checkpoint, name)))
writing._flush = counted(writing._flush)
for name in ("mkdir", "write_text", "rename"):
    setattr(Path, name, counted(getattr(Path, name)))
writing.shutil.rmtree = counted(writing.shutil.rmtree)

torch.manual_seed(1)
model = SequenceModel(ModelConfig(vocab_size=7, d_model=8, num_layers=2))
save_checkpoint(Path(sys.argv[1]), model, extra={"step": 2})
"""


def test_a_kill_at_any_point_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    """Kill a process that replaces a checkpoint before each of its operations; read, and write again."""
    old, new = build(), build(1)
    kept = {True: 0, False: 0}
    for kill_at in range(1, 99):
        directory = tmp_path / str(kill_at) / "last"
        save_checkpoint(directory, old, extra={"step": 1})
        done = fork_and_run(KILLED_WRITER, [str(directory), str(kill_at)])
        loaded, extra = load_checkpoint(directory)
        is_new = extra == {"step": 2}
        kept[is_new] += 1
        assert same(loaded, new if is_new else old)
        save_checkpoint(directory, new, extra={"step": 3})
        assert load_checkpoint(directory)[1] == {"step": 3}
        assert [path.name for path in directory.parent.iterdir()] == ["last"]
        if done == 0:
            break
        assert done == -signal.SIGKILL
    else:
        pytest.fail("the writer never finished")
    assert kept[True] >= 2
    assert kept[False] >= 8


def fork_and_run(script: str, arguments: list[str]) -> int:
    """Run a script in a forked child, which spares importing torch each time; return its exit code."""
    if not hasattr(os, "fork"):
        pytest.skip("needs os.fork")
    pid = os.fork()
    if pid == 0:
        try:
            sys.argv = ["-", *arguments]
            exec(compile(script, "writer", "exec"), {"__name__": "writer"})
            os._exit(0)
        finally:
            os._exit(1)  # never back into pytest
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_reading_while_another_process_replaces(tmp_path: Path) -> None:
    models = [build(seed) for seed in range(3)]
    directory = tmp_path / "last"
    save_checkpoint(directory, models[0], extra={"seed": 0})
    stop = threading.Event()

    def write() -> None:
        turn = 0
        while not stop.is_set():
            turn += 1
            save_checkpoint(directory, models[turn % 3], extra={"seed": turn % 3})

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for _ in range(40):
            loaded, extra = load_checkpoint(directory)
            assert same(loaded, models[extra["seed"]])  # type: ignore[index]
    finally:
        stop.set()
        writer.join()


@pytest.mark.parametrize("mixed", [None, ValueError("old and new"), FileNotFoundError("old")], ids=str)
def test_what_is_replaced_while_it_is_read_is_read_again(
    saved: Path, mixed: Exception | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, load = [], checkpoint._load

    def replaced_meanwhile(folder: Path, device: torch.device) -> Any:
        read.append(loaded := load(folder, device))
        if len(read) == 1:
            save_checkpoint(saved, build(1), extra={"step": 2})
            if mixed is not None:
                raise mixed
        return loaded

    monkeypatch.setattr(checkpoint, "_load", replaced_meanwhile)
    model, extra = load_checkpoint(saved)
    assert [extra for _, extra in read] == [{"step": 1}, {"step": 2}]
    assert extra == {"step": 2}
    assert same(model, build(1))


# --- write_directory ----------------------------------------------------------------------------------


def test_write_directory_puts_nested_files_in_place(tmp_path: Path) -> None:
    with write_directory(tmp_path / "out") as folder:
        assert folder.parent == tmp_path
        (folder / "sub").mkdir()
        (folder / "sub" / "a.txt").write_text("a")
        assert not (tmp_path / "out").exists()
    assert (tmp_path / "out" / "sub" / "a.txt").read_text() == "a"


def left_by_process(path: Path) -> Path:
    """Return a partial name of `path` as a process of this machine that is gone has left it."""
    program = (
        "import sys; from pathlib import Path; from minrnn.files.partial import partial_path;"
        "print(partial_path(Path(sys.argv[1])))"
    )
    done = subprocess.run([sys.executable, "-c", program, path], capture_output=True, text=True, check=True)
    return Path(done.stdout.strip())


def test_what_a_killed_write_left_is_found_and_cleared(saved: Path) -> None:
    aside = saved.with_name(".last.previous")
    saved.rename(aside)
    left_by_process(saved).mkdir()
    assert find_directory(saved) == aside
    assert load_checkpoint(saved)[1] == {"step": 1}
    save_checkpoint(saved, build(1), extra={"step": 2})
    assert load_checkpoint(saved)[1] == {"step": 2}
    assert [path.name for path in saved.parent.iterdir()] == ["last"]


def test_a_failed_write_after_a_killed_one_keeps_the_aside_copy(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved.rename(saved.with_name(".last.previous"))
    monkeypatch.setattr(checkpoint, "save_tensors", no_space)
    with pytest.raises(OSError, match=re.escape("nothing that was there before is lost")):
        save_checkpoint(saved, build(1))
    assert load_checkpoint(saved)[1] == {"step": 1}
