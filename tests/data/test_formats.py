"""The field's formats of a preference row, and what each becomes."""

from __future__ import annotations

import numpy as np
import pytest

from align.data.examples import assign_mismatched
from align.data.sources import BadRow
from align.data.wanted import Wanted
from align.models.pretrained import byte_tokenizer
from tests.data.helpers import example, examples

TOKENIZER = byte_tokenizer()
SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "Name a fish."}
MORE = {"role": "user", "content": "And a tree?"}
COD, COW, OAK, ELM = ({"role": "assistant", "content": text} for text in ("Cod.", "Cow.", "Oak.", "Elm."))
HEAD = "<|im_start|>user\nName a fish.<|im_end|>\n<|im_start|>assistant\n"


def parts(record: dict) -> tuple[str, str, str]:
    """Prompt as generation meets it, and what the two rows hold after it."""
    found = example(record, "f:1", TOKENIZER, 1000)
    head = TOKENIZER.decode(list(found.prompt.token_ids))
    rows = [TOKENIZER.decode(row.token_ids) for row in (found.rows[0], found.rows[1])]
    assert all(row.startswith(head) for row in rows)
    for row in (found.rows[0], found.rows[1]):
        assert not row.targets[0]
        assert row.targets[-1]
    return head, rows[0].removeprefix(head), rows[1].removeprefix(head)


CHAT = (HEAD, "Cod.<|im_end|>", "Cow.<|im_end|>")
LATE = "Cod.<|im_end|>\n<|im_start|>user\nAnd a tree?<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(
    "record, expected",
    [
        ({"prompt": "Fish? ", "chosen": "Cod.", "rejected": "Cow."}, ("Fish? ", "Cod.<|im_end|>", "Cow.<|im_end|>")),
        (
            {"prompt": "Fish? ", "chosen": "Cod.<|im_end|>", "rejected": "Cow."},
            ("Fish? ", "Cod.<|im_end|>", "Cow.<|im_end|>"),
        ),
        ({"prompt": [USER], "chosen": [COD], "rejected": [COW]}, CHAT),
        ({"prompt": [USER], "chosen": "Cod.", "rejected": "Cow."}, CHAT),
        ({"chosen": [USER, COD], "rejected": [USER, COW]}, CHAT),
        ({"prompt": None, "chosen": [USER, COD], "rejected": [USER, COW]}, CHAT),
        ({"prompt": "Name a fish.", "chosen": [USER, COD], "rejected": [USER, COW]}, CHAT),  # UltraFeedback
        (
            {"chosen": [USER, COD, MORE, OAK], "rejected": [USER, COD, MORE, ELM]},
            (HEAD + LATE, "Oak.<|im_end|>", "Elm.<|im_end|>"),
        ),
        # one conversation begins as the other ends: the answers are what the policy wrote, all of them
        ({"chosen": [USER, COD], "rejected": [USER, COD, MORE, ELM]}, (HEAD, CHAT[1], LATE + "Elm.<|im_end|>")),
        (
            {"chosen": "Q: a fish? A: Cod.", "rejected": "Q: a fish? A: Cow."},
            ("Q: a fish? A:", " Cod.<|im_end|>", " Cow.<|im_end|>"),
        ),
        ({"chosen": "Q\n\nCod", "rejected": "Q\n\nCow"}, ("Q\n\n", "Cod<|im_end|>", "Cow<|im_end|>")),
        ({"chosen": "a b", "rejected": "a b c"}, ("a", " b<|im_end|>", " b c<|im_end|>")),
        (
            {"prompt": [USER], "chosen": "Cod.", "rejected": "Cow", "rejected_finished": False},
            (HEAD, "Cod.<|im_end|>", "Cow"),
        ),
        (
            {"prompt": "Fish? ", "chosen": "Cod", "rejected": "Cow", "chosen_finished": False},
            ("Fish? ", "Cod", "Cow<|im_end|>"),
        ),
        ({"prompt": "F", "chosen": "C", "rejected": "D", "chosen_finished": None}, ("F", "C<|im_end|>", "D<|im_end|>")),
    ],
)
def test_formats(record, expected):
    assert parts(record) == expected


