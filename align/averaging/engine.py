"""From a request to a directory: open, compare, then stream the average to its place, whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from align.averaging import output
from align.averaging.adapters import STEM, Adapters, Merged, classifier_config, dtype_of
from align.averaging.arguments import Request
from align.averaging.checks import agree, fresh_reward, lora_only
from align.averaging.combine import Combine, Inputs, Localized, Stock, Weighted, average_of, by_weights, is_weight
from align.averaging.files import Model, open_model, read_json
from align.averaging.methods import block_ratio, metric_weights
from align.averaging.values import values_beside
from align.checkpoint import WriteFailed, atomic_directory, problem
from align.jsons import Json

_GIB, _MIB = 2**30, 2**20


def average(request: Request, say: Callable[[str], None]) -> None:
    """Do what the request says and tell it in lines. Raises ValueError, one line, for all that the user can cure.

    Nothing is written before everything that headers tell has been compared; what fails later leaves nothing behind.
    """
    models, base = _open(request)
    for line in _described(models, request):
        say(line)
    weights = _weights(request, models, say)
    if request.check:
        say("ok: these models can be averaged (NaN and infinity are looked for when weights are read)")
        return
    assert request.out is not None
    requests = [request]
    if request.sweep is not None:
        requests = [
            replace(request, sweep=None, alpha=alpha, out=request.out / f"alpha-{alpha:g}") for alpha in request.sweep
        ]
    _note_duplicates(models, say)
    accounts = [output.account(one, models, weights, base) for one in requests]
    finished = [_finished(_out(one), record) for one, record in zip(requests, accounts, strict=True)]
    for one, record, done in zip(requests, accounts, finished, strict=True):
        out = _out(one)
        if done:
            say(f"{out} holds this average already; nothing to do")
            continue
        try:
            atomic_directory(
                out, partial(_write, request=one, models=models, base=base, weights=weights, record=record)
            )
        except WriteFailed as error:
            raise ValueError(str(error)) from error
        size = sum(path.stat().st_size for path in out.glob("*.safetensors"))
        say(f"written {out}: {one.method} of {len(models)}, {size / _MIB:.1f} MiB of weights")


def _out(request: Request) -> Path:
    assert request.out is not None
    return request.out


def _note_duplicates(models: Sequence[Model], say: Callable[[str], None]) -> None:
    for i, model in enumerate(models):
        duplicate = next((m for m in models[:i] if m.sha256() == model.sha256()), None)
        if duplicate is not None:
            say(f"note: {model.path} holds the same weights as {duplicate.path}")


def _open(request: Request) -> tuple[list[Model], Model | None]:
    """The models, which agree, and the base or what is merged into."""
    models = [open_model(path) for path in request.models]
    adapters = [model for model in models if model.adapter]
    for model in adapters:
        lora_only(model)
    if request.merge is not None and len(adapters) < len(models):
        raise ValueError(
            "merge= has no effect: it adds LoRA adapters to their base, and these are whole models; remove it"
        )
    if adapters and request.method in ("stock", "interpolate", "localize"):
        raise ValueError(
            f"method={request.method} works on whole models; merge each adapter first: align average "
            f"{adapters[0].path} merge=BASE out=DIR"
        )
    mixed = request.dtype is not None
    if request.base is not None:
        base, *models = agree([open_model(request.base), *models], mixed)
        return models, base
    models = agree(models, mixed)
    adapted = Adapters(tuple(models), (1 / len(models),) * len(models), request.max_memory_mib * _MIB, None)
    if adapters and not adapted.modules:
        raise ValueError(f"{models[0].path} adapts no module; save the adapter again")
    if request.merge is None:
        return models, None
    base = open_model(request.merge)
    if base.adapter:
        raise ValueError(f"merge={request.merge} is an adapter itself; give the base model's directory")
    _merged_config(Merged.of(base, adapted))  # refuses a base that does not fit
    return models, base


def _described(models: Sequence[Model], request: Request) -> list[str]:
    first = models[0]
    entries = [entry for tensors in first.sets.values() for entry in tensors.values()]
    dtypes = ", ".join(sorted({str(e.torch_dtype).removeprefix("torch.") for e in entries}))
    millions = sum(e.size for e in entries) / 1e6
    kind = "LoRA adapters" if first.adapter else "/".join(first.config.get("architectures") or ["models"])
    reward = f", reward model ({first.reward.get('kind')})" if first.reward is not None else ""
    vocabulary = f", vocabulary {first.config['vocab_size']}" if "vocab_size" in first.config else ""
    template = "tokenizer.json" if (first.path / "tokenizer.json").exists() else "none"
    lines = [
        f"{len(models)} x {kind}{reward}: {len(entries)} tensors, {millions:.1f} M numbers ({dtypes}){vocabulary}",
        f"same tensors, shapes, configuration and tokenizer ({template})",
    ]
    if len(models) == 1 and request.method == "uniform" and request.merge is None:
        lines.append("note: the average of one model is that model")
    return lines


def _weights(request: Request, models: Sequence[Model], say: Callable[[str], None]) -> list[float] | None:
    """One number a model; None where the weight depends on the tensor."""
    if request.method == "uniform":
        return [1 / len(models)] * len(models)
    if request.method == "weighted":
        assert request.weights is not None
        return list(request.weights)
    if request.method in ("loss", "steps"):
        assert request.penalty is not None
        values = request.values or values_beside(request.models, request.method)
        weights = metric_weights(values, request.penalty, request.method)
        listed = ", ".join(f"{m.path}: {v:g} -> {w:.4f}" for m, v, w in zip(models, values, weights, strict=True))
        say(f"weights by {request.method}: {listed}")
        return weights
    return None


def _finished(out: Path, record: Json) -> bool:
    """Whether `out` is this very average, undamaged. Raises ValueError for anything else that stands there."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    file = out / output.ACCOUNT
    if file.exists() and output.identity(read_json(file)) == output.identity(json.loads(json.dumps(record))):
        fault = problem(out)
        if not fault:
            return True
        raise ValueError(f"out={out} is this average but damaged ({fault}); remove it and give the same command again")
    raise ValueError(f"out={out} exists and is not this average; give another directory or remove it")


