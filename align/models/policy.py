"""Networks: policies and reward models from PackedBatch to Stats, LoRA, and the reference as adapter-off.

Everything that knows transformers' classes is here; the loop sees Policy only.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeGuard

import numpy as np
import torch
import torch.nn.attention.varlen  # registers the operator that _PRODUCTS names
from torch import nn
from torch.utils import checkpoint

from align.jsons import Json
from align.models import attention, experts
from align.models.logprobs import Head, stats
from align.models.weights import check_finite
from align.packing import pack, to_device
from align.types import Example, Extras, Layout, PackedBatch, Row, Stats

if TYPE_CHECKING:
    from peft import PeftModel

ActivationCheckpointing = Literal["off", "selective", "full"]

_PACKABLE_LAYERS = {"full_attention", "sliding_attention"}
# Of a row, in the self-check: 128 tokens of a vocabulary of 150 000 are 75 MiB of logits.
PROBE_TARGETS = 128


class Network(nn.Module):
    """A causal transformer over packed batches; what its hidden states are asked for is a subclass's.

    One forward of the trunk and one use of each head for every batch, whatever its content: sharded engines
    hang when ranks differ in the number of module calls.
    """

    layout: Layout

    def __init__(self, model: nn.Module, layout: Layout):
        super().__init__()
        self.model = model
        self.layout = layout
        lm = self.causal_lm
        lm.own_attention = own_attention_name(lm)  # beside the config: what is saved does not hold it
        if lm.config._attn_implementation != attention.NAME:
            lm.config._attn_implementation = lm.own_attention if layout == "padded" else attention.NAME
        experts.use(lm.config)

    @property
    def causal_lm(self) -> Any:
        """The transformers model, LoRA layers inside if there are any."""
        return base_model(self.model)

    @property
    def device(self) -> torch.device:
        """Where inputs must be."""
        return self.causal_lm.get_input_embeddings().weight.device

    @property
    def width(self) -> int:
        """H, the size of a hidden state."""
        return self.causal_lm.config.get_text_config().hidden_size

    def hidden(self, batch: PackedBatch) -> torch.Tensor:
        """Last hidden states [T, H] of the stream, after the final norm."""
        trunk = trunk_of(self.causal_lm)
        if batch.padded_shape is not None:
            # Padding is on the right: causal layers never look at it, and no target reads it. A mask would
            # only leave windows in which everything is masked, whose softmax is nan.
            hidden = trunk(
                input_ids=batch.input_ids.view(batch.padded_shape),
                position_ids=batch.position_ids.view(batch.padded_shape),
                use_cache=False,
            ).last_hidden_state
        else:
            hidden = trunk(
                input_ids=batch.input_ids[None],
                position_ids=batch.position_ids[None],
                segments=attention.SegmentPlan(batch.segments, batch.varlen),
                use_cache=False,
            ).last_hidden_state
        return hidden.reshape(-1, hidden.shape[-1])


class Policy(Network):
    """A causal language model; with a value head if asked for. value_head: its number of outputs, 0: none."""

    def __init__(self, model: nn.Module, layout: Layout, value_head: int = 0):
        super().__init__(model, layout)
        self.value_head: nn.Linear | None = None
        if value_head:  # beside the model: what PEFT and save_pretrained know of stays a plain language model
            self.value_head = nn.Linear(self.width, int(value_head), bias=True, device=self.device, dtype=torch.float32)
            nn.init.zeros_(self.value_head.weight)  # no opinion at the start
            nn.init.zeros_(self.value_head.bias)

    def forward(self, batch: PackedBatch, needs: frozenset[str] = frozenset()) -> Stats:
        """Stats of a batch; `needs` names optional ones, see stats.EXTRAS."""
        hidden = self.hidden(batch)
        out = stats(hidden, head_of(self.causal_lm), batch, needs)
        if "values" not in needs:
            return out
        if self.value_head is None:
            raise ValueError("values are needed and the policy has no value head")
        before = hidden.index_select(0, batch.target_index).float()
        with torch.autocast(hidden.device.type, enabled=False):
            values = self.value_head(before)
            return replace(out, values=values[:, 0] if values.shape[1] == 1 else values)

    @contextlib.contextmanager
    def as_reference(self) -> Iterator[None]:
        """Inside, the policy is its own reference: adapter off, dropout off, no gradients."""
        if not is_peft(self.model):
            raise ValueError("reference.mode=adapter needs LoRA: set lora.rank, or use reference.mode=cached")
        training = self.training
        self.eval()
        try:
            with torch.no_grad(), self.model.disable_adapter():
                yield
        finally:
            self.train(training)


class Scorer(Network):
    """A reward model: the trunk and a head that reads the hidden state at each sequence's last token.

    Where a sequence ends is known by position; ids are never compared with the padding's, which is the end of turn in
    many vocabularies. The head lies beside the model, out of PEFT's sight, and computes in float32.
    """

    def __init__(self, model: nn.Module, layout: Layout, head: nn.Module):
        super().__init__(model, layout)
        self.head = head.to(self.device)

    def forward(self, batch: PackedBatch, needs: frozenset[str] = frozenset()) -> Stats:
        """Stats with scores, and gates among the extras if they are needed."""
        hidden = self.hidden(batch)
        last = hidden.index_select(0, batch.last_index).float()
        with torch.autocast(hidden.device.type, enabled=False):
            scores = self.head(last)
            head: Any = self.head  # one that is gated has them
            extras = Extras()
            if "gates" in needs:
                extras["gates"] = head.gates(hidden.index_select(0, prompt_ends(batch)).float())
        empty = scores.new_zeros(0)
        return Stats(empty, empty, batch.lengths, batch.row, scores=scores, extras=extras)

    def own_scores(self, row: Row) -> torch.Tensor:
        """Scores [D] of one row by the trunk's own forward, as transformers' classifiers compute them."""
        ids = torch.from_numpy(row.token_ids.astype(np.int64)).to(self.device)
        last = trunk_of(self.causal_lm)(input_ids=ids[None], use_cache=False).last_hidden_state[0, -1:].float()
        with torch.autocast(ids.device.type, enabled=False):
            return self.head(last)[0]


class ScoreHead(nn.Module):
    """Hidden states [N, H] to scores [N, D], linear without bias; a second one to gates [N, D / 2] if gated.

    Weights are drawn from N(0, 1 / (H + 1)^2), as OpenRLHF and the general preference model's code do.
    """

    def __init__(self, width: int, outputs: int, gated: bool = False, dropout: float = 0.0):
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.score = nn.Linear(width, outputs, bias=False)
        self.gate = nn.Linear(width, outputs // 2, bias=False) if gated else None
        for part in (self.score, self.gate):
            if part is not None:
                nn.init.normal_(part.weight, std=1 / (width + 1))

    def forward(self, last: torch.Tensor) -> torch.Tensor:
        """Scores of the states at the last tokens."""
        return self.score(self.dropout(last))

    def gates(self, before: torch.Tensor) -> torch.Tensor:
        """Gates, before any softmax, of the states at the ends of the prompts."""
        if self.gate is None:
            raise ValueError("gates are needed and the head has none")
        return self.gate(before)


def prompt_ends(batch: PackedBatch) -> torch.Tensor:
    """Stream positions [N] of the token before each sequence's first target; each must have one."""
    first = torch.searchsorted(batch.row, torch.arange(len(batch.lengths), device=batch.row.device))
    return batch.target_index[first]


