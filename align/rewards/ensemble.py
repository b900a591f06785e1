"""Several reward models as one reward component: whole models, adapters on one base, or heads on one trunk."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from align.deferred import torch
from align.jsons import Json, Tokenizer
from align.models.weights import load_model
from align.rewards.base import Conversation, Reward, RewardHost
from align.rewards.combine import Combine, check_combine, check_uncertainty, combined, disagreement, incomplete
from align.rewards.model import RewardModel, by_prompt, count_failures, output_index, positive_limit
from align.rewards.network import FILE, HEAD, RewardNetwork, check_dtype, check_stored, stored_form, stored_head

Form = Literal["whole", "adapter", "head"]


class Ensemble(Reward):
    """M reward models, their scores combined: see align.rewards.combine.

    members: directories, or hub names of whole models; all of one form. Whole: as RewardModel reads them, all in memory
    at the same time. Adapter: a LoRA run's final/ with its reward_model.json and score.safetensors; the base is loaded
    once and the adapters are switched. Head: reward_model.json and score.safetensors alone; one forward for all.
    base: the language model below adapters (null: the one they name) or heads; null for whole models.
    combine: mean, worst, uncertainty or median; coefficient and ddof are read by uncertainty. normalise: each member's
    score less the mean and divided by the deviation that its reward_model.json has of held-out answers.
    output, dtype, max_tokens: as in RewardModel. A completion that one member cannot score has none (incomplete).

    metrics holds the disagreement of the last call: the members' standard deviation, mean over its completions.
    """

    in_process = True

    def __init__(
        self,
        host: RewardHost,
        *,
        members: Sequence[str],
        base: str | None,
        dtype: str,
        combine: Combine,
        coefficient: float,
        ddof: int,
        normalise: bool,
        max_tokens: int,
        output: str | None,
    ):
        form = self.check_keys(
            members=members,
            base=base,
            dtype=dtype,
            combine=combine,
            coefficient=coefficient,
            ddof=ddof,
            max_tokens=max_tokens,
        )
        self.host = host
        self.combine: Combine = combine
        self.coefficient, self.ddof = float(coefficient), ddof
        self._counts: dict[str, int] = Counter()
        self._parts: list[RewardModel | _Shared]
        if form == "whole":
            self._parts = [
                RewardModel(host, path=m, revision=None, dtype=dtype, max_tokens=max_tokens, output=output)
                for m in members
            ]
            forms = [(part.network.form, part.output) for part in self._parts]
        else:
            shared = _Shared(host, members, form, base, dtype, max_tokens, output)
            self._parts = [shared]
            forms = shared.forms
        _check_kinds(members, [f for f, _ in forms], combine)
        scales = [_scale(m, f, k) if normalise else (0.0, 1.0) for m, (f, k) in zip(members, forms, strict=True)]
        self._means, self._deviations = np.array(scales).T[:, :, None]  # [M, 1] each
        self.metrics: dict[str, float] = {}

    @classmethod
    def check_keys(
        cls,
        *,
        members: Sequence[str],
        base: str | None,
        dtype: str,
        combine: Combine,
        coefficient: float,
        ddof: int,
        max_tokens: int,
        **others: object,  # noqa: ARG003
    ) -> Form:
        """See RewardTarget. Returns what all members are."""
        members = _checked(members)
        check_combine(combine)
        check_uncertainty(coefficient, ddof, len(members))
        positive_limit(max_tokens)
        check_dtype(dtype)
        form = _form(members, base)
        for member in members:
            if form == "whole":
                check_stored(member, dtype)
            else:
                _form_of(Path(member))
        return form

    def __call__(self, conversations: Sequence[Conversation]) -> np.ndarray:
        """See Reward."""
        scores = self.member_scores(conversations)
        missing = int(incomplete(scores).sum())
        if missing:
            count_failures(self._counts, "incomplete", missing, "a member has no score", self.host)
        spread = disagreement(scores)
        known = spread[np.isfinite(spread)]
        self.metrics = {"disagreement": float(known.mean())} if len(known) else {}
        return combined(scores, self.combine, self.coefficient, self.ddof)

    def member_scores(self, conversations: Sequence[Conversation]) -> np.ndarray:
        """Scores [M, N] float64 of the members, normalised if that is set; NaN where one has none."""
        if isinstance(self._parts[0], _Shared):
            scores = self._parts[0].member_scores(conversations)
        else:
            scores = np.stack([part(conversations) for part in self._parts])
        return (scores - self._means) / self._deviations

    @property
    def counts(self) -> dict[str, int]:
        """Completions without a score (incomplete), and the members' own reasons, added over their forwards."""
        total = Counter(self._counts)
        for part in self._parts:
            total.update(part.counts)
        return total

    def close(self) -> None:
        """Give up the models' memory."""
        for part in self._parts:
            part.close()