def test_prompt_text_is_the_last_user_message():
    record = {"prompt": [SYSTEM, USER, COD, MORE], "chosen": "Oak.", "rejected": "Elm."}
    assert example(record, "f:1", TOKENIZER, 1000).prompt.text == "And a tree?"
    assert example({"prompt": "F", "chosen": "C", "rejected": "D"}, "f:1", TOKENIZER, 9).prompt.text == "F"


def test_source_and_origin():
    pair = example({"prompt": "F", "chosen": "C", "rejected": "D", "origin": "human"}, "f:7", TOKENIZER, 9)
    assert (pair.source, pair.origin) == ("f:7", "human")


def test_same_answer_cut_off_is_another_answer():
    """Texts that differ in the end of turn only would be a pair; equal texts are refused before."""
    with pytest.raises(BadRow, match="same") as caught:
        example({"prompt": "F", "chosen": "C", "rejected": "C", "rejected_finished": False}, "f:1", TOKENIZER, 9)
    assert caught.value.reason == "identical"


def test_answers_that_differ_in_what_the_template_drops_are_identical():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace("message['content']", "message['content'] | trim")
    with pytest.raises(BadRow, match="same tokens"):
        example({"prompt": [USER], "chosen": "Cod.", "rejected": "Cod. "}, "f:1", tokenizer, 1000)


@pytest.mark.parametrize("limit, reason", [(6, "prompt_too_long"), (7, "too_long"), (11, "too_long"), (12, None)])
def test_length_limit(limit, reason):
    """Prompt 6 bytes, the longer answer 5 bytes and the end of turn: 12 tokens fit into 12."""
    record = {"prompt": "Fish? ", "chosen": "Trout", "rejected": "Cow"}
    if reason is None:
        assert len(example(record, "f:1", TOKENIZER, limit).rows[0].token_ids) == 12
        return
    with pytest.raises(BadRow) as caught:
        example(record, "f:1", TOKENIZER, limit)
    assert caught.value.reason == reason


def test_tool_messages_between_answers_are_context():
    call = {
        "role": "assistant",
        "content": "look(fish)",
        "tool_calls": [{"function": {"name": "look", "arguments": {}}}],
    }
    result = {"role": "tool", "content": "cod"}
    pair = example({"prompt": [USER], "chosen": [call, result, COD], "rejected": [COW]}, "f:1", TOKENIZER, 1000)
    written = TOKENIZER.decode(pair.rows[0].token_ids[pair.rows[0].targets])
    assert written == 'look(fish)<tool_call>{"name": "look", "arguments": {}}</tool_call><|im_end|>Cod.<|im_end|>'


# ---------------------------------------------------------------------- labelled rows, rows to imitate, other kinds


def learnt(rows) -> list[str]:
    return [TOKENIZER.decode(row.token_ids[row.targets]) for row in rows]


@pytest.mark.parametrize(
    "record, label, expected",
    [
        ({"prompt": "Fish? ", "completion": "Cod.", "label": True}, True, "Cod.<|im_end|>"),
        ({"prompt": [USER], "completion": "Cow.", "label": False}, False, "Cow.<|im_end|>"),
        ({"prompt": [USER], "completion": [COW], "label": False}, False, "Cow.<|im_end|>"),
        ({"messages": [SYSTEM, USER, COD, MORE, OAK], "label": True}, True, "Cod.<|im_end|>Oak.<|im_end|>"),
    ],
)
def test_labelled(record, label, expected):
    (found,) = examples(record, TOKENIZER, Wanted("labelled"))
    assert found.label is label
    assert learnt(found.rows) == [expected]
    assert found.prompt.text in ("Fish? ", "Name a fish.")


def test_single():
    for record in (
        {"messages": [USER, COD, MORE, OAK]},
        {"conversations": [{"from": "human", "value": "Name a fish."}, {"from": "gpt", "value": "Cod."},
                           {"from": "human", "value": "And a tree?"}, {"from": "gpt", "value": "Oak."}]},
    ):  # fmt: skip
        (found,) = examples(record, TOKENIZER, Wanted("single"))
        assert learnt(found.rows) == ["Cod.<|im_end|>Oak.<|im_end|>"]
    (found,) = examples({"text": "Once upon a time"}, TOKENIZER, Wanted("single"))
    assert learnt(found.rows) == ["Once upon a time<|im_end|>"]
    assert found.prompt.token_ids == ()


