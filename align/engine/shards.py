"""Which numbers of the trained weights and their moments a process keeps under ZeRO, and how they become files.

A checkpoint holds whole tensors, so that another number of processes or another stage can read it.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from align.engine.base import check_fit, generator_states, seed_generators, shape_of
from align.engine.files import TensorFiles, TensorWriter, deal, file_name, saved_files
from align.engine.world import World, peer_lost

_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Piece:
    """Where a process keeps its part of a trained weight: numbers [start, start + length) of the flattened weight lie
    at `offset` of `flat`, which the optimiser knows as a parameter."""

    start: int
    length: int
    flat: Tensor
    offset: int


class Shards:
    """This process's pieces of the trained weights.

    zero: DeepSpeed's optimiser, None at stage 0; adamw: the one inside it. seed: of the generators after a checkpoint
    from another number of processes.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        stage: int,
        zero: Any,
        adamw: torch.optim.Optimizer,
        world: World,
        device: torch.device,
        seed: int,
    ):
        self.parameters = parameters
        self.stage = stage
        self.world = world
        self.device = device
        self.seed = seed
        self._zero = zero
        self._adamw = adamw
        self._spans: dict[str, list[tuple[int, int]]] | None = None

    def write(self, directory: Path) -> None:
        """This process's part of a checkpoint: whole tensors, dealt to processes by size, sent to their writers."""
        size, rank = self.world.size, self.world.rank
        sizes = {name: math.prod(shape_of(p)) for name, p in self.parameters.items()}
        writers = deal(sizes, size)
        mine = [name for name in self.parameters if writers[name] == rank]
        shapes = {name: tuple(shape_of(self.parameters[name])) for name in mine}
        steps, generators = self._steps(), self._generators()
        moments = _MOMENTS if steps is not None else ()
        entries: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
            k: (v.dtype, tuple(v.shape)) for k, v in generators.items()
        }
        if steps is not None:
            entries |= {f"{name}|step": (torch.float32, ()) for name in mine}
        entries |= {f"{name}|{key}": (torch.float32, shapes[name]) for name in mine for key in moments}
        paths = [directory / file_name(stem, rank, size) for stem in ("model", "optimizer")]
        model = _Sink(paths[0], {name: (torch.float32, shape) for name, shape in shapes.items()})
        for name in self.parameters:
            model.take(name, self._collect(name, None, writers[name]))
        model.close()
        optimizer = _Sink(paths[1], entries)
        for key, value in generators.items():
            optimizer.take(key, value)
        for name in self.parameters:
            if steps is not None and writers[name] == rank:
                optimizer.take(f"{name}|step", torch.tensor(float(steps)))
            for key in moments:
                optimizer.take(f"{name}|{key}", self._collect(name, key, writers[name]))
        optimizer.close()
        for sink in (model, optimizer):
            if sink.error is not None:
                raise sink.error

    def read(self, directory: Path) -> None:
        """Set weights, moments and generators. Raises ValueError when the checkpoint is of another model."""
        model, optimizer = (TensorFiles(saved_files(directory, stem)) for stem in ("model", "optimizer"))
        check_fit({name: model.shape(name) for name in model.names()}, self.parameters)
        counts = {int(optimizer.read(name)) for name in optimizer.names() if name.endswith("|step")}
        with torch.no_grad():
            for name, p in self.parameters.items():
                self._set_weight(name, p, model.read(name))
                piece = self.piece(name)
                if piece is None or f"{name}|step" not in optimizer:
                    continue
                state = self._state(piece.flat, float(optimizer.read(f"{name}|step")))
                for key in _MOMENTS:
                    part = optimizer.read(f"{name}|{key}").view(-1)[piece.start : piece.start + piece.length]
                    state[key].view(-1)[piece.offset : piece.offset + piece.length].copy_(part)
        self._set_generators(optimizer, max(counts, default=0))

    def piece(self, name: str) -> Piece | None:
        """This process's piece of a trained weight; None if it has none of it."""
        p = linked(self.parameters[name])
        if self.stage == 0:
            return Piece(0, p.numel(), p, 0)
        if self.stage < 3:
            found = p._hp_mapping  # DeepSpeed's link from a weight to its shard
            if found is None:
                return None
            flat = self._zero.single_partition_of_fp32_groups[found.param_group_index]
            here, there = found.lp_fragment_address, found.hp_fragment_address
            return Piece(here.start, here.numel, flat, there.start)
        group, offset, length = self._zero.grad_position[self._zero.get_param_id(p)]
        start = self.world.rank * length
        length = min(length, p.ds_numel - start)
        if length <= 0:
            return None
        return Piece(start, length, self._zero.fp32_partitioned_groups_flat[group], offset)

    def _local(self, name: str, key: str | None) -> Tensor | None:
        """The numbers of this process's piece: of the weight, or of one of its moments."""
        piece = self.piece(name)
        if piece is None:
            return None
        source = piece.flat if key is None else self._adamw.state[piece.flat][key]
        return source.detach().view(-1)[piece.offset : piece.offset + piece.length]

    def _collect(self, name: str, key: str | None, writer: int) -> Tensor | None:
        """The whole weight or moment at its writer, None elsewhere."""
        p, rank = self.parameters[name], self.world.rank
        mine = self._local(name, key)
        if self.stage == 0 or self.world.size == 1:
            assert mine is not None
            return mine.view(shape_of(p)) if writer == rank else None
        if self._spans is None:
            own = {n: (q.start, q.length) if (q := self.piece(n)) else (0, 0) for n in self.parameters}
            every = self.world.gather(own)
            self._spans = {n: [spans[n] for spans in every] for n in own}
        spans = self._spans[name]
        sent = torch.zeros(max(length for _, length in spans), device=self.device)
        if mine is not None:
            sent[: len(mine)] = mine
        parts = [torch.empty_like(sent) for _ in spans] if writer == rank else None
        with peer_lost("checkpoint"):
            dist.gather(sent, parts, dst=writer)
        if parts is None:
            return None
        whole = torch.empty(math.prod(shape_of(p)))
        for (start, length), part in zip(spans, parts, strict=True):
            whole[start : start + length] = part[:length]
        return whole.view(shape_of(p))

    def _set_weight(self, name: str, p: Any, whole: Tensor) -> None:
        piece = self.piece(name)
        flat = whole.view(-1)
        if piece is not None:
            part = flat[piece.start : piece.start + piece.length]
            piece.flat.detach().view(-1)[piece.offset : piece.offset + piece.length].copy_(part)
            if self.stage == 3:
                p.ds_tensor[: piece.length].copy_(part)
        if p.numel() == whole.numel():  # also the small weights that stage 3 keeps whole
            p.data.copy_(whole.view(p.shape))

    def _state(self, flat: Tensor, step: float) -> dict[str, Tensor]:
        """The optimiser's state of a shard, made if there was no step yet."""
        state = self._adamw.state[flat]
        if not state:
            state["step"] = torch.zeros((), device=flat.device)
            for key in _MOMENTS:
                state[key] = torch.zeros_like(flat.detach(), memory_format=torch.preserve_format)
        state["step"].fill_(step)
        return state

    def _steps(self) -> int | None:
        """Optimiser steps taken, None before the first; the same on all processes."""
        counts = [int(state["step"]) for state in self._adamw.state.values() if "step" in state]
        return max(counts) if counts else None

    def _generators(self) -> dict[str, Tensor]:
        return generator_states(self.device, f"|{self.world.rank}" if self.world.size > 1 else "")

    def _set_generators(self, optimizer: TensorFiles, step: int) -> None:
        own = self._generators()
        before = sum(name.startswith("rng|cpu") for name in optimizer.names())
        if before != self.world.size or any(name not in optimizer for name in own):
            seed_generators(self.seed, step, self.world.rank)
            return
        for name in own:
            state = optimizer.read(name)
            if name.startswith("rng|cpu"):
                torch.set_rng_state(state)
            else:
                torch.cuda.set_rng_state(state, self.device)


class _Sink:
    """A file that fails late: a process whose disk is full still sends the others what they write."""

    def __init__(self, path: Path, entries: dict[str, tuple[torch.dtype, tuple[int, ...]]]):
        self.error: OSError | None = None
        self._writer: TensorWriter | None = None
        with self._late():
            self._writer = TensorWriter(path, entries)

    def take(self, name: str, tensor: Tensor | None) -> None:
        """Write it, if it is for this process and nothing went wrong before."""
        if tensor is not None and self.error is None and self._writer is not None:
            with self._late():
                self._writer.write(name, tensor)

    def close(self) -> None:
        """Everything is in the file, or error says why not."""
        if self._writer is not None:
            with self._late():
                self._writer.close(self.error is None)

    @contextlib.contextmanager
    def _late(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.error = self.error or error


def linked(p: nn.Parameter) -> Any:
    """A weight with the attributes that DeepSpeed has given it."""
    return p