def _write(
    directory: Path,
    request: Request,
    models: Sequence[Model],
    base: Model | None,
    weights: Sequence[float] | None,
    record: Json,
) -> None:
    limit = request.max_memory_mib * _MIB
    first = models[0]
    if first.adapter:
        assert weights is not None
        adapters = Adapters(tuple(models), tuple(weights), limit, dtype_of(request.dtype))
        if base is None:
            _write_adapter(directory, adapters)
        else:
            _write_merged(directory, request, Merged.of(base, adapters))
        rest = [stem for stem in first.sets if stem == "head" or (stem == "score" and base is None)]
        combine = by_weights(weights)
    else:
        group = tuple(models) if base is None else (base, *models)
        inputs = {stem: Inputs(group, stem, limit) for stem in first.sets}
        combine = _combine(request, list(inputs.values()), weights)
        _write_set(directory, request, inputs["model"], combine)
        _write_config(directory, request, first.config)
        rest = [stem for stem in first.sets if stem != "model"]
    for stem in rest:  # what belongs to a head keeps its own dtype
        group = tuple(models) if base is None or first.adapter else (base, *models)
        _write_set(directory, request, Inputs(group, stem, limit), combine)
    output.copy_beside(base if first.adapter and base is not None else first, directory)
    if first.adapter and base is not None:
        output.copy_beside(first, directory)
    if first.reward is not None:
        output.write_json(directory / "reward_model.json", fresh_reward(first.reward))
    output.write_json(directory / output.ACCOUNT, record)
    text = output.card(record, first.adapter and base is None, first.reward is not None)
    (directory / "README.md").write_text(text, encoding="utf-8")


def _combine(request: Request, inputs: Sequence[Inputs], weights: Sequence[float] | None) -> Combine:
    if weights is not None:
        return by_weights(weights)
    if request.method == "stock":
        return Stock(request.filter_wise, request.clamp)
    if request.method == "localize":
        assert request.density is not None
        return Localized.of(inputs, request.density)
    if request.alpha is not None:
        alpha = request.alpha
        return Weighted(lambda _: (alpha, 1 - alpha))
    cuts, alphas, other = request.blocks, request.alphas, request.other
    assert cuts is not None
    assert alphas is not None
    assert other is not None

    def both(key: str) -> tuple[float, float]:
        ratio = block_ratio(key, cuts, alphas, other)
        return ratio, 1 - ratio

    return Weighted(both)


def _write_set(directory: Path, request: Request, inputs: Inputs, combine: Combine) -> None:
    """One set of tensors in the order in which the first model stores them."""
    first = inputs.models[0].sets[inputs.stem]
    wanted = dtype_of(request.dtype)
    dtypes = {}
    for key, entry in first.items():
        # a score head computes in float32, whatever the trunk is stored in
        cast = wanted is not None and inputs.stem == "model" and is_weight(key, entry) and not key.startswith("score.")
        dtypes[key] = wanted if cast else entry.torch_dtype
    planned = [output.Planned(key, dtypes[key], first[key].shape) for key in first]
    limit = request.shard_gib * _GIB if inputs.stem == "model" else None
    output.write_tensors(
        directory, inputs.stem, planned, lambda key: average_of(inputs, combine, key, dtypes[key]), limit
    )


def _write_adapter(directory: Path, adapters: Adapters) -> None:
    output.write_tensors(directory, STEM, adapters.planned(), adapters.tensor, None)
    output.write_json(directory / "adapter_config.json", adapters.config())


def _write_merged(directory: Path, request: Request, merged: Merged) -> None:
    output.write_tensors(directory, "model", merged.planned(), merged.tensor, request.shard_gib * _GIB)
    _write_config(directory, request, _merged_config(merged))


def _merged_config(merged: Merged) -> Json:
    if not merged.classifier:
        return merged.base.config
    first = merged.adapters.models[0]
    stem, key = merged.whole["score.weight"]
    labels = [f"LABEL_{i}" for i in range(first.sets[stem][key].shape[0])]
    return classifier_config(merged.base.config, (first.reward or {}).get("outputs") or labels)


def _write_config(directory: Path, request: Request, config: Json) -> None:
    if request.dtype is not None:
        old = {key for key in ("dtype", "torch_dtype") if key in config} or {"dtype"}
        config = config | dict.fromkeys(old, request.dtype)
    output.write_json(directory / "config.json", config)