def test_roles_that_are_learnt():
    record = {"messages": [SYSTEM, USER, COD]}
    (found,) = examples(record, TOKENIZER, Wanted("single"), target_roles=["assistant", "user"])
    assert "Name a fish." in learnt(found.rows)[0]
    assert "Be brief." not in learnt(found.rows)[0]


def test_a_pair_serves_all_three_kinds():
    record = {"prompt": [USER], "chosen": [COD], "rejected": [COW], "origin": "x"}
    a, b = examples(record, TOKENIZER, Wanted("labelled"))
    assert (a.label, b.label, a.origin) == (True, False, "x")
    assert learnt((*a.rows, *b.rows)) == ["Cod.<|im_end|>", "Cow.<|im_end|>"]
    (only,) = examples(record, TOKENIZER, Wanted("single"))
    assert learnt(only.rows) == ["Cod.<|im_end|>"]


@pytest.mark.parametrize(
    "record, kind", [({"messages": [USER, COD]}, "pair"), ({"messages": [USER, COD]}, "labelled"),
                     ({"messages": [USER, COD], "label": True}, "pair")],
)  # fmt: skip
def test_wrong_kind_is_told_with_the_cure(record, kind):
    with pytest.raises(ValueError, match=r"f:1: the row is \w+, the objective needs"):
        examples(record, TOKENIZER, Wanted(kind))


def test_only_desirable_rows_are_imitated():
    with pytest.raises(BadRow, match="undesirable"):
        examples({"messages": [USER, COW], "label": False}, TOKENIZER, Wanted("single"))


def test_weights_of_turns():
    record = {"messages": [USER, COD | {"weight": 0}, MORE, OAK | {"weight": 0.5}]}
    (found,) = examples(record, TOKENIZER, Wanted("single"))
    row = found.rows[0]
    assert learnt(found.rows) == ["Oak.<|im_end|>"]
    assert set(row.weights[row.targets].tolist()) == {0.5}


def test_late_branches_keep_or_lose_their_common_targets():
    """From the prompt on everything is learnt, or only from the first token that differs (here 'k' against 'r')."""
    record = {"prompt": [USER], "chosen": [COD, MORE, OAK], "rejected": [COD, MORE, OAK | {"content": "Oar."}]}
    (found,) = examples(record, TOKENIZER, Wanted())
    assert learnt(found.rows) == ["Cod.<|im_end|>Oak.<|im_end|>", "Cod.<|im_end|>Oar.<|im_end|>"]
    (found,) = examples(record, TOKENIZER, Wanted(), targets="divergent")
    assert learnt(found.rows) == ["k.<|im_end|>", "r.<|im_end|>"]


def test_tokenised_trajectories():
    spans = [["user", 0, 2, False], ["assistant", 2, 4, True], ["tool", 4, 5, False], ["assistant", 5, 7, True]]
    chosen = {"token_ids": [1, 2, 3, 4, 5, 6, 7], "spans": spans, "messages": [USER]}
    rejected = {"token_ids": [1, 2, 9], "spans": [["user", 0, 2, False], ["assistant", 2, 3, True]]}
    (found,) = examples({"chosen": chosen, "rejected": rejected}, TOKENIZER, Wanted())
    assert found.rows[0].token_ids.tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert np.flatnonzero(found.rows[0].targets).tolist() == [2, 3, 5, 6]
    assert (found.prompt.token_ids, found.prompt.text) == ((1, 2), "Name a fish.")
    with pytest.raises(BadRow, match="begin with other tokens") as caught:
        examples({"chosen": chosen, "rejected": rejected | {"token_ids": [1, 8, 9]}}, TOKENIZER, Wanted())
    assert caught.value.reason == "different_prompts"


