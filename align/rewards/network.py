"""Reward models on disk: what a run writes to final/, and the network that scoring reads from there or from the hub.

A directory with reward_model.json is one of ours: trained up to the end of turn, so it is read there. Any other is a
sequence classification model in Hugging Face format, read at the last token that its chat template writes.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from align.config import HeadConfig
from align.data.chat import render, render_text, stop_ids
from align.data.sources import BadRow
from align.deferred import Tensor, nn, no_grad, torch
from align.jsons import Fields, Json, Tokenizer
from align.models.pretrained import check_place
from align.models.weights import check_finite, check_tokens, load_classifier, load_model
from align.packing import micro_batches, num_tokens, pack_groups, to_device
from align.rewards.worker import resolve
from align.types import Layout, Row

if TYPE_CHECKING:
    from align.models.policy import Scorer

FILE = "reward_model.json"
HEAD = "score.safetensors"  # beside a LoRA adapter: the head's weight [D, H]
REST = "head.safetensors"  # what a head has beyond that


# ---------------------------------------------------------------------- heads


def new_head(objective: Any, width: int, settings: HeadConfig, seed: int) -> nn.Module:
    """The head that an objective trains, for hidden states of `width`: its own by make_head, else a linear one.

    Drawn from `seed`, or read from settings.path. Raises ValueError for a head of another shape.
    """
    from align.models.policy import ScoreHead

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = objective.make_head(width)
        if head is None:
            head = ScoreHead(width, len(objective.outputs), objective.gated, settings.dropout)
    if settings.path is not None:
        _fill(head, stored_head(Path(settings.path)), f"head.path={settings.path}")
    return head


def stored_head(directory: Path) -> dict[str, Tensor]:
    """The head's tensors of a saved reward model, by the names they have in it. Raises ValueError if it has none."""
    out = _tensors(directory / REST) if (directory / REST).is_file() else {}
    if (directory / HEAD).is_file():
        return out | {"score.weight": _tensors(directory / HEAD)["weight"]}
    index = directory / "model.safetensors.index.json"
    name = "model.safetensors"
    if index.is_file():
        name = json.loads(index.read_text())["weight_map"].get("score.weight", name)
    found = _tensors(directory / name, ("score.weight",)) if (directory / name).is_file() else {}
    if not found and not out:
        raise ValueError(f"{directory}: holds no head of a reward model (score.weight)")
    return out | found


def _fill(head: nn.Module, tensors: Mapping[str, Tensor], where: str) -> None:
    own = head.state_dict()
    for name, value in own.items():
        shape = tuple(tensors[name].shape) if name in tensors else None
        if shape != tuple(value.shape):
            raise ValueError(f"{where}: its head has {name} {shape}, here it is {tuple(value.shape)}")
    check_finite(where, tensors.items())
    head.load_state_dict({name: tensors[name].to(value.dtype) for name, value in own.items()})


def _tensors(path: Path, names: Sequence[str] | None = None) -> dict[str, Tensor]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            return {k: file.get_tensor(k) for k in file.keys() if names is None or k in names}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error})") from error


# ---------------------------------------------------------------------- writing


def check_classes(config: object, name: str) -> None:
    """Raises ValueError for an architecture that transformers cannot load again with a score head."""
    from transformers import AutoModelForSequenceClassification

    if type(config) not in AutoModelForSequenceClassification._model_mapping:
        raise ValueError(f"{name}: transformers has no sequence classification model for {type(config).__name__}")