class _Shared(RewardModel):
    """Members on one trunk, their heads stacked to one with M outputs."""

    def __init__(
        self,
        host: RewardHost,
        members: Sequence[str],
        form: Form,
        base: str | None,
        dtype: str,
        max_tokens: int,
        output: str | None,
    ):
        from align.models.policy import ScoreHead, Scorer, choose_layout, with_adapters

        self.host = host
        self.max_tokens = max_tokens
        self.counts: dict[str, int] = Counter()
        directories = [Path(m) for m in members]
        forms = [_form_of(d) for d in directories]
        path = base or _base(directories)
        lm = _trunk(path, dtype)
        tokenizer = _tokenizer(directories, path)
        layout, why = choose_layout(lm, "auto", 0.0)
        if "not causal" in why:
            raise ValueError(f"{path}: {why}; reward models that read in both directions are not supported")
        head = ScoreHead(lm.config.get_text_config().hidden_size, len(members))
        self.forms: list[tuple[Json, int]] = []
        for m, (directory, stored) in enumerate(zip(directories, forms, strict=True)):
            weight = _head_weight(directory, stored, path, head.score.in_features)
            self.forms.append((stored, output_index(stored, output)))
            with torch.no_grad():
                head.score.weight[m] = weight[self.forms[m][1]]
        self._adapters = [f"member_{m}" for m in range(1, len(members) + 1)] if form == "adapter" else []
        model = with_adapters(lm, directories, self._adapters) if self._adapters else lm
        model = model.to(host.device).eval().requires_grad_(False)
        network = Scorer(model, layout, head.requires_grad_(False)).eval()
        stacked = {
            "kind": "attributes",
            "outputs": [f"member_{m}" for m in range(1, len(members) + 1)],
            "prompts": _prompts(directories, forms),
        }
        self._network = RewardNetwork(tokenizer, network, stacked, True, host.device)

    def member_scores(self, conversations: Sequence[Conversation]) -> np.ndarray:
        """[M, N]; NaN where a member has none."""
        if not self._adapters:
            return self._table(conversations)
        rows: list[np.ndarray] = []
        model: Any = self.network.network.model  # a PEFT model
        for m, name in enumerate(self._adapters):
            model.set_adapter(name, inference_mode=True)
            rows.append(self._table(conversations)[m])
        return np.stack(rows)

    def _table(self, conversations: Sequence[Conversation]) -> np.ndarray:
        """The stacked head's outputs [M, N] of the trunk as it is now."""
        out = np.full((len(self.network.outputs), len(conversations)), np.nan)
        for group, found in zip(by_prompt(conversations), self.outputs(conversations)[0], strict=True):
            out[:, group] = found.T
        return out


def _checked(members: object) -> list[str]:
    if isinstance(members, str) or not isinstance(members, Sequence) or not all(isinstance(m, str) for m in members):
        raise ValueError(f"members={members}: must be a list of directories, members=[DIR,DIR,...]")
    if len(members) < 2:
        raise ValueError(f"members={list(members)}: an ensemble has at least two; use reward=model for one")
    twice = [m for m, n in Counter(str(Path(m)) for m in members).items() if n > 1]
    if twice:
        raise ValueError(f"members: {twice[0]} stands twice; name each model once")
    return list(members)


def _form(members: Sequence[str], base: str | None) -> Form:
    """What all members are. Raises ValueError if they are not all the same, or base does not go with it."""
    forms: dict[str, Form] = {}
    for member in members:
        directory = Path(member)
        if (directory / "adapter_config.json").is_file():
            forms[member] = "adapter"
        elif (directory / HEAD).is_file() and not (directory / "config.json").is_file():
            forms[member] = "head"
        else:
            forms[member] = "whole"
    first = forms[members[0]]
    other = next((m for m in members if forms[m] != first), None)
    if other is not None:
        raise ValueError(f"members: {members[0]} is a {first} and {other} a {forms[other]}; give members of one form")
    if first == "head" and base is None:
        raise ValueError("base is missing: members that are heads alone need the model that they belong to")
    if first == "whole" and base is not None:
        raise ValueError(f"base={base} has no effect: the members are whole models; remove it")
    return first


