"""Which of DeepSpeed's own settings a user may give, and what offloading needs. Imports nothing heavy."""

from __future__ import annotations

import difflib
from collections.abc import Mapping

from align.jsons import Fields

# DeepSpeed 0.19.8's names that change neither what is computed nor what align sets by itself.
_FREE = (
    "comms_logger",
    "flops_profiler",
    "memory_breakdown",
    "wall_clock_breakdown",
    "zero_optimization",
)
_FREE_ZERO = (
    "allgather_bucket_size",
    "allgather_partitions",
    "contiguous_gradients",
    "log_trace_cache_warnings",
    "overlap_comm",
    "reduce_bucket_size",
    "reduce_scatter",
    "stage3_allgather_sequential",
    "stage3_max_live_parameters",
    "stage3_max_reuse_distance",
    "stage3_model_persistence_threshold",
    "stage3_module_granularity_threshold",
    "stage3_param_persistence_threshold",
    "stage3_prefetch_bucket_size",
    "stage3_use_all_reduce_for_fetch_params",
    "sub_group_size",
    "use_multi_rank_bucket_allreduce",
)
# DeepSpeed's name -> the setting that says it here
_OURS = {
    "activation_checkpointing": "trainer.activation_checkpointing",
    "amp": "trainer.precision",
    "bf16": "trainer.precision",
    "checkpoint": "trainer.save_every",
    "communication_data_type": "trainer.precision",
    "csv_monitor": "log",
    "data_types": "trainer.precision",
    "fp16": "trainer.precision",
    "gradient_accumulation_steps": "trainer.batch_size and trainer.micro_batch_tokens",
    "gradient_clipping": "optimizer.max_grad_norm",
    "optimizer": "optimizer",
    "scheduler": "optimizer.schedule",
    "steps_per_print": "log.console_every",
    "tensorboard": "log.tensorboard",
    "torch_autocast": "trainer.precision",
    "train_batch_size": "trainer.batch_size",
    "train_micro_batch_size_per_gpu": "trainer.micro_batch_tokens",
    "wandb": "log.wandb",
    "zero_allow_untested_optimizer": "optimizer",
    "zero_force_ds_cpu_optimizer": "optimizer",
    "zero_optimization.offload_optimizer": "engine.offload_optimizer",
    "zero_optimization.offload_param": "engine.offload_parameters",
    "zero_optimization.stage": "engine=zero0 to engine=zero3",
}

# Bytes of host memory for a trained weight of a shard: float32 weight, gradient and two moments, and DeepSpeed's
# buffers: stage 3 a copy of the gradient; stages 1 and 2 a copy of the weight and one of the accumulated gradient.
_OFFLOADED = {1: 24, 2: 24, 3: 20}


def check_engine(stage: int | None, offload_optimizer: bool, offload_parameters: bool, extra: Fields) -> None:
    """Raises ValueError for engine settings that cannot be, that have no effect, or that are align's to set."""
    if offload_optimizer and stage not in _OFFLOADED:
        raise ValueError("engine.offload_optimizer=true needs ZeRO stage 1, 2 or 3: use engine=zero2")
    if offload_parameters and stage != 3:
        raise ValueError("engine.offload_parameters=true needs engine=zero3")
    if extra and stage is None:
        raise ValueError(f"engine.deepspeed.{next(iter(extra))} has no effect with engine=local; use engine=zero2")
    for key, value in extra.items():
        if key == "zero_optimization":
            if not isinstance(value, Mapping):
                raise ValueError(f"engine.deepspeed.{key}={value}: must hold settings such as reduce_bucket_size")
            for inner in value:
                _check_name(f"{key}.{inner}")
        else:
            _check_name(key)


def _check_name(name: str) -> None:
    free = [*_FREE, *(f"zero_optimization.{inner}" for inner in _FREE_ZERO)]
    if name in free:
        return
    if name in _OURS:
        raise ValueError(f"engine.deepspeed.{name} is set by align: use {_OURS[name]}")
    near = difflib.get_close_matches(name, [*free, *_OURS], 1, 0.6)
    if not near:
        last = {a.rsplit(".", 1)[-1]: a for a in free}
        near = [last[m] for m in difflib.get_close_matches(name.rsplit(".", 1)[-1], list(last), 1, 0.6)]
    tip = f"; did you mean engine.deepspeed.{near[0]}?" if near else ""
    raise ValueError(f"engine.deepspeed.{name} is not a setting that DeepSpeed takes from here{tip}")


def offload_bytes(
    stage: int, offload_optimizer: bool, offload_parameters: bool, total: int, trained: int, processes: int, here: int
) -> int:
    """Estimated host memory that offloading takes on a node.

    total, trained: numbers of weights in the model and of those that are trained; processes: of the run; here: of
    those on this node. Shards are equal, so that each node holds here / processes of everything.
    """
    need = 0
    if offload_optimizer:
        need += _OFFLOADED[stage] * trained
    if offload_parameters:
        need += 4 * total
    return need * here // processes


def offload_problem(need: int, free: int) -> str:
    """Why a node cannot hold what is offloaded to it, in words; empty if it can. A tenth is left to everything else."""
    if need <= 0.9 * free:
        return ""
    gib = 1 << 30
    return (
        f"offloading needs an estimated {need / gib:.1f} GiB of host memory on a node and {free / gib:.1f} GiB are "
        "free; use more nodes, lora.rank, or engine.offload_optimizer=false engine.offload_parameters=false"
    )