def write(network: Scorer, form: Fields, tokenizer: Tokenizer, merge: bool, directory: Path) -> None:
    """Weights and reward_model.json: a sequence classification model, or with LoRA and without `merge` the adapter
    and its head. form: kind, outputs, and what is needed to score."""
    from safetensors.torch import save_file

    from align.models.policy import is_peft

    tensors = {k: v.detach().cpu().contiguous() for k, v in network.head.state_dict().items()}
    score = tensors.pop("score.weight", None)
    if is_peft(network.model) and not merge:
        network.model.save_pretrained(str(directory))
        if score is not None:
            save_file({"weight": score}, directory / HEAD)
    else:
        # merging changes the weights in place; the run's own stay as they are
        lm = copy.deepcopy(network.model).merge_and_unload() if is_peft(network.model) else network.model
        _classifier(lm, score, form, tokenizer).save_pretrained(directory)
    if tensors:
        save_file(tensors, directory / REST)
    (directory / FILE).write_text(json.dumps(dict(form), indent=1) + "\n")


def _classifier(lm: Any, score: Tensor | None, form: Fields, tokenizer: Tokenizer) -> Any:
    """The sequence classification model of a language model's trunk, its tensors not copied."""
    from transformers import AutoModelForSequenceClassification

    from align.models.policy import trunk_of

    config = copy.deepcopy(lm.config)
    names = form["outputs"]
    config.num_labels = len(names)
    config.id2label = dict(enumerate(names))
    config.label2id = {name: i for i, name in enumerate(names)}
    config.pad_token_id = _padding(tokenizer)
    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(config)
    setattr(model, model.base_model_prefix, trunk_of(lm))
    model.score = nn.Linear(model.score.in_features, len(names), bias=False)
    with torch.no_grad():
        # a head of several layers lies in head.safetensors; what stands here then is not used
        model.score.weight.zero_() if score is None else model.score.weight.copy_(score)
    return model


def _padding(tokenizer: Tokenizer) -> int | None:
    """The padding's id for transformers' classifiers, which read the last token that is another: None if it also ends a
    turn. They then read the last token of one sequence and refuse several, where an id would have them read too early.
    """
    return next(iter({tokenizer.pad_token_id}.difference(stop_ids(tokenizer, None))), None)


# ---------------------------------------------------------------------- reading


