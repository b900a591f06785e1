"""LoRA adapters: the exact mean of their deltas, as one adapter whose ranks add up or inside their base.

Delta of a module: scaling * B A, scaling alpha / r, with rsLoRA alpha / sqrt(r). The mean of factors is never that of
deltas: B A does not change under B G, G^-1 A, and the mean of factors does.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from align.averaging.combine import Inputs, average_of, by_weights
from align.averaging.files import EMBEDDINGS, Model
from align.averaging.methods import concatenated_factors
from align.averaging.output import Planned
from align.jsons import Fields, Json
from align.tensor_files import CODES

STEM = "adapter_model"
_PREFIX = "base_model.model."
_FACTOR = re.compile(r"^(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<which>[AB])(?:\.weight)?$")


@dataclass(frozen=True)
class Module:
    """The factors of one module: keys, and of each adapter the scaling."""

    name: str  # as PEFT's patterns and the base know it
    down: str
    up: str
    embedding: bool
    ranks: tuple[int, ...]
    scalings: tuple[float, ...]


@dataclass(frozen=True)
class Adapters:
    """Adapters that agree, with one weight each."""

    models: tuple[Model, ...]
    weights: tuple[float, ...]
    limit: int
    dtype: torch.dtype | None

    @cached_property
    def modules(self) -> dict[str, Module]:
        """Every adapted module by its name. Raises ValueError for factors that are no matrices or a wrong rank."""
        keys: dict[str, dict[str, str]] = {}
        for key in self.models[0].sets[STEM]:
            found = _FACTOR.match(key)
            if found:
                keys.setdefault(found["module"].removeprefix(_PREFIX), {})[found["which"]] = key
            elif ".lora_" in key:
                raise ValueError(
                    f"{self.models[0].path}: {key} is no LoRA factor that can be averaged; merge it with PEFT"
                )
        out = {}
        for name, pair in keys.items():
            if pair.keys() != {"A", "B"}:
                raise ValueError(
                    f"{self.models[0].path}: {name} has only one of its two factors; save the adapter again"
                )
            ranks, scalings = zip(*(_rank_and_scaling(m, name, pair["A"], pair["B"]) for m in self.models), strict=True)
            out[name] = Module(name, pair["A"], pair["B"], "lora_embedding_" in pair["A"], ranks, scalings)
        return out

    def factors(self, module: Module) -> tuple[Tensor, Tensor]:
        """A [R, in] and B [out, R] of the mean, R the sum of ranks, scaling 1."""
        down, up = ([_matrix(m, key) for m in self.models] for key in (module.down, module.up))
        return concatenated_factors(down, up, module.scalings, self.weights)

    def delta(self, module: Module, start: int, stop: int, transposed: bool) -> Tensor:
        """Rows start to stop of the mean of the deltas, as the base stores the module's weight."""
        total = None
        for model, weight, scaling in zip(self.models, self.weights, module.scalings, strict=True):
            if weight == 0:
                continue
            down, up = _matrix(model, module.down), _matrix(model, module.up)
            part = down[:, start:stop].T @ up.T if transposed else up[start:stop] @ down
            part = part * (weight * scaling)
            total = part if total is None else total + part
        assert total is not None  # weights sum to 1
        return total

    # ------------------------------------------------------------------ as one adapter

    def config(self) -> Json:
        """adapter_config.json of the mean: every scaling is 1."""
        ranks = {name: sum(module.ranks) for name, module in self.modules.items()}
        common = max(ranks.values())
        pattern = {name: rank for name, rank in ranks.items() if rank != common}
        changed = {
            "r": common, "lora_alpha": common, "rank_pattern": pattern, "alpha_pattern": dict(pattern),
            "use_rslora": False, "init_lora_weights": True,
        }  # fmt: skip
        return self.models[0].config | changed

    def planned(self) -> list[Planned]:
        """The tensors of the mean. Factors are float32 unless a dtype is given: 16 bits would round w * scaling * B."""
        modules = {key: module for module in self.modules.values() for key in (module.down, module.up)}
        out = []
        for key, entry in self.models[0].sets[STEM].items():
            if key not in modules:
                out.append(Planned(key, entry.torch_dtype, entry.shape))
                continue
            rank = sum(modules[key].ranks)
            shape = (rank, entry.shape[1]) if key == modules[key].down else (entry.shape[0], rank)
            out.append(Planned(key, self.dtype or torch.float32, shape))
        return out

    def tensor(self, key: str) -> Iterator[Tensor]:
        """One tensor of the mean; what is no factor is averaged as plain weights."""
        found = _FACTOR.match(key)
        if not found:
            yield from self.plain(STEM, key)
            return
        module = self.modules[found["module"].removeprefix(_PREFIX)]
        yield self.factors(module)[0 if found["which"] == "A" else 1].to(self.dtype or torch.float32).flatten()

    def plain(self, stem: str, key: str, dtype: torch.dtype | None = None) -> Iterator[Tensor]:
        """A tensor that is no factor: the weighted mean."""
        inputs = Inputs(self.models, stem, self.limit)
        stored = self.models[0].sets[stem][key].torch_dtype
        return average_of(inputs, by_weights(self.weights), key, dtype or stored)