def base_model(model: nn.Module) -> Any:
    """The transformers model, below PEFT's wrapping if there is one."""
    return model.get_base_model() if is_peft(model) else model


def trunk_of(lm: Any) -> Any:
    """The part of a transformers model that gives hidden states. Raises ValueError, naming the class, without one.

    get_decoder does not always tell: of Llama 4 it is a language model again, of ModernBERT the layer before the head.
    """
    from transformers import PreTrainedModel

    for part in (lm.get_decoder(), lm.base_model, getattr(lm, "model", None)):
        if isinstance(part, PreTrainedModel) and part is not lm and part.get_output_embeddings() is None:
            return part
    raise ValueError(f"{type(lm).__name__} cannot be trained: it has no part that gives hidden states to align")


def is_peft(model: nn.Module) -> TypeGuard[PeftModel]:
    """Whether a model carries PEFT adapters."""
    return hasattr(model, "peft_config") and hasattr(model, "disable_adapter")


@contextlib.contextmanager
def own_attention(lm: Any) -> Iterator[None]:
    """Inside, the model uses the attention it was loaded with: for generating and for padded rows.

    For forwards without a backward only: a packed model keeps the packed attention at all other times, so that
    a recomputing backward, which runs later, finds the same function as the forward.
    """
    before = lm.config._attn_implementation
    lm.config._attn_implementation = own_attention_name(lm)
    try:
        yield
    finally:
        lm.config._attn_implementation = before