def _form_of(directory: Path) -> Json:
    form = stored_form(directory)
    if form is None:
        raise ValueError(f"{directory}: has no {FILE}; give a directory that align wrote")
    return form


def _prompts(directories: Sequence[Path], forms: Sequence[Json]) -> str | None:
    """How the members read a prompt that is a text. Raises ValueError unless they read it alike."""
    read = [form.get("prompts") for form in forms]
    other = next((i for i, prompts in enumerate(read) if (prompts == "chat") != (read[0] == "chat")), None)
    if other is not None:
        raise ValueError(
            f"members: {directories[0]} was trained on prompts={read[0]} and {directories[other]} on "
            f"prompts={read[other]}; they share one forward, so give members that read a prompt alike"
        )
    return read[0]


def _base(directories: Sequence[Path]) -> str:
    """The model that all adapters say they belong to."""
    named = [json.loads((d / "adapter_config.json").read_text())["base_model_name_or_path"] for d in directories]
    if len(set(named)) > 1:
        raise ValueError(
            f"members: their adapters belong to {' and '.join(sorted(map(str, set(named))))}; give members of one "
            "base, or base=DIR if these are the same model"
        )
    return named[0]


def _trunk(path: str, dtype: str) -> Any:
    """The language model that the members share. Raises ValueError."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    wanted = dtype if dtype == "auto" else getattr(torch, dtype)
    try:
        return load_model(AutoModelForCausalLM, path, path, dtype=wanted, use_safetensors=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"the model {path} that the members belong to cannot be loaded ({' '.join(str(error).split())[:200]}); "
            "give base=DIR"
        ) from error


def _head_weight(directory: Path, form: Json, path: str, width: int) -> torch.Tensor:
    """A member's head [its outputs, width]. Raises ValueError for one that does not fit the trunk at `path`."""
    weight = stored_head(directory)["score.weight"]
    if tuple(weight.shape) != (len(form["outputs"]), width):
        raise ValueError(
            f"{directory}: its head is {tuple(weight.shape)}; with {path} and its outputs it must be "
            f"{(len(form['outputs']), width)}"
        )
    if form["kind"] in ("general_preference", "pal"):
        raise ValueError(f"{directory}: a {form['kind']} model gives no single score; give whole models")
    return weight


def _tokenizer(directories: Sequence[Path], base: str) -> Tokenizer:
    """The members', which must be the same, or if they have none that of the base."""
    from transformers import AutoTokenizer

    found = [d for d in directories if (d / "tokenizer_config.json").is_file()]
    loaded = [AutoTokenizer.from_pretrained(str(d), trust_remote_code=False) for d in (found or [base])]
    first = loaded[0]
    for directory, tokenizer in zip(found, loaded, strict=False):
        if tokenizer.chat_template != first.chat_template or tokenizer.get_vocab() != first.get_vocab():
            raise ValueError(f"members: {found[0]} and {directory} have different tokenizers; give members of one base")
    if not first.chat_template:
        where = found[0] if found else base
        raise ValueError(f"{where}: its tokenizer has no chat template; put a chat_template.jinja beside it")
    return first


def _check_kinds(members: Sequence[str], forms: Sequence[Json], combine: str) -> None:
    """Raises ValueError for members whose scores do not mean the same, or for costs where it matters what is bad."""
    costs = [form["kind"] == "cost" for form in forms]
    if any(costs) and not all(costs):
        raise ValueError(
            f"members: {members[costs.index(True)]} is a cost model and {members[costs.index(False)]} is not; "
            "give members of one kind"
        )
    if all(costs) and combine in ("worst", "uncertainty"):
        raise ValueError(f"combine={combine}: of costs high is bad; use mean or median")


def _scale(member: str, form: Json, output: int) -> tuple[float, float]:
    """Mean and deviation of an output on held-out answers."""
    mean, std = (np.atleast_1d(form.get(key, np.nan)).astype(float) for key in ("mean", "std"))
    if len(mean) <= output or len(std) <= output or not np.isfinite(mean[output]) or not 0 < std[output] < np.inf:
        raise ValueError(
            f"{member}: normalise=true needs mean and std in its {FILE}; train it with data.heldout, or leave it false"
        )
    return float(mean[output]), float(std[output])
