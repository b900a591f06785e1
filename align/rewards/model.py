"""Reward models in the trainer's process: one of its own, or an adapter on the policy's weights with a score head."""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from align.data.chat import render
from align.data.sources import BadRow
from align.deferred import Tensor, no_grad, torch
from align.jsons import Fields, Json, Tokenizer
from align.rewards.base import NEEDS_LORA, Conversation, Reward, RewardHost
from align.rewards.network import FILE, RewardNetwork, check_stored, load
from align.rewards.preferences import mean_preferences
from align.types import Row

Trunk = Callable[[Tensor, Tensor], Tensor]  # ids, mask [B, L] -> hidden states [B, L, H]


class RewardModel(Reward):
    """A reward model of ours, a run's final/, or a sequence classification model with one output, in Hugging Face
    format with safetensors.

    The conversation is written in the chat template of the model's own tokenizer, the completion as the assistant's
    whole turn; the completions of a prompt share its tokens. output: which of several to give, null if there is one.
    A general preference model gives how much a completion is preferred to the prompt's others on average. A cost model
    gives the cost, positive for harm. dtype: auto (as stored), float32 or bfloat16; the head computes in float32.
    max_tokens: a longer conversation has no score (reason too_long).
    """

    in_process = True

    def __init__(
        self,
        host: RewardHost,
        *,
        path: str,
        revision: str | None,
        dtype: str,
        max_tokens: int,
        output: str | None = None,
    ):
        self.host = host
        self.max_tokens = positive_limit(max_tokens)
        self._network: RewardNetwork | None = load(path, revision, dtype, host.device)
        self.output = output_index(self.network.form, output)
        self.counts: dict[str, int] = Counter()

    @classmethod
    def check_keys(cls, *, path: str, dtype: str, max_tokens: int, output: str | None = None, **others: object) -> None:  # noqa: ARG003
        """See RewardTarget."""
        positive_limit(max_tokens)
        form = check_stored(path, dtype)
        if form is not None:
            output_index(form, output)

    @property
    def network(self) -> RewardNetwork:
        """The model, until it is closed."""
        assert self._network is not None
        return self._network

    def __call__(self, conversations: Sequence[Conversation]) -> np.ndarray:
        """See Reward."""
        out = np.full(len(conversations), np.nan)
        outputs, gates = self.outputs(conversations)
        for group, found, gate in zip(by_prompt(conversations), outputs, gates, strict=True):
            known = [k for k, values in enumerate(found) if np.isfinite(values).all()]
            at = [group[k] for k in known]
            if self.network.kind == "general_preference":
                if len(known) > 1:  # one alone is preferred to nothing
                    out[at] = mean_preferences(self.network.form, found[known], None if gate is None else gate[known])
                elif known:
                    count_failures(self.counts, "alone", 1, "the prompt has no other completion", self.host)
            else:
                out[at] = found[known, self.output]
        return out

    def outputs(self, conversations: Sequence[Conversation]) -> tuple[list[np.ndarray], list[np.ndarray | None]]:
        """For the completions of each prompt, in the order of by_prompt, the head's outputs [R, D] and its gates; NaN
        for those that cannot be read."""
        groups = by_prompt(conversations)
        rows = [[self._row(conversations[i]) for i in group] for group in groups]
        found, gates = self.network.scores(
            [[row for row in part if row is not None] for part in rows],
            self.host.micro_batch_tokens,
            self.host.check,
            self.host.autocast,
        )
        width = len(self.network.outputs)
        out = [_placed(part, values, width) for part, values in zip(rows, found, strict=True)]
        broken = sum(int((~np.isfinite(values)).any(1).sum()) for values in found)
        if broken:
            count_failures(self.counts, "not_finite", broken, "the model's score is no finite number", self.host)
        if gates is None:
            return out, [None] * len(out)
        return out, [_placed(part, values, width // 2) for part, values in zip(rows, gates, strict=True)]

    def _row(self, c: Conversation) -> Row | None:
        try:
            if c.messages is None:
                row = self.network.row(c.prompt, c.completion)
            else:
                row = self.network.row(list(c.messages), [{"role": "assistant", "content": c.completion}])
        except BadRow as bad:
            count_failures(self.counts, bad.reason, 1, str(bad), self.host)
            return None
        if len(row.token_ids) > self.max_tokens:
            count_failures(self.counts, "too_long", 1, f"longer than max_tokens={self.max_tokens}", self.host)
            return None
        return row

    def close(self) -> None:
        """Give up the model's memory."""
        self._network = None


def output_index(form: Fields, output: str | None) -> int:
    """Which of the head's outputs is the reward; form: what reward_model.json says. Raises ValueError if that is not
    said, or there is no such output."""
    kind, outputs = form["kind"], tuple(form["outputs"])
    if kind == "pal":
        raise ValueError("a pluralistic model scores for a rater; use align score with numbers.user in the rows")
    if kind == "general_preference":
        if output is not None:
            raise ValueError(f"output={output} has no effect: a general preference model compares completions")
        return 0
    if output is None:
        if len(outputs) > 1:
            raise ValueError(f"the model has outputs {', '.join(outputs)}; choose one with output=NAME")
        return 0
    if output not in outputs:
        raise ValueError(f"output={output}: the model has {', '.join(outputs)}")
    return outputs.index(output)


def by_prompt(conversations: Sequence[Conversation]) -> list[list[int]]:
    """Places of the conversations of each prompt, in the order of their first ones."""
    groups: dict[str, list[int]] = {}
    for i, c in enumerate(conversations):
        groups.setdefault(json.dumps(_messages(c), default=str), []).append(i)
    return list(groups.values())


def _placed(rows: Sequence[Row | None], values: np.ndarray, width: int) -> np.ndarray:
    out = np.full((len(rows), width), np.nan)
    out[[k for k, row in enumerate(rows) if row is not None]] = values
    return out


def _messages(c: Conversation) -> list[Json]:
    return [{"role": "user", "content": c.prompt}] if c.messages is None else list(c.messages)


class AdapterReward(Reward):
    """A LoRA adapter and a score head on the weights of the policy, which must be a LoRA model itself.

    path: a directory with a PEFT adapter (adapter_config.json, adapter_model.safetensors), trained on the same base
    as the policy's, and score.safetensors with the tensor weight [1, H]. The adapter is in the policy's model but on
    only while scores are computed; it is never trained. Tokenizer and chat template are the policy's. max_tokens: as
    in RewardModel.
    """

    in_process = True
    needs_lora = True

    def __init__(self, host: Any, *, path: str, max_tokens: int):
        from align.models.policy import add_adapter, is_peft

        if host.policy is None or not is_peft(host.policy.model):
            raise ValueError(NEEDS_LORA)
        self.check_keys(path=path, max_tokens=max_tokens)
        self.host = host
        self.max_tokens = max_tokens
        self.counts: dict[str, int] = Counter()
        self.ours = (Path(path) / FILE).is_file()
        self._peft = host.policy.model
        self.adapter: str = _free_name(self._peft.peft_config)
        self._open = True
        self.weight = _head(Path(path), host.policy.causal_lm.config.get_text_config().hidden_size).to(host.device)
        with _as_before(self._peft):
            add_adapter(self._peft, path, self.adapter)

    @classmethod
    def check_keys(cls, *, path: str, max_tokens: int, **others: object) -> None:  # noqa: ARG003
        """See RewardTarget."""
        positive_limit(max_tokens)
        for name in ("adapter_config.json", "adapter_model.safetensors", "score.safetensors"):
            if not (Path(path) / name).is_file():
                raise ValueError(f"path={path}: there is no {name} in it")

    def __call__(self, conversations: Sequence[Conversation]) -> np.ndarray:
        """See Reward. The policy's mode, its adapter and what of it is trained are left as they were."""
        from align.models.policy import own_attention, trunk_of

        lm = self.host.policy.causal_lm
        trunk = trunk_of(lm)

        def hidden(ids: Tensor, mask: Tensor) -> Tensor:
            return trunk(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state

        rows = _rows(self.host.tokenizer, conversations, self.ours)
        with _as_before(self._peft), own_attention(lm):
            self._peft.set_adapter(self.adapter, inference_mode=True)
            self._peft.eval()
            return _score(rows, hidden, self.weight, None, self.max_tokens, self.host, self.counts)

    def close(self) -> None:
        """Take the adapter out of the policy's model: what is saved afterwards does not hold it."""
        if self._open:  # a second time the name may be that of another reward's adapter
            self._open = False
            with _as_before(self._peft):
                self._peft.delete_adapter(self.adapter)


@contextlib.contextmanager
def _as_before(model: Any) -> Iterator[None]:
    """Afterwards the active adapter, what is trained and the mode are as before: PEFT's own switches set all three."""
    active, training = model.active_adapter, model.training
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    try:
        yield
    finally:
        model.set_adapter(active)
        for name, p in model.named_parameters():
            p.requires_grad_(name in trained)
        model.train(training)


def _rows(tokenizer: Tokenizer, conversations: Sequence[Conversation], ours: bool) -> list[list[int]]:
    """Up to the end of turn, where a model of ours is read; else all that the template writes."""
    if ours:
        return [_ended(tokenizer, c) for c in conversations]
    texts = []
    for c in conversations:
        chat = [*_messages(c), {"role": "assistant", "content": c.completion}]
        texts.append(tokenizer.apply_chat_template(chat, tokenize=False))
    # the template has written what a sequence begins with
    return [list(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]


def _ended(tokenizer: Tokenizer, c: Conversation) -> list[int]:
    prompt = _messages(c)
    chat = [*prompt, {"role": "assistant", "content": c.completion}]
    try:
        return render(tokenizer, chat, first_target=len(prompt)).row.token_ids.tolist()
    except BadRow:  # its template cannot write it: no score, as for one that is too long
        return []


@no_grad
def _score(
    rows: Sequence[Sequence[int]],
    hidden: Trunk,
    weight: Tensor,
    bias: Tensor | None,
    max_tokens: int,
    host: RewardHost,
    counts: dict[str, int],
) -> np.ndarray:
    """The head's output [N] at the last token of each row; NaN for rows that are too long and for what is no number."""
    out = np.full(len(rows), np.nan)
    fitting = [i for i, row in enumerate(rows) if 0 < len(row) <= max_tokens]
    if len(fitting) < len(rows):
        count_failures(counts, "too_long", len(rows) - len(fitting), f"longer than max_tokens={max_tokens}", host)
    for part in batches(sorted(fitting, key=lambda i: (len(rows[i]), i)), rows, host.micro_batch_tokens):
        host.check()
        width = len(rows[part[-1]])
        ids = torch.zeros((len(part), width), dtype=torch.long)  # padding is what the mask says, whatever its id
        mask = torch.zeros_like(ids)
        for k, i in enumerate(part):
            ids[k, : len(rows[i])] = torch.tensor(rows[i])
            mask[k, : len(rows[i])] = 1
        with host.autocast():
            states = hidden(ids.to(host.device), mask.to(host.device))
        last = states[torch.arange(len(part)), mask.sum(1).to(states.device) - 1]
        scores = torch.nn.functional.linear(last.float(), weight.float(), None if bias is None else bias.float())
        out[part] = scores[:, 0].double().cpu().numpy()
    broken = [i for i in fitting if not np.isfinite(out[i])]
    if broken:
        out[broken] = np.nan
        count_failures(counts, "not_finite", len(broken), "the model's score is no finite number", host)
    return out


def batches(order: Sequence[int], rows: Sequence[Sequence[int]], budget: int) -> list[list[int]]:
    """Rows of ascending length in batches of at most `budget` tokens, padding included; a longer row goes alone."""
    parts: list[list[int]] = []
    for i in order:
        if parts and (len(parts[-1]) + 1) * len(rows[i]) <= budget:
            parts[-1].append(i)
        else:
            parts.append([i])
    return parts


def count_failures(counts: dict[str, int], reason: str, number: int, message: str, host: RewardHost) -> None:
    if reason not in counts:
        host.say(f"reward model: no score ({reason}: {message}); said once, then counted")
    counts[reason] = counts.get(reason, 0) + number


def _head(directory: Path, size: int) -> Tensor:
    """The weight [1, H] of score.safetensors."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(directory / "score.safetensors")
    except SafetensorError as error:
        raise ValueError(f"path={directory}: score.safetensors is damaged ({error})") from error
    weight = tensors.get("weight")
    if weight is None or tuple(weight.shape) != (1, size):
        shape = None if weight is None else tuple(weight.shape)
        raise ValueError(f"path={directory}: score.safetensors must hold weight [1, {size}], it has {shape}")
    return weight.float()


def _free_name(taken: Any) -> str:
    number = 1
    while (name := "reward" if number == 1 else f"reward_{number}") in taken:
        number += 1
    return name


def positive_limit(max_tokens: int) -> int:
    if max_tokens < 1:
        raise ValueError(f"max_tokens={max_tokens}: must be at least 1")
    return max_tokens
