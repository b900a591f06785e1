"""Completions by transformers' generate, from the policy itself: for laptops, tests and the samples of a run."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteria
from transformers.cache_utils import Cache, DynamicLayer

from align.config.rollouts import HFSettings, settings
from align.data import chat
from align.jsons import Tokenizer
from align.models.policy import Policy, own_attention, trunk_of
from align.rollout.base import GREEDY, Completion, Host, Rollout, Sampling, Stop, check_request

# Tokens after which rows that ended leave the batch: most programs are shorter than the longest of their batch.
_SEGMENT = 16


class HFRollout(Rollout):
    """The policy's own network, generating: no second copy of the weights, nothing to sync.

    batch_size: rows generated together; prompts of like length share a batch, padded on the left.
    A row's draws are its own (see Rollout); its logits depend on its batch by rounding only.
    """

    def __init__(self, host: Host, **keys: Any):
        self.batch_size = settings(HFSettings, keys).batch_size
        self.policy: Policy = host.policy
        self.tokenizer = host.tokenizer
        self.autocast = host.autocast
        self.check = host.check
        self.progress = host.progress
        self.max_tokens: int | None = None
        self.counts: dict[str, int] = {}
        self.stops = chat.stop_ids(host.tokenizer, self.policy.causal_lm.generation_config)
        if not self.stops:
            raise ValueError("neither the tokenizer nor the model names a token that ends a turn; set its eos_token")

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, n: int = 1, greedy: bool = False
    ) -> list[list[Completion]]:
        """See Rollout. The global generators and the policy's mode are left as they were."""
        check_request(prompts, sampling, n, greedy)
        samples = [*range(n), *([GREEDY] if greedy else [])]
        rows = [(i, k) for i in range(len(prompts)) for k in samples]
        rows.sort(key=lambda row: (len(prompts[row[0]]), row))
        out: dict[tuple[int, int], Completion] = {}
        cuts = _cuts([len(prompts[i]) for i, _ in rows], self.batch_size)
        training = self.policy.training
        self.policy.eval()
        try:
            with torch.no_grad(), own_attention(self.policy.causal_lm), _plain_settings(self.policy.causal_lm):
                for number in self.progress(range(len(cuts) - 1), len(cuts) - 1):
                    self.check()
                    part = rows[cuts[number] : cuts[number + 1]]
                    with self.autocast():
                        completions = self._batch([prompts[i] for i, _ in part], sampling, part)
                    out.update(zip(part, completions, strict=True))
        finally:
            self.policy.train(training)
        return [[out[i, k] for k in samples] for i in range(len(prompts))]

    @torch.no_grad()
    def logps(self, sequences: Sequence[Sequence[int]], starts: Sequence[int]) -> list[list[float]]:
        """See Rollout."""
        out = []
        training = self.policy.training
        self.policy.eval()
        try:
            with own_attention(self.policy.causal_lm), self.autocast():
                for ids, start in zip(sequences, starts, strict=True):
                    tokens = torch.tensor([list(ids)], device=self.policy.device)
                    scores = self.policy.causal_lm(tokens, use_cache=False).logits[0, start - 1 : -1]
                    out.append(scores.float().log_softmax(-1).gather(1, tokens[0, start:, None])[:, 0].tolist())
        finally:
            self.policy.train(training)
        return out

    def sync(self, policy: Policy) -> None:
        """Generate with `policy` from now on; a policy that was trained in place needs no call."""
        self.policy = policy

    def sleep(self) -> None:
        """Nothing is held."""

    def close(self) -> None:
        """Nothing is held."""

    def _batch(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, keys: Sequence[tuple[int, int]]
    ) -> list[Completion]:
        lm, device = self.policy.causal_lm, self.policy.device
        stops = set(self.stops)
        cache, shared = self._cache(prompts, sampling.max_new_tokens)
        width = max(len(p) for p in prompts)
        ids = torch.full((len(prompts), width), self.stops[0])
        mask = torch.zeros_like(ids)
        for k, prompt in enumerate(prompts):
            rest = len(prompt) - shared  # the padding stands between the shared beginning and the rest
            ids[k, :shared] = torch.tensor(prompt[:shared])
            ids[k, width - rest :] = torch.tensor(prompt[shared:])
            mask[k, :shared] = 1
            mask[k, width - rest :] = 1
        ids, mask = ids.to(device), mask.to(device)
        uniform = None if sampling.greedy else _uniform(sampling, keys).to(device)
        is_greedy = torch.tensor([k == GREEDY for _, k in keys], device=device)
        live = list(range(len(prompts)))  # rows that still write
        logps: list[list[float]] = [[] for _ in prompts]
        out: list[Completion | None] = [None] * len(prompts)
        while live:
            start = ids.shape[1] - width
            count = sampling.max_new_tokens - start
            count = min(count, _SEGMENT) if cache is not None else count
            picker = _Picker(sampling, None if uniform is None else uniform[live, start:], is_greedy[live])
            ends = _StopTexts(self.tokenizer, sampling.stop, width, stops)
            ids = lm.generate(
                input_ids=ids,
                attention_mask=mask,
                past_key_values=cache,
                generation_config=GenerationConfig(
                    max_new_tokens=count,
                    do_sample=False,  # the picker leaves one token to choose from
                    eos_token_id=self.stops,
                    pad_token_id=self.stops[0],
                    use_cache=True,
                ),
                logits_processor=LogitsProcessorList([picker]),
                stopping_criteria=[ends] if sampling.stop else None,
            )
            token_logps = torch.stack(picker.logps, 1).tolist()
            going = []
            for k, (row, written) in enumerate(zip(live, ids[:, width:].tolist(), strict=True)):
                logps[row] += token_logps[k]
                length, stop = _end(written, stops, ends.lengths.get(k))
                if stop == "length" and length < sampling.max_new_tokens:
                    going.append(k)
                else:
                    out[row] = Completion(tuple(written[:length]), stop, tuple(logps[row][:length]))
            live = [live[k] for k in going]
            if live:
                mask = torch.cat([mask, mask.new_ones(len(mask), ids.shape[1] - mask.shape[1])], 1)[going]
                ids = ids[going]
                cache.batch_select_indices(torch.tensor(going, device=device))  # type: ignore[union-attr]
        return [c for c in out if c is not None]

    def _cache(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> tuple[Cache | None, int]:
        """A cache that holds the common beginning of the prompts, computed once, and its length.

        (None, 0) for networks whose layers are not all plain attention: their state cannot be told apart by row.
        """
        lm, device = self.policy.causal_lm, self.policy.device
        layers = DynamicCache(config=lm.config.get_text_config(decoder=True)).layers
        if not lm._supports_default_dynamic_cache() or not layers or any(type(c) is not DynamicLayer for c in layers):
            return None, 0
        capacity = max(len(p) for p in prompts) + max_new_tokens
        shared = _common(prompts)
        if shared == 0:
            return Cache(layer_class_to_replicate=partial(_Buffer, capacity)), 0  # type: ignore[arg-type]
        cache = Cache(layer_class_to_replicate=partial(_Buffer, shared))  # type: ignore[arg-type]
        beginning = torch.tensor([list(prompts[0][:shared])], device=device)
        trunk_of(lm)(input_ids=beginning, past_key_values=cache, use_cache=True)
        for layer in cache.layers:
            assert isinstance(layer, _Buffer)
            layer.spread(len(prompts), capacity)
        return cache, shared


class _Buffer(DynamicLayer):
    """Keys and values of a layer in room that was taken once: the stock layer copies all of them at each token."""

    def __init__(self, capacity: int):
        super().__init__()
        self.capacity = capacity

    def update(self, key_states: Tensor, value_states: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        """Append; the returned tensors are views of the room."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self._room = [s.new_empty(*s.shape[:2], self.capacity, s.shape[3]) for s in (key_states, value_states)]
        start = self.get_seq_length()
        end = start + key_states.shape[-2]
        for room, states in zip(self._room, (key_states, value_states), strict=True):
            room[:, :, start:end] = states
        self.keys, self.values = (room[:, :, :end] for room in self._room)
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows, with all their room."""
        self._room = [room[indices] for room in self._room]
        self.keys, self.values = (room[:, :, : self.get_seq_length()] for room in self._room)

    def spread(self, rows: int, capacity: int) -> None:
        """What one row holds becomes the beginning of `rows` rows, in room for `capacity` tokens."""
        start = self.get_seq_length()
        wider = [room.new_empty(rows, room.shape[1], capacity, room.shape[3]) for room in self._room]
        for room, old in zip(wider, self._room, strict=True):
            room[:, :, :start] = old[:, :, :start]
        self._room, self.capacity = wider, capacity
        self.keys, self.values = (room[:, :, :start] for room in wider)


class _Picker(LogitsProcessor):
    """Draws each row's next token by its own stream of uniform numbers, and keeps its log-probability."""

    def __init__(self, sampling: Sampling, uniform: Tensor | None, is_greedy: Tensor):
        self.sampling = sampling
        self.uniform = uniform  # [B, tokens to draw] float64; None: the likeliest token
        self.is_greedy = is_greedy  # [B] bool, rows that take the likeliest token all the same
        self.logps: list[Tensor] = []  # of each token drawn, [B] float32

    def __call__(self, _: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Scores [B, V] with all but the drawn token at -inf."""
        if self.uniform is None:
            token = scores.argmax(-1, keepdim=True)
        else:
            token = _draw(scores, self.sampling, self.uniform[:, len(self.logps), None])
            token = torch.where(self.is_greedy[:, None], scores.argmax(-1, keepdim=True), token)
        self.logps.append((scores.gather(1, token) - scores.logsumexp(-1, keepdim=True))[:, 0])
        return torch.full_like(scores, -torch.inf).scatter_(1, token, 0.0)  # type: ignore[return-value]


def _uniform(sampling: Sampling, keys: Sequence[tuple[int, int]]) -> Tensor:
    """Numbers in [0, 1) for each row and token, [B, max_new_tokens] float64: a row's own, whatever shares its batch."""
    # a greedy completion uses no random numbers: any seed serves
    seeds = [sampling.seed_at(i, max(k, 0)) for i, k in keys]
    return torch.from_numpy(np.stack([np.random.default_rng(seed).random(sampling.max_new_tokens) for seed in seeds]))


def _draw(scores: Tensor, sampling: Sampling, uniform: Tensor) -> Tensor:
    """The token of each row at which its cumulative probability passes its uniform number, [B, 1]."""
    scores = scores / sampling.temperature
    if 0 < sampling.top_k < scores.shape[-1]:
        least = scores.topk(sampling.top_k).values[:, -1:]
        scores = scores.masked_fill(scores < least, -torch.inf)
    probabilities = scores.softmax(-1)
    if sampling.top_p < 1:
        ordered, order = probabilities.sort(dim=-1, descending=True, stable=True)
        before = ordered.cumsum(-1) - ordered  # the likeliest token always stays
        outside = torch.zeros_like(before, dtype=torch.bool).scatter_(-1, order, before >= sampling.top_p)
        probabilities = probabilities.masked_fill(outside, 0.0)
    # float64: a cumulative sum over a vocabulary in float32 would lose the rarest tokens
    total = probabilities.cumsum(-1, dtype=torch.float64)
    return torch.searchsorted(total, uniform * total[:, -1:], right=True).clamp_(max=scores.shape[-1] - 1)


class _StopTexts(StoppingCriteria):
    """Ends a row when a stop text stands in what it wrote; `lengths` has the tokens of each row ended so."""

    def __init__(self, tokenizer: Tokenizer, texts: tuple[str, ...], width: int, stops: set[int]):
        self.tokenizer = tokenizer
        self.texts = texts
        self.width = width
        self.stops = stops
        self.lengths: dict[int, int] = {}
        self.ended: set[int] = set()
        # A token holds a byte at least, so that a text reaches back so many tokens; one more because decoders
        # treat the first of a text in their own way.
        self.reach = max((len(t.encode()) for t in texts), default=0) + 1

    def __call__(self, input_ids: torch.LongTensor, _: torch.FloatTensor, **__: object) -> Tensor:
        """Rows that are done, [B] bool."""
        length = input_ids.shape[1] - self.width
        recent = input_ids[:, self.width :][:, -self.reach :].tolist()
        for k, row in enumerate(recent):
            if k in self.ended:
                continue
            if row[-1] in self.stops:
                self.ended.add(k)
                continue
            text = self.tokenizer.decode(row, skip_special_tokens=False, clean_up_tokenization_spaces=False)
            if any(t in text for t in self.texts):
                self.ended.add(k)
                self.lengths[k] = length
        return torch.tensor([k in self.ended for k in range(len(recent))], device=input_ids.device)


def _end(row: list[int], stops: set[int], stopped: int | None) -> tuple[int, Stop]:
    """Where a row of a batch ends, and by what; padding follows."""
    if stopped is not None:
        return stopped, "string"
    for n, token in enumerate(row):
        if token in stops:
            return n + 1, "end"
    return len(row), "length"


def _cuts(lengths: Sequence[int], batch_size: int) -> list[int]:
    """Borders of batches of ascending lengths: full ones, but for rows so much longer that all would be padding."""
    cuts = [0]
    for n, length in enumerate(lengths):
        if n - cuts[-1] == batch_size or length > 1.25 * lengths[cuts[-1]] + 32:
            cuts.append(n)
    return [*cuts, len(lengths)] if lengths else cuts


def _common(prompts: Sequence[Sequence[int]]) -> int:
    """Tokens that all prompts begin with, fewer than any of them has; 0 for a single prompt."""
    if len(prompts) < 2:
        return 0
    first, last = min(map(tuple, prompts)), max(map(tuple, prompts))  # in order of their tokens, these two differ first
    n = 0
    limit = min(len(p) for p in prompts) - 1
    while n < limit and first[n] == last[n]:
        n += 1
    return n


@contextlib.contextmanager
def _plain_settings(lm: Any) -> Iterator[None]:
    """Inside, the model has no generation settings of its own: many come with a repetition penalty or a top_k,
    and what was sampled would not be the policy."""
    before = lm.generation_config
    lm.generation_config = GenerationConfig()
    try:
        yield
    finally:
        lm.generation_config = before