def own_attention_name(lm: Any) -> str:
    """Transformers' name of the attention that computes what the model means: the one it was loaded with.

    But eager for a model that caps its attention scores: it is loaded with SDPA, which ignores the cap.
    """
    if getattr(lm.config, "attn_logit_softcapping", None):
        return "eager"
    name = lm.config._attn_implementation
    return lm.own_attention if name == attention.NAME else name


def head_of(lm: Any) -> Head:
    """The output head with the model's own scaling of logits.

    Gemma 2 and RecurrentGemma cap them (final_logit_softcapping, logits_soft_cap), Cohere multiplies (logit_scale),
    Granite divides (logits_scaling), Falcon-H1 multiplies (lm_head_multiplier). A model that does something else is
    found by the self-check, see probe_layout.
    """
    config = lm.config
    scale = 1.0
    for name, power in (("logit_scale", 1), ("logits_scaling", -1), ("lm_head_multiplier", 1)):
        value = getattr(config, name, None)
        if value is not None:
            scale *= float(value) ** power
    output = lm.get_output_embeddings()
    caps = (getattr(config, name, None) for name in ("final_logit_softcapping", "logits_soft_cap"))
    return Head(
        weight=output.weight,
        bias=getattr(output, "bias", None),
        scale=scale,
        softcap=next((cap for cap in caps if cap is not None), None),
    )


def choose_layout(lm: Any, wanted: str, dropout: float) -> tuple[Layout, str]:
    """The layout a model can be trained in, and the reason in words. `wanted` other than auto is obeyed.

    Raises ValueError when a packed layout is demanded of a model that needs stock attention.
    """
    config = lm.config
    reason = ""
    if not getattr(lm, "_supports_attention_backend", False):
        reason = f"{type(lm).__name__} does not take a registered attention function"
    elif set(getattr(config, "layer_types", None) or ()) - _PACKABLE_LAYERS:
        reason = f"{type(lm).__name__} has layers that are not full or sliding-window attention"
    elif getattr(lm, "_is_stateful", False):
        reason = f"{type(lm).__name__} carries a state from token to token"
    elif any(hasattr(module, "sinks") for module in lm.modules()):
        reason = f"{type(lm).__name__} has attention sinks"
    elif getattr(config, "is_causal", True) is False or getattr(config, "use_bidirectional_attention", False):
        reason = f"{type(lm).__name__} is not causal"
    elif getattr(config, "attention_dropout", 0.0):
        reason = f"model.attention_dropout={config.attention_dropout} needs the stock attention"
    if reason and wanted in ("shared", "packed"):
        raise ValueError(f"trainer.layout={wanted}: {reason}; use trainer.layout=padded")
    if wanted != "auto":
        if wanted == "shared" and dropout:
            raise ValueError(
                f"trainer.layout=shared: with dropout {dropout} both sequences would share the prompt's mask; "
                "use trainer.layout=packed"
            )
        return wanted, "set by trainer.layout"  # type: ignore[return-value]
    reason = reason or _unpackable(lm)
    if reason:
        return "padded", reason
    if dropout:
        return "packed", f"dropout {dropout}: a shared prefix would share its dropout mask"
    return "shared", "causal softmax attention throughout"


