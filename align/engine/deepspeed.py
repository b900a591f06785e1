"""Several processes with DeepSpeed's ZeRO: optimiser states, gradients and weights in shards.

The only file that imports deepspeed, and it does so when an engine is made. DeepSpeed reduces and shards; what the
loss is divided by, when a step ends and what a checkpoint holds stays with align.
"""

from __future__ import annotations

import contextlib
import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from align.config import EngineConfig, OptimizerConfig
from align.engine.base import clipped_norm, parameter_groups
from align.engine.measuring import Gradients, UnshardedGradients, moving
from align.engine.shards import Shards, linked
from align.engine.world import World, peer_lost
from align.jsons import Json
from align.models.policy import Network
from align.types import PackedBatch, Stats

_BUCKET = 1 << 26  # numbers gathered at once: 256 MiB of float32


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
        self._shards = Shards(self.parameters, self.stage, self._zero, self._adamw, world, policy.device, seed)

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

    def gradient_norm(self) -> Tensor:
        """Global norm of the gradients over all processes; they are clipped to optimizer.max_grad_norm."""
        with peer_lost("gradient norm"):
            if self.stage == 0:
                return clipped_norm(self.parameters.values(), self.config.max_grad_norm)
            if self.stage == 3:
                groups = self._zero._get_norm_groups()
            else:
                self._zero._wait_for_offload_copies()
                groups = [self._zero.scaled_global_norm()]
        # DeepSpeed, which has read them itself, writes -1 for what is not finite
        norms = [float(group) for group in groups]
        finite = all(norm >= 0 and math.isfinite(norm) for norm in norms)
        return torch.tensor(math.hypot(*norms) if finite else math.inf, dtype=torch.float64)

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
        return _UnshardedGradients({name: self.parameters[name] for name in names}, count, self.world)

    @contextlib.contextmanager
    def moving(self, along: Mapping[str, Tensor]) -> Iterator[Callable[[float], None]]:
        """See MeasuringEngine."""
        if self.stage < 3:
            with moving(self.parameters, along) as move:
                yield move
            return
        shards = {name: linked(self.parameters[name]).ds_tensor for name in along}
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
            piece = self._shards.piece(name)
            length = 0 if piece is None else piece.length
            out[name] = found[linked(self.parameters[name]).ds_id].detach().view(-1)[:length].float().clone()
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
        """This process's part of a checkpoint."""
        self._shards.write(directory)

    def read(self, directory: Path) -> None:
        """Set weights, moments and generators. Raises ValueError when the checkpoint is of another model."""
        self._shards.read(directory)


class _UnshardedGradients(UnshardedGradients):
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


def _numel(value: Tensor) -> int:
    return getattr(value, "ds_numel", value.numel())


# ---------------------------------------------------------------------- DeepSpeed itself


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