@dataclass
class RewardNetwork:
    """A saved reward model, loaded. form: what reward_model.json says; of other models what stands in for it."""

    tokenizer: Tokenizer
    network: Scorer
    form: Json
    ours: bool
    device: torch.device | str = "cpu"
    name: str = "the reward model"  # for messages
    counts: dict[str, int] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        """bradley_terry, ranked_list, cost, attributes, general_preference, ..."""
        return self.form["kind"]

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of the head's D outputs."""
        return tuple(self.form["outputs"])

    def row(self, prompt: Any, completion: Any, tools: Any = None) -> Row:
        """A conversation as the model was trained to read it; of ours, the first token after the prompt is its target.

        prompt, completion: both texts, or both lists of messages. Texts are a user's message and the answer to it for a
        model that was trained on chats only. Raises BadRow as align.data.chat does.
        """
        if isinstance(prompt, str) and (not self.ours or self.form.get("prompts") == "chat"):
            prompt, completion = [{"role": "user", "content": prompt}], [{"role": "assistant", "content": completion}]
        if not self.ours and not isinstance(prompt, str):  # all that its template writes, a line feed at the end too
            text = self.tokenizer.apply_chat_template([*prompt, *completion], tools=tools, tokenize=False)
            # the template has written what a sequence begins with
            ids = np.array(self.tokenizer(text, add_special_tokens=False)["input_ids"], dtype=np.int32)
            return Row(ids, np.zeros(len(ids), dtype=bool))
        if isinstance(prompt, str):
            found = render_text(self.tokenizer, prompt, completion, True)
        else:
            found = render(self.tokenizer, [*prompt, *completion], tools=tools, first_target=len(prompt))
        targets = np.zeros(len(found.row.token_ids), dtype=bool)
        targets[found.prompt_length] = True
        return Row(found.row.token_ids, targets)

    def check_tokens(self, rows: Iterable[Row]) -> None:
        """Raises ValueError if rows hold a token that the model does not have."""
        size = self.network.causal_lm.get_input_embeddings().weight.shape[0]
        check_tokens(self.name, self.tokenizer, size, (row.token_ids for row in rows))

    @no_grad
    def scores(
        self,
        groups: Sequence[Sequence[Row]],
        max_tokens: int,
        check: Callable[[], None] = lambda: None,
        autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> tuple[list[np.ndarray], list[np.ndarray] | None]:
        """Outputs [R, D] float64 of the rows of each group, which begin alike, and their gates if it has some.

        max_tokens: of a forward; a longer row goes alone.
        """
        network = self.network.eval()
        self.check_tokens(row for rows in groups for row in rows)
        parts = [(g, row) for g, rows in enumerate(groups) for row in _split(rows, network.layout, max_tokens)]
        out: list[list[np.ndarray]] = [[] for _ in groups]
        gates: list[list[np.ndarray]] = [[] for _ in groups]
        needs = frozenset({"gates"} if self.form.get("gated") else ())
        chunks = [rows for _, rows in parts]
        budget = max([max_tokens, *(_cost(rows, network.layout) for rows in chunks)])
        found: dict[int, tuple[np.ndarray, np.ndarray | None]] = {}
        for part in micro_batches(chunks, [""] * len(chunks), network.layout, budget):
            check()
            batch = to_device(pack_groups([chunks[i] for i in part], network.layout, [""] * len(part)), network.device)
            with autocast():
                stats = network(batch, needs)
            borders = np.cumsum([len(chunks[i]) for i in part])[:-1]
            values = np.split(_array(stats.scores), borders)
            second = np.split(_array(stats.extras["gates"]), borders) if needs else [None] * len(part)
            found |= {i: (v, g) for i, v, g in zip(part, values, second, strict=True)}
        for i, (group, _) in enumerate(parts):
            out[group].append(found[i][0])
            if found[i][1] is not None:
                gates[group].append(found[i][1])  # type: ignore[arg-type]
        joined = [np.concatenate(rows) if rows else np.zeros((0, len(self.outputs))) for rows in out]
        return joined, [np.concatenate(rows) for rows in gates] if needs else None


def _split(rows: Sequence[Row], layout: Layout, max_tokens: int) -> list[list[Row]]:
    """A group in parts that fit a forward, as long as one row does."""
    parts: list[list[Row]] = []
    for row in rows:
        if parts and _cost([*parts[-1], row], layout) <= max_tokens:
            parts[-1].append(row)
        else:
            parts.append([row])
    return parts


def _cost(rows: Sequence[Row], layout: Layout) -> int:
    return len(rows) * max(len(r.token_ids) for r in rows) if layout == "padded" else num_tokens(rows, layout)


def _array(values: Tensor | None) -> np.ndarray:
    assert values is not None
    return values.double().cpu().numpy()


def load(
    path: str, revision: str | None = None, dtype: str = "auto", device: torch.device | str = "cpu"
) -> RewardNetwork:
    """A reward model by its directory or its name on the hub; see configs/reward/model.yaml.

    Raises ValueError for one without a chat template, without trained head, or whose attention is not causal.
    """
    from transformers import AutoTokenizer
    from transformers.utils import logging

    from align.models.policy import Scorer, base_model, choose_layout

    logging.disable_progress_bar()
    form = check_stored(path, dtype)
    directory = Path(path)
    adapter = (directory / "adapter_config.json").is_file()
    tokenizer = AutoTokenizer.from_pretrained(path, revision=revision, trust_remote_code=False)
    if not tokenizer.chat_template:
        raise ValueError(f"path={path}: its tokenizer has no chat template; put a chat_template.jinja beside it")
    model, linear = _adapted(directory, dtype) if adapter else _whole(path, revision, dtype, form)
    model = model.to(device).eval().requires_grad_(False)
    head = _head(directory, form, model, linear)
    if form is None:
        form = {"kind": "bradley_terry", "outputs": ["reward"]}
    layout, why = choose_layout(base_model(model), "auto", 0.0)
    if "not causal" in why:
        raise ValueError(f"path={path}: {why}; reward models that read in both directions are not supported")
    network = Scorer(model, layout, head.requires_grad_(False)).eval()
    out = RewardNetwork(tokenizer, network, form, (directory / FILE).is_file(), device, f"path={path}")
    with suppress(BadRow):  # a template that cannot write this has nothing to be checked before it is asked
        out.check_tokens([out.row([{"role": "user", "content": "?"}], [{"role": "assistant", "content": "!"}])])
    return out


def check_stored(path: str, dtype: str) -> Json | None:
    """What load refuses before it loads anything; returns what reward_model.json says, None without one."""
    check_dtype(dtype)
    check_place("path", path)
    directory = Path(path)
    if directory.is_dir() and not any(directory.glob("*config.json")):
        raise ValueError(
            f"path={path}: holds no model (no config.json); give a run's final/ or a directory in its form"
        )
    form = stored_form(directory)
    if form is None and (directory / "adapter_config.json").is_file():
        raise ValueError(f"path={path}: is an adapter without {FILE}; give one that align trained, or a whole model")
    return form


def check_dtype(dtype: str) -> None:
    """Raises ValueError for another than a model's own, float32 and bfloat16."""
    if dtype not in ("auto", "float32", "bfloat16"):
        raise ValueError(f"dtype={dtype}: must be one of auto, float32, bfloat16")


def stored_form(directory: Path) -> Json | None:
    """What reward_model.json says; None without one. Raises ValueError for a damaged one."""
    if not (directory / FILE).is_file():
        return None
    try:
        form = json.loads((directory / FILE).read_text(encoding="utf-8"))
        if not isinstance(form["kind"], str) or not form["outputs"]:
            raise ValueError("kind and outputs are missing")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{directory / FILE} is damaged ({error})") from error
    return form


def _adapted(directory: Path, dtype: str) -> tuple[Any, None]:
    from transformers import AutoModelForCausalLM

    from align.models.policy import with_adapter

    base = json.loads((directory / "adapter_config.json").read_text())["base_model_name_or_path"]
    if not base:  # made in memory, as model=tiny is
        raise ValueError(f"path={directory}: its adapter does not say which model it belongs to; train with merge=true")
    try:
        wanted = dtype if dtype == "auto" else getattr(torch, dtype)
        lm = load_model(AutoModelForCausalLM, base, base, dtype=wanted, use_safetensors=True)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"path={directory}: the model {base} that its adapter belongs to cannot be loaded "
            f"({' '.join(str(error).split())[:200]}); train with merge=true to be independent of it"
        ) from error
    return with_adapter(lm, str(directory)), None