@torch.no_grad()
def _unpackable(lm: Any) -> str:
    """Why a model's trunk, tried on two short rows that begin alike, is not what it is on each of them by itself; "" if
    it is. What a model passes to its attention is not told by its config."""
    weight = lm.get_input_embeddings().weight
    if not weight.numel():  # in shards; what is wrong is then found by the self-check
        return ""
    name, trunk, training = type(lm).__name__, trunk_of(lm), lm.training
    ids = torch.arange(3, 3 + 14, device=weight.device) % len(weight)
    positions = torch.tensor([*range(8), *range(4, 10)], device=weight.device)
    plan = attention.SegmentPlan(((0, 8, 0, 0), (8, 14, 0, 4)))
    lm.eval()
    try:
        with own_attention(lm):
            rows = [trunk(input_ids=row[None], use_cache=False) for row in (ids[:8], torch.cat([ids[:4], ids[8:]]))]
            lm.config._attn_implementation = attention.NAME
            try:
                packed = trunk(input_ids=ids[None], position_ids=positions[None], segments=plan, use_cache=False)
            except Exception as error:
                first = " ".join(str(error).split())[:120].partition("; use trainer")[0]
                return f"{name} cannot be run on packed rows: {first}"
    finally:
        lm.train(training)
    expected = torch.cat([rows[0].last_hidden_state[0], rows[1].last_hidden_state[0, 4:]]).float()
    apart = (packed.last_hidden_state[0].float() - expected).norm(dim=-1) / expected.norm(dim=-1)
    # the median: rounding sends some tokens of a mixture to other experts
    if float(apart.nanmedian()) <= (1e-3 if weight.dtype in (torch.float32, torch.float64) else 0.05):
        return ""
    return f"the trunk of {name} computes something else on packed rows"


def enable_activation_checkpointing(policy: Network, mode: ActivationCheckpointing) -> None:
    """Which activations the backward computes again: none, all but matrix products, or those of whole layers."""
    if mode == "off":
        return
    kwargs: Json = {"use_reentrant": False}
    if mode == "selective":
        kwargs["context_fn"] = partial(checkpoint.create_selective_checkpoint_contexts, _keep_products)
    policy.causal_lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)


def _keep_products(_ctx: object, op: object, *_args: object, **_kwargs: object) -> Any:
    """Selective activation checkpointing: outputs of matrix products and attention are kept, the rest is recomputed."""
    keep = op in _PRODUCTS
    return checkpoint.CheckpointPolicy.MUST_SAVE if keep else checkpoint.CheckpointPolicy.PREFER_RECOMPUTE


_PRODUCTS = {
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.torch_attn._varlen_attn.default,
}


def lora(lm: Any, *, rank: int, alpha: float, dropout: float, targets: str | list[str], seed: int) -> Any:
    """A PEFT model with LoRA adapters of `rank` on the linear layers `targets`, initialised from `seed`.

    targets: "all-linear" (every linear layer but the head) or names. alpha: adapters are scaled by alpha / rank.
    Raises ValueError for the head: its weight is read, not called, so an adapter on it would be ignored.
    """
    from peft import LoraConfig, get_peft_model

    if targets != "all-linear" and any("lm_head" in t for t in targets):
        raise ValueError("lora.targets: lm_head cannot carry an adapter; leave it out")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = get_peft_model(
            lm,
            LoraConfig(
                r=rank,
                lora_alpha=alpha,  # pyright: ignore[reportArgumentType]  declared as int, multiplied as a number
                lora_dropout=dropout,
                target_modules=targets if isinstance(targets, str) else list(targets),
                task_type="CAUSAL_LM",
            ),
        )
    for p in model.parameters():  # adapters learn in float32 whatever the base is stored in
        if p.requires_grad:
            p.data = p.data.float()
    return model


def with_adapter(lm: object, directory: str) -> Any:
    """A PEFT model: `lm` with the adapter saved in `directory`. Raises ValueError for one that does not fit."""
    return with_adapters(lm, [Path(directory)], ["default"])


def with_adapters(lm: Any, directories: Sequence[Path], names: Sequence[str]) -> Any:
    """A PEFT model: `lm` with several saved adapters by name. Raises ValueError for one whose weights do not fit."""
    from peft import PeftModel

    model = PeftModel.from_pretrained(lm, str(directories[0]), adapter_name=names[0])
    for directory, name in zip(directories, names, strict=True):
        add_adapter(model, str(directory), name)  # of the first again: this tells what fits
    return model


