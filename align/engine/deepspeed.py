"""Several processes with DeepSpeed's ZeRO: optimiser states, gradients and weights in shards.

The only file that imports deepspeed, and it does so when an engine is made. DeepSpeed reduces and shards; what the
loss is divided by, when a step ends and what a checkpoint holds stays with align.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from align.config import EngineConfig, OptimizerConfig
from align.engine.base import parameter_groups, seed_generators, shape_of
from align.engine.files import TensorFiles, TensorWriter, deal, file_name, saved_files
from align.engine.measuring import Gradients, WholeGradients, moving
from align.engine.world import PeerLost, World
from align.jsons import Json
from align.models.policy import Network
from align.types import PackedBatch, Stats

_MOMENTS = ("exp_avg", "exp_avg_sq")
_BUCKET = 1 << 26  # numbers gathered at once: 256 MiB of float32


@dataclass(frozen=True)
class Piece:
    """Where a process keeps its part of a trained weight: numbers [start, start + length) of the flattened weight lie
    at `offset` of `flat`, which the optimiser knows as a parameter."""

    start: int
    length: int
    flat: Tensor
    offset: int


class DeepSpeedEngine:
    """A policy in shards over the processes of a world, with AdamW in float32.

    With precision bfloat16 the weights stay float32 and products run under autocast, as in LocalEngine: the same
    numbers, heads and norms in float32, checkpoints without rounding. DeepSpeed's own bf16 mode would round the
    residual stream and the heads' weights as well and reduce gradients in bfloat16; it would send half the bytes.

    seed: of the generators after a checkpoint from another number of processes.
    """

    def __init__(
        self,
        policy: Network,
        config: OptimizerConfig,
        settings: EngineConfig,
        precision: torch.dtype,
        world: World,
        value_lr_scale: float = 1.0,
        seed: int = 0,
    ):
        deepspeed = load_deepspeed(world, settings.timeout_s)
        self.policy = policy
        self.config = config
        assert settings.stage is not None  # engine=local is another class
        self.stage = settings.stage
        self.precision = precision
        self.world = world
        self.sharded = settings.stage == 3
        self.seed = seed
        self.parameters = {n: p for n, p in policy.named_parameters() if p.requires_grad}
        groups = parameter_groups(self.parameters, config, value_lr_scale)
        self._adamw = torch.optim.AdamW(
            groups, lr=config.lr, betas=(config.betas[0], config.betas[1]), eps=config.eps, fused=True
        )
        everything = deepspeed_config(settings, config, policy.device.type)
        try:
            deepspeed.runtime.zero.config.DeepSpeedZeroConfig(**everything["zero_optimization"])
        except ValueError as error:  # many lines of pydantic's
            raise ValueError(f"engine.deepspeed.zero_optimization: {' '.join(str(error).split())[:300]}") from error
        self._start = partial(deepspeed.initialize, config=everything)
        self._engine = self._initialized(policy, self._adamw)
        self._others: list[object] = []  # engines of networks that are not trained
        self._zero: Any = self._engine.optimizer if self.stage else None
        self._gathered = deepspeed.zero.GatheredParameters
        self._spans: dict[str, list[tuple[int, int]]] | None = None

    def _initialized(self, network: Network, optimizer: torch.optim.Optimizer | None) -> Any:
        """DeepSpeed's engine of a network."""
        if self.stage == 3:  # DeepSpeed's hooks, which come between these two, see tensors in a dict and not in Stats
            network.register_forward_hook(lambda _module, _inputs, out: dict(vars(out)))
        with peer_lost("start of DeepSpeed"):
            engine, *_ = self._start(model=network, optimizer=optimizer, dist_init_required=False)
        if self.stage == 3:
            network.register_forward_hook(lambda _module, _inputs, out: Stats(**out))
        return engine

    def forward(self, batch: PackedBatch, needs: frozenset[str]) -> Stats:
        """The policy's stats in the run's precision."""
        # The engine's own forward would switch autocast off and cannot see into Stats; this is what remains of it.
        if self._zero is not None and torch.is_grad_enabled():
            self._zero.clear_backward_seen_flag()
        with peer_lost("forward"), self.autocast():
            return self.policy(batch, needs)

    def autocast(self) -> torch.autocast:
        """Context in which matrix products run in the run's precision."""
        enabled = self.precision != torch.float32
        # its cache would keep whole weights in bfloat16 that stage 3 has just given back
        return torch.autocast(
            self.policy.device.type, dtype=self.precision, enabled=enabled, cache_enabled=self.stage < 3
        )

    def backward(self, loss: Tensor, last: bool = True, keep_graph: bool = False) -> None:
        """Add the gradient of this process's share of the loss; DeepSpeed's mean over processes becomes a sum."""
        share = loss * self.world.size
        share.register_hook(self._enter_backward)
        with peer_lost("backward"):
            self._engine.set_gradient_accumulation_boundary(last)
            self._engine.backward(share, retain_graph=keep_graph, scale_wrt_gas=False)

    def _enter_backward(self, gradient: Tensor) -> Tensor:
        self._engine._backward_prologue()  # else hung on the outputs by the engine's own forward
        return gradient

    def gradient_norm(self) -> float:
        """Global norm of the gradients over all processes; they are clipped to optimizer.max_grad_norm."""
        with peer_lost("gradient norm"):
            if self.stage == 0:
                return self._whole_norm()
            if self.stage == 3:
                groups = self._zero._get_norm_groups()
            else:
                self._zero._wait_for_offload_copies()
                groups = [self._zero.scaled_global_norm()]
        # DeepSpeed writes -1 for what is not finite
        norms = [float(group) for group in groups]
        if any(norm < 0 or not math.isfinite(norm) for norm in norms):
            return math.inf
        return math.hypot(*norms)

    def _whole_norm(self) -> float:
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients, foreach=None)
        value = float(norm)
        if self.config.max_grad_norm is not None and math.isfinite(value):
            torch.nn.utils.clip_grads_with_norm_(list(self.parameters.values()), self.config.max_grad_norm, norm)
        return value

    def step(self, lr: float) -> None:
        """One optimiser step at this learning rate, clipped; gradients are forgotten."""
        for group in self._adamw.param_groups:
            group["lr"] = lr * group["scale"]
        with peer_lost("step"):
            self._engine.step()
        if self._zero is not None and self._zero.overflow:
            raise RuntimeError("DeepSpeed left out a step: the gradient is not finite; ask gradient_norm before step")

    # ------------------------------------------------------------------ beside the steps

    def gradients(self, names: Sequence[str], count: int) -> Gradients:
        """See MeasuringEngine."""
        if self.stage == 3:
            assert count == 1, "stage 3 gathers one gradient at a time"
            return _ShardGradients(self, names)
        return _WholeGradients({name: self.parameters[name] for name in names}, count, self.world)

    @contextlib.contextmanager
    def moving(self, along: Mapping[str, Tensor]) -> Iterator[Callable[[float], None]]:
        """See MeasuringEngine."""
        if self.stage < 3:
            with moving(self.parameters, along) as move:
                yield move
            return
        shards = {name: _linked(self.parameters[name]).ds_tensor for name in along}
        try:
            with moving(shards, along) as move:

                def move_shards(length: float) -> None:
                    move(length)
                    self._regather()

                yield move_shards
        finally:
            self._regather()

    def _regather(self) -> None:
        """Stage 3: let go of all weights that are whole here, and gather those that always are, as after a step."""
        with peer_lost("gathering weights"):
            self._zero.parameter_offload.partition_all_parameters()
            if self._zero.persistent_parameters:
                self._zero.persistent_parameters[0].all_gather(self._zero.persistent_parameters)

    def begin_aside(self) -> None:
        """Stage 3: from here to end_aside, what backwards add up is no step's."""
        self._zero.zero_grad()
        self._zero.grad_partitions_flat_buffer.zero_()  # a weight without a gradient keeps what was there

    def end_aside(self, names: Sequence[str]) -> dict[str, Tensor]:
        """This process's numbers of the gradients since begin_aside, which the next step knows nothing of."""
        # DeepSpeed's own readers are by its groups; under this name it keeps them by weight
        found = self._zero._DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition
        out = {}
        for name in names:
            piece = self._piece(name)
            length = 0 if piece is None else piece.length
            out[name] = found[_linked(self.parameters[name]).ds_id].detach().view(-1)[:length].float().clone()
        self._zero.zero_grad()
        return out

    # ------------------------------------------------------------------ weights and checkpoints

    def frozen(self, network: Network) -> Network:
        """A network that is not trained: in shards under stage 3, as it is otherwise."""
        if self.stage == 3:
            self._others.append(self._initialized(network, None))
        return network

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """The model's state; under stage 3 gathered in buckets, each let go before the next."""
        state = dict(sorted(self.policy.state_dict(keep_vars=True).items()))
        if self.stage < 3:
            yield from ((name, value.detach()) for name, value in state.items())
            return
        bucket: list[tuple[str, Tensor]] = []
        size = 0
        for name, value in state.items():
            if bucket and size + _numel(value) > _BUCKET:
                yield from self._whole(bucket)
                bucket, size = [], 0
            bucket.append((name, value))
            size += _numel(value)
        yield from self._whole(bucket)

    def _whole(self, bucket: list[tuple[str, Tensor]]) -> list[tuple[str, Tensor]]:
        shards = {id(value): value for _, value in bucket if hasattr(value, "ds_id")}
        with peer_lost("gathering weights"), self._gathered(list(shards.values())):
            return [(name, value.detach().clone()) for name, value in bucket]

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
        check_fit(model, self.parameters)
        counts = {int(optimizer.read(name)) for name in optimizer.names() if name.endswith("|step")}
        with torch.no_grad():
            for name, p in self.parameters.items():
                self._set_weight(name, p, model.read(name))
                piece = self._piece(name)
                if piece is None or f"{name}|step" not in optimizer:
                    continue
                state = self._state(piece.flat, float(optimizer.read(f"{name}|step")))
                for key in _MOMENTS:
                    part = optimizer.read(f"{name}|{key}").view(-1)[piece.start : piece.start + piece.length]
                    state[key].view(-1)[piece.offset : piece.offset + piece.length].copy_(part)
        self._set_generators(optimizer, max(counts, default=0))

    def _piece(self, name: str) -> Piece | None:
        """This process's piece of a trained weight; None if it has none of it."""
        p = _linked(self.parameters[name])
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
        piece = self._piece(name)
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
            own = {n: (q.start, q.length) if (q := self._piece(n)) else (0, 0) for n in self.parameters}
            every = self.world.gather(own)
            self._spans = {n: [spans[n] for spans in every] for n in own}
        spans = self._spans[name]
        sent = torch.zeros(max(length for _, length in spans), device=self.policy.device)
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
        piece = self._piece(name)
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
        end = f"|{self.world.rank}" if self.world.size > 1 else ""
        out = {f"rng|cpu{end}": torch.get_rng_state()}
        if self.policy.device.type == "cuda":
            out[f"rng|cuda{end}"] = torch.cuda.get_rng_state(self.policy.device)
        return out

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
                torch.cuda.set_rng_state(state, self.policy.device)