def _whole(path: str, revision: str | None, dtype: str, form: Json | None) -> tuple[Any, nn.Linear]:
    from transformers import AutoConfig, AutoModelForSequenceClassification

    config = AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=False)
    if form is None and config.num_labels != 1:
        raise ValueError(f"path={path}: has {config.num_labels} outputs, a reward model has one (num_labels=1)")
    model = load_classifier(AutoModelForSequenceClassification, path, revision, dtype)
    if not isinstance(getattr(model, "score", None), nn.Linear):
        raise ValueError(f"path={path}: {type(model).__name__} does not score its last token, which is needed here")
    return model, model.score


def _head(directory: Path, form: Json | None, model: Any, linear: nn.Linear | None) -> nn.Module:
    """In float32, whatever the trunk is held in."""
    from align.models.policy import ScoreHead, base_model

    if form is None:
        assert linear is not None
        head = ScoreHead(linear.in_features, linear.out_features)
        head.score = linear.float()
        return head
    width = base_model(model).config.get_text_config().hidden_size
    if "head" in form:  # of several layers; only ours may be named by a file
        if not str(form["head"]).startswith("align."):
            raise ValueError(f"{directory / FILE}: head={form['head']} is none of align's")
        head = resolve(form["head"])(form, width)
    else:
        head = ScoreHead(width, len(form["outputs"]), bool(form.get("gated")))
    _fill(head, stored_head(directory), f"path={directory}")
    return head.float()
