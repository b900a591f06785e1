"""Whether models can be averaged at all: what headers, configs and tokenizers tell, before a byte is written.

Each refusal is one line that names the two models, what differs and the cure.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from align.averaging.files import EMBEDDINGS, FLOATS, Model, read_json
from align.jsons import Json

# What may differ between runs of one model: provenance, how weights are stored, and dropout, which diversifies runs.
_FREE = (
    "_name_or_path",
    "name_or_path",
    "_model_name_or_path",
    "transformers_version",
    "dtype",
    "torch_dtype",
    "use_cache",
)
_TOKENIZER = ("vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model", "chat_template.jinja")
_SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token", "chat_template", "add_bos_token", "add_eos_token")
# Of reward_model.json: what was measured on held-out answers belongs to one model.
_MEASURED = ("mean", "std", "count")
# What may differ between adapters: the exact mean of their deltas does not need it to be equal.
_FREE_ADAPTER = (
    "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "lora_dropout", "inference_mode",
    "init_lora_weights", "peft_version", "auto_mapping",
)  # fmt: skip
_SPAN = 1 << 22  # bytes compared at once


def agree(models: Sequence[Model], mixed_dtypes: bool) -> list[Model]:
    """The models, ready to be averaged key by key: a redundant copy of a tied head is left out of those that have one.

    mixed_dtypes: the dtype of the result was given, so those of the models may differ. Raises ValueError.
    """
    first = models[0]
    for model in models:
        if model.adapter != first.adapter:
            adapter, full = (model, first) if model.adapter else (first, model)
            raise ValueError(
                f"{adapter.path} is an adapter and {full.path} a whole model; merge the adapter first "
                f"(align average {adapter.path} merge={full.path} out=DIR, if that is its base)"
            )
    for other in models[1:]:
        (_agree_adapter if first.adapter else _agree_config)(first, other)
        _agree_reward(first, other)
        _agree_tokenizer(first.path, other.path)
    if not first.adapter:
        models = _without_tied_copies(models)
    for other in models[1:]:
        _agree_tensors(models[0], other, mixed_dtypes)
    return list(models)


def lora_only(model: Model) -> None:
    """Raises ValueError for an adapter whose delta is not scaling * B A on the weights of its base."""
    config, path = model.config, model.path
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{path} is a {config.get('peft_type')} adapter; only LoRA adapters are averaged")
    for key in (
        "use_dora",
        "lora_bias",
        "use_qalora",
        "target_parameters",
        "trainable_token_indices",
        "alora_invocation_tokens",
    ):
        if config.get(key):
            raise ValueError(
                f"{path}: {key} makes an adapter that is no sum of scaled products; merge each into its base with PEFT "
                "(merge_and_unload) and average the models"
            )
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(("pissa", "olora", "loftq", "corda", "lora_ga")):
        raise ValueError(
            f"{path}: init_lora_weights={start} changed the base weights too; merge each adapter with PEFT and average "
            "the models"
        )


def fresh_reward(form: Json) -> Json:
    """What reward_model.json of an average says: what was measured of one member is not known of it, and left out."""
    return {key: value for key, value in form.items() if key not in _MEASURED}


def _agree_config(first: Model, other: Model) -> None:
    one, two = _flat(first.config), _flat(other.config)
    differing = [
        key
        for key in dict.fromkeys([*one, *two])
        if one.get(key) != two.get(key)
        and key.split(".")[-1] not in _FREE
        and not any(word in key for word in ("dropout", "pdrop"))
    ]
    if not differing:
        return
    for key, cure in (
        ("architectures", "average models of one architecture"),
        ("vocab_size", "models of different vocabularies have no average; resize none, use those of one tokenizer"),
        ("tie_word_embeddings", "one shares its head with the embeddings; save both the same way"),
    ):
        if key in differing:
            raise ValueError(f"{first.path} and {other.path} differ in {key} ({one.get(key)}, {two.get(key)}): {cure}")
    listed = "; ".join(f"{key}: {one.get(key)}, {two.get(key)}" for key in differing[:3])
    more = f" and {len(differing) - 3} more" if len(differing) > 3 else ""
    raise ValueError(
        f"config.json of {first.path} and {other.path} differ ({listed}{more}); average models of one base and shape"
    )


def _flat(config: Json, prefix: str = "") -> Json:
    out: Json = {}
    for key, value in config.items():
        if isinstance(value, dict):
            out |= _flat(value, f"{prefix}{key}.")
        else:
            out[f"{prefix}{key}"] = value
    return out


def _agree_adapter(first: Model, other: Model) -> None:
    for key in dict.fromkeys([*first.config, *other.config]):
        one, two = (_plain(model.config.get(key)) for model in (first, other))
        if one != two and key not in _FREE_ADAPTER:
            raise ValueError(
                f"adapters {first.path} and {other.path} differ in {key} ({one}, {two}); average adapters of one base "
                "and of the same modules"
            )


def _plain(value: object) -> Any:
    """PEFT writes sets as lists in any order; absent, null and empty are the same."""
    return sorted(map(str, value)) if isinstance(value, list) and value else value or None


def _agree_reward(first: Model, other: Model) -> None:
    if (first.reward is None) != (other.reward is None):
        plain, reward = (first, other) if first.reward is None else (other, first)
        raise ValueError(
            f"{reward.path} is a reward model and {plain.path} is not (no reward_model.json); average one sort"
        )
    if first.reward is None or other.reward is None:
        return
    for key in dict.fromkeys([*first.reward, *other.reward]):
        one, two = first.reward.get(key), other.reward.get(key)
        if one != two and key not in _MEASURED:
            raise ValueError(
                f"reward models {first.path} and {other.path} differ in {key} ({one}, {two}); their scores do not mean "
                "the same, average models of one kind"
            )


def _agree_tokenizer(first: Path, other: Path) -> None:
    for name in ("tokenizer.json", *_TOKENIZER):
        one, two = first / name, other / name
        if one.exists() != two.exists():
            have, lack = (first, other) if one.exists() else (other, first)
            raise ValueError(f"{have} has {name} and {lack} has not: copy it there if they share one tokenizer")
        if one.exists() and _digest([one]) != _digest([two]):
            part = _differing_part(one, two) if name == "tokenizer.json" else name
            if part:
                raise ValueError(
                    f"tokenizers of {first} and {other} differ ({part}); average models of one tokenizer and template"
                )
    settings = [
        read_json(p / "tokenizer_config.json") for p in (first, other) if (p / "tokenizer_config.json").exists()
    ]
    for key in _SPECIAL if len(settings) == 2 else ():
        one, two = (_content(s.get(key)) for s in settings)
        if one != two:
            raise ValueError(
                f"tokenizers of {first} and {other} differ ({key}: {str(one)[:60]}, {str(two)[:60]}); average models "
                "of one tokenizer and template"
            )


def _content(token: object) -> Any:
    """A special token is stored as its text or as an object with its text."""
    return token.get("content") if isinstance(token, dict) else token


def _differing_part(one: Path, two: Path) -> str:
    """The section in which two tokenizer.json differ; how a text was last cut or padded does not count."""
    parts = [{k: _digest_text(json.dumps(v, sort_keys=True)) for k, v in read_json(p).items()} for p in (one, two)]
    names = [k for k in dict.fromkeys([*parts[0], *parts[1]]) if k not in ("truncation", "padding")]
    return next((f"tokenizer.json, {k}" for k in names if parts[0].get(k) != parts[1].get(k)), "")


def _digest(paths: Iterable[Path]) -> str:
    total = hashlib.sha256()
    for path in paths:
        with path.open("rb") as stream:
            total.update(hashlib.file_digest(stream, "sha256").digest())
    return total.hexdigest()


def _digest_text(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _without_tied_copies(models: Sequence[Model]) -> list[Model]:
    """Drop lm_head.weight where it repeats the embeddings and another model, tied as well, does not store it."""
    having = ["lm_head.weight" in model.sets["model"] for model in models]
    if all(having) or not any(having):
        return list(models)
    lacking = models[having.index(False)]
    out = []
    for model, has in zip(models, having, strict=True):
        if has:
            if not (_ties(model) and _ties(lacking) and _repeats_embeddings(model)):
                raise ValueError(
                    f"{model.path} stores lm_head.weight of its own and {lacking.path} shares it with the embeddings; "
                    "tie_word_embeddings must be the same: save both the same way"
                )
            kept = {key: entry for key, entry in model.sets["model"].items() if key != "lm_head.weight"}
            model = replace(model, sets=model.sets | {"model": kept})
        out.append(model)
    return out


def _ties(model: Model) -> bool:
    return bool(model.config.get("tie_word_embeddings", False))


def _repeats_embeddings(model: Model) -> bool:
    tensors = model.sets["model"]
    head = tensors["lm_head.weight"]
    same = [e for k, e in tensors.items() if k.endswith(EMBEDDINGS) and (e.shape, e.dtype) == (head.shape, head.dtype)]
    return any(
        all(
            bool((head.read(at, min(at + _SPAN, head.size)) == e.read(at, min(at + _SPAN, e.size))).all())
            for at in range(0, e.size, _SPAN)
        )
        for e in same
    )


def _agree_tensors(first: Model, other: Model, mixed_dtypes: bool) -> None:
    names = f"{first.path} and {other.path}"
    if first.sets.keys() != other.sets.keys():
        extra = sorted(first.sets.keys() ^ other.sets.keys())[0]
        raise ValueError(f"only one of {names} has {extra}.safetensors; average models with the same files")
    for stem, tensors in first.sets.items():
        others = other.sets[stem]
        for mine, theirs, whose in ((tensors, others, first), (others, tensors, other)):
            missing = [key for key in mine if key not in theirs]
            if missing:
                more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
                raise ValueError(
                    f"only {whose.path} of {names} has {missing[0]}{more}; average models of one architecture"
                )
        for key, entry in tensors.items():
            one, two = entry.shape, others[key].shape
            if not _shapes_fit(key, one, two, first.adapter):
                raise ValueError(
                    f"{key} of {names} differs in shape ({list(one)}, {list(two)}); average models of one shape"
                )
            if entry.dtype != others[key].dtype:
                floats = entry.dtype in FLOATS and others[key].dtype in FLOATS
                if not floats or not (mixed_dtypes or first.adapter):
                    cure = "add dtype=float32 to average them anyway" if floats else "average models saved the same way"
                    raise ValueError(f"{key} of {names} differs in dtype ({entry.dtype}, {others[key].dtype}); {cure}")


def _shapes_fit(key: str, one: tuple[int, ...], two: tuple[int, ...], adapter: bool) -> bool:
    """The rank of an adapter, the first axis of A and the last of B, may differ."""
    if adapter and ".lora_" in key:
        is_down = key.rpartition(".lora_")[2].removeprefix("embedding_").startswith("A")
        free = slice(1, None) if is_down else slice(0, 1)
        return len(one) == len(two) and one[free] == two[free]
    return one == two