class _WholeGradients(WholeGradients):
    """See Gradients."""

    def total(self) -> list[dict[str, Tensor]]:
        """See Gradients."""
        with peer_lost("gradients beside the step"):
            return super().total()


class _ShardGradients:
    """See Gradients: one function's, in shards, by DeepSpeed's own backward."""

    def __init__(self, engine: DeepSpeedEngine, names: Sequence[str]):
        self._engine = engine
        self._names = names
        engine.begin_aside()

    def add(self, values: Tensor, cotangents: Sequence[Tensor], own: bool) -> None:
        """See Gradients."""
        (cotangent,) = cotangents
        value = (values * cotangent).sum() if own else torch.nan_to_num(values).sum() * 0.0
        self._engine.backward(value, last=False)

    def total(self) -> list[dict[str, Tensor]]:
        """See Gradients."""
        return [self._engine.end_aside(self._names)]


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


class Sharder:
    """Makes a weight into this process's shard of it, before there is an engine. The lead's numbers are everyone's."""

    def __init__(self, settings: EngineConfig, optimizer: OptimizerConfig, world: World):
        deepspeed = load_deepspeed(world, settings.timeout_s)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self._init = deepspeed.zero.Init(config_dict_or_path=deepspeed_config(settings, optimizer, device))

    def __call__(self, weight: nn.Parameter) -> None:
        """Afterwards `weight` holds its shard alone."""
        with peer_lost("loading the model"):
            self._init._convert_to_zero_parameters([weight])