def add_adapter(model: Any, directory: str, name: str) -> None:
    """Load a saved adapter into a PEFT model, frozen. Raises ValueError for one that does not fit or is not finite."""
    loading_info = model.load_adapter(directory, name, is_trainable=False)
    odd = [*loading_info.unexpected_keys, *loading_info.missing_keys]
    if odd:
        raise ValueError(f"{directory}: its adapter does not fit the model ({odd[0]}); it belongs to another base")
    check_finite(directory, ((key, p) for key, p in model.named_parameters() if f".{name}." in key))


def weights_hash(model: nn.Module, weights: Iterable[tuple[str, torch.Tensor]] | None = None) -> str:
    """blake2b over names, dtypes, shapes and bytes of all weights that LoRA did not add: what a cached
    reference log-prob depends on. weights: the model's, in the order of names, where it does not hold them itself."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(model.state_dict().items()) if weights is None else weights:
        if "lora_" in name:
            continue
        name = name.removeprefix("base_model.model.").replace(".base_layer", "")
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        flat = tensor.detach().contiguous().view(-1).view(torch.uint8)
        for part in flat.split(1 << 28):  # on the host a piece at a time
            digest.update(part.cpu().numpy().data)
    return digest.hexdigest()


@dataclass(frozen=True)
class Discrepancy:
    """Differences of numbers from the expected ones; inf for a NaN."""

    largest: float
    beyond_rounding: float  # without what the rounding of the others explains

    @classmethod
    def of(cls, gaps: torch.Tensor, rounding: torch.Tensor | float) -> Discrepancy:
        """The largest of gaps >= 0; 0 without any."""
        found = [float(part.amax()) if part.numel() else 0.0 for part in (gaps, (gaps - rounding).clamp(min=0))]
        return cls(*(gap if math.isfinite(gap) else math.inf for gap in found))


@torch.no_grad()
def probe_layout(network: Network, examples: Sequence[Example], layout: Layout | None = None) -> Discrepancy:
    """Largest difference (nats per token; of a reward model in score) between what is trained, the network in a layout,
    its own unless given, with align's head, and the model's own forward: its attention, its logits, one row at a time.

    What align does not know of a model shows here.
    """
    layout = layout or network.layout
    training = network.training
    network.eval()
    try:
        with own_attention(network.causal_lm) if layout == "padded" else contextlib.nullcontext():
            out = network(to_device(pack(examples, layout), network.device))
        rows = [row for example in examples for row in example.rows]
        with own_attention(network.causal_lm):
            if isinstance(network, Scorer):
                gaps = [(out.scores[n] - network.own_scores(row)).abs() for n, row in enumerate(rows)]
                return Discrepancy.of(torch.cat(gaps), 0.0)
            found = [_own_gaps(network, row, out.token_logps[out.row == n]) for n, row in enumerate(rows)]
            return Discrepancy.of(*(torch.cat(parts) for parts in zip(*found, strict=True)))
    finally:
        network.train(training)


def _own_gaps(network: Network, row: Row, token_logps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Differences of log-probs [number of targets] of a row from the model's own, for up to PROBE_TARGETS of them:
    logits of all would not fit beside a large model; and how far the rounding of these logits may move each."""
    lm = network.causal_lm
    where = np.flatnonzero(row.targets)
    if not len(where):
        return token_logps, token_logps
    chosen = np.unique(np.linspace(0, len(where) - 1, PROBE_TARGETS).round().astype(int))
    ids = torch.from_numpy(row.token_ids.astype(np.int64)).to(network.device)
    at = torch.from_numpy(where[chosen]).to(network.device)
    if "logits_to_keep" in inspect.signature(lm.forward).parameters:
        logits = lm(input_ids=ids[None], use_cache=False, logits_to_keep=at - 1).logits[0]
    else:
        logits = lm(input_ids=ids[None], use_cache=False).logits[0, at - 1]
    rounding = torch.finfo(logits.dtype).eps * logits.abs().amax(-1)
    wide = logits if logits.dtype == torch.float64 else logits.float()
    own = wide.log_softmax(-1).gather(1, ids[at, None])[:, 0]
    return (token_logps[torch.from_numpy(chosen).to(own.device)] - own).abs(), rounding