def test_turns_are_cut_down_to_an_answer_that_fits():
    record = {"messages": [USER, COD, MORE, OAK, MORE, ELM]}
    whole = len(examples(record, TOKENIZER, Wanted("single"))[0].rows[0].token_ids)
    (found,) = examples(record, TOKENIZER, Wanted("single"), max_tokens=whole - 1, overlong="truncate_turns")
    assert learnt(found.rows) == ["Cod.<|im_end|>Oak.<|im_end|>"]
    with pytest.raises(BadRow, match="data.max_tokens") as caught:
        examples(record, TOKENIZER, Wanted("single"), max_tokens=whole - 1, overlong="drop")
    assert caught.value.reason == "too_long"


def test_pair_that_truncation_makes_equal_is_dead():
    """TRL keeps such pairs: their gradient is zero."""
    record = {"prompt": [USER], "chosen": [COD, MORE, OAK], "rejected": [COD, MORE, ELM]}
    limit = len(examples(record, TOKENIZER, Wanted())[0].rows[0].token_ids) - 1
    with pytest.raises(BadRow, match="after truncation") as caught:
        examples(record, TOKENIZER, Wanted(), max_tokens=limit, overlong="truncate_turns")
    assert caught.value.reason == "dead_pair"


def test_whole_chosen_and_rationale_columns():
    record = {"prompt": [USER], "chosen": [COD], "rejected": [COW], "rationale": "A cod is a fish."}
    (found,) = examples(record, TOKENIZER, Wanted("pair", ("chosen_whole", "rationale")))
    assert found.rows[2].targets.tolist() == [False] + [True] * (len(found.rows[0].token_ids) - 1)
    assert learnt(found.rows[3:]) == ["A cod is a fish.<|im_end|>"]
    shown = TOKENIZER.decode(found.rows[3].token_ids)
    first, better = shown.index("Cod.") < shown.index("Cow."), "answer A better" in shown
    assert first == better
    with pytest.raises(BadRow, match="'rationale' is missing"):
        examples(record | {"rationale": None}, TOKENIZER, Wanted("pair", ("rationale",)))


def test_which_answer_a_rationale_shows_first_is_mixed():
    rows = [{"prompt": f"Number {i}?", "chosen": "yes", "rejected": "no", "rationale": "Because."} for i in range(40)]
    shown = [
        TOKENIZER.decode(examples(r, TOKENIZER, Wanted("pair", ("rationale",)))[0].rows[2].token_ids) for r in rows
    ]
    assert 8 < sum("answer A better" in text for text in shown) < 32


# ---------------------------------------------------------------------- mismatched rows


def labelled(prompts):
    records = [{"prompt": p, "completion": f"answer {i}", "label": True} for i, p in enumerate(prompts)]
    return [e for r in records for e in examples(r, TOKENIZER, Wanted("labelled"))]


@pytest.mark.parametrize("prompts", ["ab", "aab", "aaab", "abab", "aabbcc", "abcdefghij", "aaaaaaaaab"])
@pytest.mark.parametrize("seed", range(4))
def test_partner_has_another_prompt(prompts, seed):
    found = assign_mismatched(labelled(prompts), seed, 1000)
    for i, e in enumerate(found):
        text = TOKENIZER.decode(e.extras["mismatched"].token_ids)
        assert text.startswith(prompts[i] + "answer ")
        partner = int(text.removeprefix(prompts[i] + "answer ").removesuffix("<|im_end|>"))
        assert prompts[partner] != prompts[i]
        assert learnt([e.extras["mismatched"]]) == [f"answer {partner}<|im_end|>"]


def test_partners_are_fixed_by_the_seed_and_cut_at_the_limit():
    rows = labelled("abcdefghij")
    first, again, other = (assign_mismatched(rows, seed, 9) for seed in (0, 0, 1))
    ids = [[e.extras["mismatched"].token_ids.tolist() for e in found] for found in (first, again, other)]
    assert ids[0] == ids[1] != ids[2]
    assert {len(i) for i in ids[0]} == {9}
    with pytest.raises(ValueError, match="two different prompts"):
        assign_mismatched(labelled("aa"), 0, 100)