def check_fit(model: TensorFiles, parameters: dict[str, nn.Parameter]) -> None:
    """Raises ValueError when saved weights are not those of this model."""
    odd = sorted(set(model.names()) ^ parameters.keys())
    if odd:
        raise ValueError(f"the checkpoint belongs to another model: it differs in {odd[0]}; use another run.dir")
    for name, p in parameters.items():
        if model.shape(name) != tuple(shape_of(p)):
            raise ValueError(
                f"the checkpoint belongs to another model: {name} is {list(model.shape(name))} there and "
                f"{list(shape_of(p))} here; use another run.dir"
            )


def _numel(value: Tensor) -> int:
    return getattr(value, "ds_numel", value.numel())


# ---------------------------------------------------------------------- DeepSpeed itself


def _linked(p: nn.Parameter) -> Any:
    """A weight with the attributes that DeepSpeed has given it."""
    return p


def load_deepspeed(world: World, timeout_s: float) -> Any:
    """The module, on this run's process group; a process alone gets a group of one, without a port."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("LOCAL_RANK", str(world.local_rank))
    import deepspeed
    import deepspeed.runtime.zero.utils
    from deepspeed.utils import logger

    logger.setLevel("WARNING")
    # at each collective, of names that DeepSpeed uses
    warnings.filterwarnings("ignore", "`torch.distributed.*is deprecated", FutureWarning)
    deepspeed.runtime.zero.utils.warned = True  # of batches, in which it sees no tensors; none of them has a gradient
    # an extension that speeds up CPU processes on one host; compiling it takes minutes, and hangs on a stale lock
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if not dist.is_initialized():
        if world.size > 1:
            raise RuntimeError("the processes of the run have not met: call align.engine.world.join first")
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(
            backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timedelta(seconds=timeout_s)
        )
    if not deepspeed.comm.is_initialized():
        deepspeed.init_distributed(dist_init_required=False, auto_mpi_discovery=False, verbose=False)
    return deepspeed


def deepspeed_config(settings: EngineConfig, optimizer: OptimizerConfig, device: str) -> Json:
    """DeepSpeed's settings for an engine: align's own, and those of engine.deepspeed, which are others."""
    pinned = device == "cuda"
    extra = dict(settings.deepspeed)
    zero: Json = {**extra.pop("zero_optimization", {}), "stage": settings.stage}
    if settings.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": pinned}
    if settings.offload_parameters:
        zero["offload_param"] = {"device": "cpu", "pin_memory": pinned}
    return extra | {
        # micro-batches differ in size and number: align divides the loss and says when a step ends
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        # without ZeRO the engine clips by itself
        "gradient_clipping": (optimizer.max_grad_norm or 0.0) if settings.stage else 0.0,
        "steps_per_print": None,
        "zero_allow_untested_optimizer": True,
        # torch's AdamW also where states are offloaded: DeepSpeed's own is compiled at the first start
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero,
    }


@contextlib.contextmanager
def peer_lost(where: str) -> Iterator[None]:
    """Inside, what torch says of a lost connection becomes a PeerLost that says where."""
    try:
        yield
    except PeerLost:
        raise
    except (RuntimeError, dist.DistError) as error:
        if isinstance(error, dist.DistError) or _LOST.search(str(error)):
            said = " ".join(str(error).split())[:300]
            raise PeerLost(f"at {where}: another process of the run died or did not come ({said})") from error
        raise


# gloo's and NCCL's words; an error of the model itself keeps its own
_LOST = re.compile(r"gloo|NCCL|ProcessGroup|[Cc]onnection (closed|reset|refused)|Timed out waiting|Broken pipe")