@dataclass(frozen=True)
class Merged:
    """The mean of adapters inside their base: base + delta in float64, rounded once."""

    base: Model
    adapters: Adapters
    modules: Mapping[str, Module]
    whole: Mapping[str, tuple[str, str]]  # key of the result -> file and key of a tensor that the adapters replace

    @classmethod
    def of(cls, base: Model, adapters: Adapters) -> Merged:
        """Find each module's weight in the base. Raises ValueError for one that is not there or has another shape."""
        stored = base.sets["model"]
        modules = {}
        for name, module in adapters.modules.items():
            key = f"{name}.weight"
            if key not in stored:
                raise ValueError(
                    f"merge={base.path} has no {key}, which {adapters.models[0].path} adapts; give its base"
                )
            down, up = (adapters.models[0].sets[STEM][k].shape for k in (module.down, module.up))
            shape = (up[0], down[1])
            if stored[key].shape != (shape[::-1] if cls._transposed(module, adapters) else shape):
                raise ValueError(
                    f"merge={base.path}: {key} is {list(stored[key].shape)} and the adapters' delta {list(shape)}; "
                    "give their base"
                )
            modules[key] = module
        whole = {}
        for key in adapters.models[0].sets[STEM]:
            if not _FACTOR.match(key) and ".base_layer." not in key:  # PEFT repeats an adapted embedding's own weight
                whole[key.removeprefix(_PREFIX)] = (STEM, key)
        if "score" in adapters.models[0].sets:
            whole["score.weight"] = ("score", "weight")
        merged = cls(base, adapters, modules, whole)
        tied = [key for key in (*modules, *whole) if key.endswith((*EMBEDDINGS, "lm_head.weight"))]
        if tied and base.config.get("tie_word_embeddings") and not merged.classifier:
            raise ValueError(
                f"merge={base.path} shares {tied[0]} between embeddings and head, and the adapters change one of them; "
                "untie the base first, or leave merge= out"
            )
        return merged

    @property
    def classifier(self) -> bool:
        """Whether a language model becomes a reward model."""
        return "score.weight" in self.whole and "score.weight" not in self.base.sets["model"]

    def planned(self) -> list[Planned]:
        """The tensors of the result: the base's, and the score head in the place of the language model's."""
        out = []
        for key, entry in self.base.sets["model"].items():
            if not (self.classifier and key == "lm_head.weight"):
                out.append(Planned(key, self._dtype(key, entry.torch_dtype), entry.shape))
        for key, (stem, name) in self.whole.items():
            if key not in self.base.sets["model"]:
                entry = self.adapters.models[0].sets[stem][name]
                out.append(Planned(key, self._dtype(key, entry.torch_dtype), entry.shape))
        return out

    def tensor(self, key: str) -> Iterator[Tensor]:
        """One tensor of the result."""
        if key in self.whole:
            stem, name = self.whole[key]
            entry = self.base.sets["model"].get(key, self.adapters.models[0].sets[stem][name])
            return self.adapters.plain(stem, name, self._dtype(key, entry.torch_dtype))
        inputs = Inputs((self.base,), "model", self.adapters.limit)
        dtype = self._dtype(key, self.base.sets["model"][key].torch_dtype)
        return average_of(inputs, self._with_delta, key, dtype)

    def _with_delta(self, inputs: Inputs, key: str) -> Iterator[Tensor]:
        module = self.modules.get(key)
        width = inputs.entries(key)[0].shape[-1] if module else 1
        for start, stop in inputs.spans(key, width):
            (base,) = inputs.read(key, start, stop)
            if module is not None:
                transposed = self._transposed(module, self.adapters)
                delta = self.adapters.delta(module, start // width, stop // width, transposed)
                base = base + delta.flatten()
            yield base

    def _dtype(self, key: str, stored: torch.dtype) -> torch.dtype:
        if self.adapters.dtype is None or key == "score.weight" or not stored.is_floating_point:
            return stored
        return self.adapters.dtype

    @staticmethod
    def _transposed(module: Module, adapters: Adapters) -> bool:
        return module.embedding or bool(adapters.models[0].config.get("fan_in_fan_out"))


def classifier_config(config: Fields, outputs: Sequence[str]) -> Json:
    """config.json of the reward model that a language model with a score head is. Raises ValueError for other bases."""
    names = [name.replace("ForCausalLM", "ForSequenceClassification") for name in config.get("architectures") or []]
    if not names or names == config["architectures"]:
        raise ValueError(
            f"merge=: a base of architecture {config.get('architectures')} takes no score head; give a language model"
        )
    changed: Json = {
        "architectures": names,
        "id2label": {str(i): name for i, name in enumerate(outputs)},
        "label2id": {name: i for i, name in enumerate(outputs)},
    }
    ends = config.get("eos_token_id")
    if config.get("pad_token_id") in (ends if isinstance(ends, list) else [ends]):
        changed["pad_token_id"] = None  # transformers would take the end of a turn for padding
    return dict(config) | changed


def _rank_and_scaling(model: Model, name: str, down: str, up: str) -> tuple[int, float]:
    """Rank and scaling of a module as PEFT reads them from the config."""
    config = model.config
    shapes = model.sets[STEM][down].shape, model.sets[STEM][up].shape
    rank = _of_pattern(config.get("rank_pattern"), name, config["r"])
    alpha = _of_pattern(config.get("alpha_pattern"), name, config["lora_alpha"])
    if any(len(shape) != 2 for shape in shapes):
        raise ValueError(f"{model.path}: {name} is no linear layer or embedding; merge the adapters with PEFT")
    if not shapes[0][0] == shapes[1][1] == rank:
        raise ValueError(
            f"{model.path}: {name} has rank {shapes[0][0]}, its config says {rank}; save the adapter again"
        )
    return rank, alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


def _of_pattern(pattern: Fields | None, name: str, default: object) -> Any:
    """The first entry whose expression matches the end of the module's name."""
    return next((value for key, value in (pattern or {}).items() if re.match(rf"(.*\.)?({key})$", name)), default)


def _matrix(model: Model, key: str) -> Tensor:
    """A whole factor in float64. Factors are small: rank times width."""
    entry = model.sets[STEM][key]
    values = entry.read(0, entry.size)
    if not bool(torch.isfinite(values).all()):
        raise ValueError(f"{model.path}: {key} holds NaN or infinity; leave this adapter out")
    return values.double().view(entry.shape)


def dtype_of(name: str | None) -> torch.dtype | None:
    """A dtype by its name in the settings."""
    if name is None:
        return None
    dtype = getattr(torch, name)
    assert dtype in CODES
    return dtype
