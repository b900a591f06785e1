"""Reward models in the trainer's process: one of its own, or an adapter on the policy's weights with a score head."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from align.models import is_peft, stock_attention
from align.rewards.base import Conversation

Trunk = Callable[[Tensor, Tensor], Tensor]  # ids, mask [B, L] -> hidden states [B, L, H]


class RewardModel:
    """A sequence classification model with one output, in Hugging Face format with safetensors.

    The conversation is written in the chat template of the model's own tokenizer, the completion as the assistant's
    whole turn, and the score is read at its last token. dtype: auto (as stored), float32 or bfloat16; the score itself
    is computed in float32. max_tokens: a longer conversation has no score (reason too_long).
    """

    in_process = True

    def __init__(self, host: Any, *, path: str, revision: str | None, dtype: str, max_tokens: int):
        if dtype not in ("auto", "float32", "bfloat16"):
            raise ValueError(f"dtype={dtype}: must be one of auto, float32, bfloat16")
        self.host = host
        self.tokenizer, self.model = _load(path, revision, dtype)
        self.model.to(host.device).eval().requires_grad_(False)
        self.max_tokens = positive_limit(max_tokens)
        self.counts: dict[str, int] = Counter()

    def __call__(self, conversations: Sequence[Conversation]) -> np.ndarray:
        """See Reward."""
        trunk = getattr(self.model, self.model.base_model_prefix)

        def hidden(ids: Tensor, mask: Tensor) -> Tensor:
            return trunk(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state

        head = self.model.score
        rows = _rows(self.tokenizer, conversations)
        return _score(rows, hidden, head.weight, head.bias, self.max_tokens, self.host, self.counts)

    def close(self) -> None:
        """Give up the model's memory."""
        self.model = None


class AdapterReward:
    """A LoRA adapter and a score head on the weights of the policy, which must be a LoRA model itself.

    path: a directory with a PEFT adapter (adapter_config.json, adapter_model.safetensors), trained on the same base
    as the policy's, and score.safetensors with the tensor weight [1, H]. The adapter is in the policy's model but on
    only while scores are computed; it is never trained. Tokenizer and chat template are the policy's. max_tokens: as
    in RewardModel.
    """

    in_process = True

    def __init__(self, host: Any, *, path: str, max_tokens: int):
        if host.policy is None or not is_peft(host.policy.model):
            raise ValueError(
                "an adapter on the policy's weights needs a policy with LoRA: set lora.rank, or use "
                "_target_=align.rewards.model.RewardModel with a whole model"
            )
        self.host = host
        self.max_tokens = positive_limit(max_tokens)
        self.counts: dict[str, int] = Counter()
        self._peft = host.policy.model
        self.adapter = _free_name(self._peft.peft_config)
        self.weight = _head(Path(path), host.policy.causal_lm.config.get_text_config().hidden_size).to(host.device)
        with _as_before(self._peft):
            self._peft.load_adapter(path, self.adapter, is_trainable=False)

    def __call__(self, conversations: Sequence[Conversation]) -> np.ndarray:
        """See Reward. The policy's mode, its adapter and what of it is trained are left as they were."""
        lm = self.host.policy.causal_lm
        trunk = lm.get_decoder()

        def hidden(ids: Tensor, mask: Tensor) -> Tensor:
            return trunk(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state

        rows = _rows(self.host.tokenizer, conversations)
        with _as_before(self._peft), stock_attention(lm):
            self._peft.set_adapter(self.adapter, inference_mode=True)
            self._peft.eval()
            return _score(rows, hidden, self.weight, None, self.max_tokens, self.host, self.counts)

    def close(self) -> None:
        """Take the adapter out of the policy's model: what is saved afterwards does not hold it."""
        if self.adapter in self._peft.peft_config:
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


def _rows(tokenizer: Any, conversations: Sequence[Conversation]) -> list[list[int]]:
    texts = []
    for c in conversations:
        prompt = [{"role": "user", "content": c.prompt}] if c.messages is None else list(c.messages)
        chat = [*prompt, {"role": "assistant", "content": c.completion}]
        texts.append(tokenizer.apply_chat_template(chat, tokenize=False))
    # the template has written what a sequence begins with
    return [list(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]


@torch.no_grad()
def _score(
    rows: Sequence[Sequence[int]],
    hidden: Trunk,
    weight: Tensor,
    bias: Tensor | None,
    max_tokens: int,
    host: Any,
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


def count_failures(counts: dict[str, int], reason: str, number: int, message: str, host: Any) -> None:
    if reason not in counts:
        host.say(f"reward model: no score ({reason}: {message}); said once, then counted")
    counts[reason] = counts.get(reason, 0) + number


def _load(path: str, revision: str | None, dtype: str) -> tuple[Any, Any]:
    """Tokenizer and model. Raises ValueError for one without a chat template or a trained head of one output."""
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

    common = {"revision": revision, "trust_remote_code": False}
    config = AutoConfig.from_pretrained(path, **common)
    if config.num_labels != 1:
        raise ValueError(f"path={path}: has {config.num_labels} outputs, a reward model has one (num_labels=1)")
    tokenizer = AutoTokenizer.from_pretrained(path, **common)
    if not tokenizer.chat_template:
        raise ValueError(f"path={path}: its tokenizer has no chat template; put a chat_template.jinja beside it")
    wanted = dtype if dtype == "auto" else getattr(torch, dtype)
    model, told = AutoModelForSequenceClassification.from_pretrained(
        path, use_safetensors=True, dtype=wanted, output_loading_info=True, **common
    )
    if not isinstance(getattr(model, "score", None), torch.nn.Linear):
        raise ValueError(f"path={path}: {type(model).__name__} does not score its last token, which is needed here")
    if told["missing_keys"]:
        missing = ", ".join(sorted(told["missing_keys"])[:3])
        raise ValueError(f"path={path}: has no weights for {missing}; it is not a trained reward model")
    return tokenizer, model


def _head(directory: Path, size: int) -> Tensor:
    """The weight [1, H] of score.safetensors."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    for name in ("adapter_config.json", "adapter_model.safetensors", "score.safetensors"):
        if not (directory / name).is_file():
            raise ValueError(f"path={directory}: there is no {name} in it")
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
