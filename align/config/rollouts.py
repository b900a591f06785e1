"""Settings of our rollouts, with what each may be: asked before anything that draws is imported."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Annotated, TypeVar

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from align.config.limits import above, at_least, one_of, refuse, switch
from align.jsons import Fields

S = TypeVar("S")


@dataclass(frozen=True)
class HFSettings:
    """configs/rollout/hf.yaml"""

    batch_size: Annotated[int, at_least(1)]


@dataclass(frozen=True)
class VLLMSettings:
    """configs/rollout/vllm.yaml"""

    dtype: Annotated[str, one_of("auto", "float32", "bfloat16")]
    max_model_len: Annotated[int | None, at_least(2)]
    max_num_seqs: Annotated[int, at_least(1)]
    max_num_batched_tokens: Annotated[int | None, at_least(1)]
    gpu_memory_utilization: Annotated[float, above(0, at_most=1)]
    cpu_kv_cache_gib: Annotated[float, above(0)]
    enforce_eager: Annotated[bool | str, switch("auto")]
    threads: Annotated[int | None, at_least(1)]
    transfer: Annotated[str, one_of("auto", "file", "ipc")]
    sleep: Annotated[bool | str, switch("auto")]
    start_seconds: Annotated[float, above(0)]
    request_seconds: Annotated[float, above(0)]
    sync_seconds: Annotated[float, above(0)]
    max_restarts: Annotated[int, at_least(0)]
    allow_untested_version: bool


@dataclass(frozen=True)
class ServerSettings:
    """configs/rollout/vllm_server.yaml"""

    urls: list[str]
    directory: str | None
    concurrency: Annotated[int, at_least(1)]
    start_seconds: Annotated[float, at_least(0)]
    connect_seconds: Annotated[float, above(0)]
    request_seconds: Annotated[float, above(0)]
    sync_seconds: Annotated[float, above(0)]
    retries: Annotated[int, at_least(0)]
    allow_untested_version: bool


ROLLOUTS: dict[str, type] = {
    "align.rollout.hf.HFRollout": HFSettings,
    "align.rollout.vllm.VLLMRollout": VLLMSettings,
    "align.rollout.server.VLLMServerRollout": ServerSettings,
}


def settings(cls: type[S], keys: Fields) -> S:
    """The settings that the keys give. Raises ValueError, one line, for one that is missing, unknown or impossible."""
    for field in fields(cls):  # type: ignore[arg-type]
        if field.name not in keys:
            raise ValueError(f"rollout.{field.name} is required: add rollout.{field.name}=...")
    schema = OmegaConf.structured(cls)
    OmegaConf.set_readonly(schema, False)
    try:
        made = OmegaConf.to_object(OmegaConf.merge(schema, keys))
    except OmegaConfBaseException as error:
        told = str(error.msg or error).splitlines()[0]
        raise ValueError(f"rollout.{error.full_key}={keys.get(str(error.full_key))}: {told}") from None
    assert isinstance(made, cls)
    refuse(made, "rollout.")
    return made
