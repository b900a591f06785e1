"""Packed and padded layouts are the same computation, through real transformers models."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from align.models.policy import Policy, enable_activation_checkpointing, lora, prompt_ends
from align.objectives.losses import Sigmoid
from align.packing import micro_batches, pack, pack_groups
from align.types import Example, Row
from tests.conftest import pair_of, plain_dpo, random_pair, tiny_model

FAMILIES = ["llama", "qwen2", "mistral", "gemma2"]


def naive_logps(model, pair: Example) -> list[torch.Tensor]:
    """Log-probs of both sequences, one at a time, full logits, stock attention: the definition."""
    out = []
    for row in (pair.rows[0], pair.rows[1]):
        ids = torch.from_numpy(row.token_ids.astype(np.int64))[None]
        logits = model(input_ids=ids).logits[0]
        token = torch.log_softmax(logits[:-1], -1).gather(1, ids[0, 1:, None])[:, 0]
        out.append(token[torch.from_numpy(row.targets[1:])].sum())
    return out


def naive_dpo(model, pairs, reference, beta):
    logps = torch.stack([torch.stack(naive_logps(model, p)) for p in pairs])
    with torch.no_grad():
        ref = torch.stack([torch.stack(naive_logps(reference, p)) for p in pairs])
    d = logps - ref
    return -torch.nn.functional.logsigmoid(beta * (d[:, 0] - d[:, 1])).sum() / len(pairs)


def gradients(model) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def packed_dpo(policy, reference, pairs, parts, beta=0.1, layout="shared"):
    """Loss and gradients by micro-batches, divided by the global number of pairs."""
    objective = plain_dpo(beta=beta, loss=Sigmoid(0.0))
    total = 0.0
    for part in parts:
        batch = pack([pairs[i] for i in part], layout)
        with torch.no_grad():
            ref = reference(batch)
        term = objective(policy(batch), ref, batch).terms[0]
        loss = term.losses.sum() / len(pairs)
        loss.backward()
        total += float(loss.detach())
    return total


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layout", ["shared", "packed", "padded"])
@pytest.mark.parametrize("recompute", ["off", "selective", "full"])
def test_layout_equals_one_row_at_a_time_float64(family, layout, recompute, make_pairs):
    # float64: loss to 1e-10; gradients to 1e-6 because transformers computes norms in float32. Gemma 2's
    # stock attention takes its softmax in float32, so there the comparison itself is good to 1e-6 only.
    tolerance = 1e-6 if family == "gemma2" else 1e-10
    pairs = make_pairs(7)
    model, reference = tiny_model(family), tiny_model(family, seed=1)
    expected = naive_dpo(model, pairs, reference, 0.1)
    expected.backward()
    truth = gradients(model)
    model.zero_grad()

    policy = Policy(model, layout)
    enable_activation_checkpointing(policy, recompute)
    policy.train()
    loss = packed_dpo(policy, Policy(reference, layout), pairs, [[0, 1, 2], [3, 4, 5, 6]], layout=layout)

    assert abs(loss - expected.item()) <= tolerance * max(1, abs(expected.item()))
    assert float((gradients(model) - truth).norm() / truth.norm()) <= max(1e-6, 3 * tolerance)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("layout", ["shared", "packed"])
def test_float32_error_is_at_most_twice_the_naive_paths(family, layout, make_pairs):
    # root mean square over 48 rows and over the gradient: a single number's rounding is luck
    pairs = make_pairs(24)
    exact = tiny_model(family)

    def logps_and_gradient(policy: Policy) -> tuple[torch.Tensor, torch.Tensor]:
        logps = policy(pack(pairs, policy.layout)).logps
        z = 0.1 * (logps[0::2] - logps[1::2])
        (-torch.nn.functional.logsigmoid(z)).mean().backward()
        return logps.detach().double(), gradients(policy).double()

    single = copy.deepcopy(exact).float()
    truth = logps_and_gradient(Policy(exact, "padded"))
    naive = logps_and_gradient(Policy(copy.deepcopy(single), "padded"))
    ours = logps_and_gradient(Policy(copy.deepcopy(single), layout))
    for true, theirs, our in zip(truth, naive, ours, strict=True):
        assert float((our - true).norm()) <= 2 * float((theirs - true).norm())


def test_rows_do_not_depend_on_mates_order_or_micro_batching(make_pairs):
    pairs = make_pairs(9)
    policy = Policy(tiny_model("llama"), "shared")
    alone = [policy(pack([p], "shared")).logps.detach() for p in pairs]
    order = [5, 0, 8, 2, 7, 1, 3, 6, 4]
    together = policy(pack([pairs[i] for i in order], "shared")).logps.detach().view(-1, 2)
    for k, i in enumerate(order):
        torch.testing.assert_close(together[k], alone[i], rtol=0, atol=1e-10)


def test_gradient_is_the_same_for_every_split_into_micro_batches(make_pairs):
    pairs = make_pairs(8)
    reference = Policy(tiny_model("llama", seed=1), "shared")
    found = []
    for parts in ([list(range(8))], [[0, 1], [2, 3], [4, 5], [6, 7]], [[0], [1, 2, 3, 4, 5, 6], [7]]):
        policy = Policy(tiny_model("llama"), "shared")
        loss = packed_dpo(policy, reference, pairs, parts)
        found.append((loss, gradients(policy)))
    for loss, gradient in found[1:]:
        assert abs(loss - found[0][0]) < 1e-12
        assert float((gradient - found[0][1]).norm() / found[0][1].norm()) < 1e-6


def test_lora_adapter_off_is_the_base_model_and_frozen_head_has_the_same_gradient(make_pairs):
    pairs = make_pairs(5)
    base = tiny_model("llama")
    expected = Policy(copy.deepcopy(base), "shared")(pack(pairs, "shared")).logps.detach()
    model = lora(base, rank=4, alpha=8, dropout=0.0, targets="all-linear", seed=0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(generator=torch.Generator().manual_seed(len(name)))
    policy = Policy(model, "shared")
    policy.train()
    batch = pack(pairs, "shared")
    with policy.as_reference():
        reference = policy(batch)
    torch.testing.assert_close(reference.logps, expected, rtol=0, atol=1e-12)
    assert policy.training

    def adapter_gradient() -> torch.Tensor:
        policy.zero_grad()
        plain_dpo(0.1, Sigmoid(0.0))(policy(batch), reference, batch).terms[0].losses.sum().backward()
        return torch.cat([p.grad.flatten() for n, p in policy.named_parameters() if "lora_" in n])

    frozen = adapter_gradient()
    policy.causal_lm.get_output_embeddings().weight.requires_grad_(True)  # now the recomputing head runs
    recomputed = adapter_gradient()
    torch.testing.assert_close(frozen, recomputed, rtol=1e-6, atol=1e-9)


def test_recompute_runs_with_lora(make_pairs):
    # embeddings are frozen: a checkpointed first layer must not lose the adapters' gradient
    pairs = make_pairs(4)
    found = {}
    for mode in ("off", "selective", "full"):
        model = lora(tiny_model("llama"), rank=2, alpha=4, dropout=0.0, targets="all-linear", seed=3)
        with torch.no_grad():
            for name, p in model.named_parameters():
                if "lora_B" in name:
                    p.normal_(generator=torch.Generator().manual_seed(7))
        policy = Policy(model, "shared")
        enable_activation_checkpointing(policy, mode)
        policy.train()
        policy(pack(pairs, "shared")).logps.sum().backward()
        found[mode] = torch.cat([p.grad.flatten() for n, p in policy.named_parameters() if "lora_" in n])
    torch.testing.assert_close(found["selective"], found["off"], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found["full"], found["off"], rtol=1e-9, atol=1e-9)


def test_shared_stream_holds_each_common_token_once(rng):
    # prompt of 5 (drawn by its seed), 3 common answer tokens, then they part
    pair = random_pair(rng, prompt=(4, 5), shared_answer=3)
    a, b = pair.rows[0].token_ids, pair.rows[1].token_ids
    batch = pack([pair], "shared")
    assert len(batch.input_ids) == len(a) + len(b) - 8 - int(a[8] == b[8])
    # the rejected answer's targets inside the shared part point at the chosen sequence's tokens
    assert batch.target_index[batch.row == 0][:3].tolist() == [4, 5, 6]
    assert batch.target_index[batch.row == 1][:3].tolist() == [4, 5, 6]
    assert batch.target_ids[batch.row == 1].tolist() == b[5:].tolist()


def test_rejected_that_is_a_prefix_of_chosen_needs_no_segment(rng):
    pair = random_pair(rng, completion=(6, 7))
    short = pair_of(
        pair.rows[0],
        type(pair.rows[0])(pair.rows[0].token_ids[:-2], pair.rows[0].targets[:-2]),
        "x:1",
        "",
    )
    batch = pack([short], "shared")
    assert len(batch.segments) == 1
    model = tiny_model("llama")
    expected = [v.item() for v in naive_logps(model, short)]
    assert Policy(model, "shared")(batch).logps.tolist() == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize("layout", ["shared", "packed", "padded"])
def test_micro_batches_hold_every_pair_once_within_the_budget(layout, make_pairs):
    pairs = make_pairs(40)
    parts = micro_batches([p.rows for p in pairs], [p.source for p in pairs], layout, 120)
    assert sorted(i for part in parts for i in part) == list(range(40))
    assert max(len(pack([pairs[i] for i in part], layout).input_ids) for part in parts) <= 120


def test_pair_over_the_budget_is_named_with_the_cure(make_pairs):
    pairs = make_pairs(3)
    with pytest.raises(ValueError, match=r"random:.*trainer.micro_batch_tokens=5; use at least \d+"):
        micro_batches([p.rows for p in pairs], [p.source for p in pairs], "shared", 5)


POOLS = [
    entry
    for entry in json.loads((Path(__file__).parent / "vectors" / "reward_public.json").read_text())
    if entry["algorithm"] == "last_token_pooling"
]


@pytest.mark.parametrize("entry", POOLS, ids=lambda e: e["name"])
@pytest.mark.parametrize("layout", ["shared", "packed", "padded"])
def test_a_sequence_ends_where_its_tokens_end_whatever_their_ids(entry, layout):
    """Vectors: the index by the attention mask is required, the one by the padding's id is transformers' own."""
    ids, mask = (np.array(entry["inputs"][name]) for name in ("input_ids", "attention_mask"))
    rows = [Row(i[m == 1].astype(np.int32), np.arange(m.sum()) == 1) for i, m in zip(ids, mask, strict=True)]
    batch = pack_groups([rows], layout, ["x:1"])
    wanted = entry["expected"]["index_from_attention_mask"]
    first = mask.argmax(1)  # left padding moves all positions by as much
    lengths = [w - f for w, f in zip(wanted, first.tolist(), strict=True)]
    assert batch.position_ids[batch.last_index].tolist() == lengths
    assert batch.input_ids[batch.last_index].tolist() == [i[w] for i, w in zip(ids, wanted, strict=True)]
    for n, row in enumerate(rows):  # the position before the one target of each: the end of the prompt
        assert batch.input_ids[prompt_ends(batch)[n]] == row.token_ids[0]
    if entry["config"]["pad_token_id"] == entry["config"]["eos_token_id"]:
        assert wanted != entry["expected"]["index_from_pad_id"]
