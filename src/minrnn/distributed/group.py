"""Ranks that exchange through torch.distributed."""

from __future__ import annotations

import gc
import hashlib
import inspect
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from minrnn.distributed.failures import Failures, Reported
from minrnn.distributed.ranks import Ranks
from minrnn.distributed.sequences import sequence_parallel
from minrnn.distributed.weights import release, shard_weights, unsynchronized
from minrnn.files import first_difference, shown
from minrnn.mixers.sharded import undivided
from minrnn.models import LossOf

T = TypeVar("T")

_POLL = 0.05  # seconds between two looks of a wait that signals interrupt, as they do not torch's own waits


@dataclass(frozen=True)
class RankGroup(Ranks):
    """The ranks of a run, joined in torch's default process group, which serves CPU tensors by gloo.

    Numbers and texts are exchanged by gloo on any device: to read them, no rank waits for its GPU.

    An exchange that another rank does not join within the group's timeout, or because it has ended, raises
    RuntimeError.
    """

    failures: Failures | None = None
    """The failures of the ranks, in the store that they share."""
    meshes: list[DeviceMesh] = field(default_factory=list)
    """Those that this rank's models are distributed on."""

    def leave(self) -> None:
        """Free the process group and its threads, when all ranks have called this.

        A thread of gloo that still frees a tensor when the interpreter ends aborts the process (pytorch issue
        190489).
        """
        self.highest([0])  # together: if one ends before another has, torchrun ends that
        distributed.destroy_process_group()
        for mesh in self.meshes:  # caches of torch hold meshes for good, and these the group
            vars(mesh).get("_pg_registry", {}).clear()
        gc.collect()  # so does a model in a cycle

    def threads(self, wanted: int) -> int:
        """Return this rank's share of the machine's threads, at least one.

        torchrun sets OMP_NUM_THREADS to 1 where it is not set: 1 therefore counts as torch's default, which
        is the number of the machine's cores.
        """
        if not wanted and os.environ.get("OMP_NUM_THREADS", "1") != "1":
            return torch.get_num_threads()
        return max(1, (wanted or _cores()) // self.local_size)

    def device(self, name: str) -> str:
        kind, _, number = name.partition(":")
        if kind == "auto":
            kind = "cuda" if torch.cuda.is_available() else "cpu"
        if kind == "cpu":
            return name if number else kind
        if number and self.local_size > 1:
            raise ValueError(
                f"train.device must be auto, cpu or {kind} without a number where {self.local_size} ranks "
                f"share a machine, got {name!r}"
            )
        return name if number else f"{kind}:{self.local_rank}"

    def sums(self, values: Sequence[float]) -> list[float]:
        total = torch.tensor(values, dtype=torch.float64)
        distributed.all_reduce(total)
        return cast("list[float]", total.tolist())

    def highest(self, values: Sequence[int]) -> list[int]:
        most = torch.tensor(values, dtype=torch.int64)
        distributed.all_reduce(most, distributed.ReduceOp.MAX)
        return cast("list[int]", most.tolist())

    def first_says(self, make: Callable[[], T]) -> T:
        content = json.dumps(make()).encode() if self.is_first else b""
        (length,) = self.highest([len(content)])
        text = torch.frombuffer(bytearray(content or length), dtype=torch.uint8)
        distributed.broadcast(text, src=0)
        return cast(T, json.loads(bytes(text.tolist())))

    def in_order(self, name: str, make: Callable[[], T]) -> T:
        assert self.failures is not None
        store = self.failures.store
        is_head = self.local_rank == 0
        heads = round(self.sums([float(is_head)])[0])
        before = 0 if self.is_first else 1 if is_head else heads
        key = f"made/{name}"
        while store.add(key, 0) < before:
            if self.failures.any():  # perhaps of the rank that is waited for
                raise Reported
            time.sleep(_POLL)
        made = make()
        store.add(key, int(is_head))
        return made

    def check_equal(self, what: str, value: Any) -> None:
        found: list[Any] = [None] * self.size
        distributed.all_gather_object(found, value)
        for rank, other in enumerate(found):
            if differing := first_difference(other, found[0]):
                name, here, first = differing
                which = f"{name or 'it'} is {shown(here)}, and {shown(first)} on rank 0"
                raise ValueError(f"{what} must be the same on all ranks; on rank {rank} {which}")

    def gather_rows(self, rows: Tensor, count: int) -> Tensor:
        own = rows.detach().cpu().contiguous()
        if self.rank % self.sequence_ranks:  # others have the same rows
            return rows
        if not self.is_first:
            distributed.send(own, dst=0)
            return rows
        parts = [own]
        for rank in range(self.sequence_ranks, self.size, self.sequence_ranks):
            place = self.rows(count, rank=rank)
            parts.append(own.new_empty(place.stop - place.start, *own.shape[1:]))
            distributed.recv(parts[-1], src=rank)
        return torch.cat(parts).to(rows.device)

    def distribute(self, model: nn.Module, device: torch.device) -> nn.Module:
        if self.sequence_ranks > 1:
            shape = (self.row_groups, self.sequence_ranks)
            self.meshes.append(init_device_mesh(device.type, shape, mesh_dim_names=("data", "sequence")))
            sequence_parallel(model, self.meshes[-1]["sequence"])
        if self.shards_weights:
            self.meshes.append(init_device_mesh(device.type, (self.size,)))
            shard_weights(model, self.meshes[-1])
        else:
            model.to(device)
        called = LossOf(model) if self.sequence_ranks > 1 else model
        return called if self.shards_weights else _averaging(called)

    def accumulating(self, called: nn.Module) -> AbstractContextManager[None]:
        if isinstance(called, DistributedDataParallel):
            return cast("AbstractContextManager[None]", called.no_sync())
        return unsynchronized(called)

    @contextmanager
    def evaluating(self, model: nn.Module) -> Iterator[None]:
        with undivided(model):
            yield
        release(model)

    def reseed(self, seed: int, step: int) -> None:
        digest = hashlib.sha256(f"{seed} {step} {self.rank}".encode()).digest()
        number = int.from_bytes(digest[:8], "little")
        # Not torch.manual_seed, which takes 3 ms to note for absent devices where it was called.
        torch.default_generator.manual_seed(number)
        if torch.accelerator.is_available():
            torch.get_device_module().manual_seed(number)


def _averaging(model: nn.Module) -> nn.Module:
    """Return a module that computes as a model does, and whose gradients are the mean over the ranks."""
    # Buffers do not change in training: no step sends them. Later versions of torch rename the option.
    known = inspect.signature(DistributedDataParallel).parameters
    name = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    options: dict[str, Any] = {"gradient_as_bucket_view": True, name: False}
    averaged: Any = DistributedDataParallel(model, **options)
    # The last attribute is freed last, after the reducer. A group that the reducer frees waits for its
    # threads while it holds the interpreter, and hangs if one of them needs that to free a tensor.
    averaged.group_freed_last = averaged.process_group
    return cast("nn.Module", averaged)


def _cores() -> int:
    """Return the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
