"""The field's formats of a preference row, and what each becomes."""

from __future__ import annotations

import pytest

from align.data.pairs import example
from align.data.sources import BadRow
from align.pretrained import byte_tokenizer

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
    rows = [TOKENIZER.decode(row.token_ids) for row in (found.pair.chosen, found.pair.rejected)]
    assert all(row.startswith(head) for row in rows)
    for row in (found.pair.chosen, found.pair.rejected):
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
    pair = example({"prompt": "F", "chosen": "C", "rejected": "D", "origin": "human"}, "f:7", TOKENIZER, 9).pair
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
        assert len(example(record, "f:1", TOKENIZER, limit).pair.chosen.token_ids) == 12
        return
    with pytest.raises(BadRow) as caught:
        example(record, "f:1", TOKENIZER, limit)
    assert caught.value.reason == reason


def test_tool_messages_between_answers_are_context():
    call, result = {"role": "assistant", "content": "look(fish)"}, {"role": "tool", "content": "cod"}
    pair = example({"prompt": [USER], "chosen": [call, result, COD], "rejected": [COW]}, "f:1", TOKENIZER, 1000).pair
    written = TOKENIZER.decode(pair.chosen.token_ids[pair.chosen.targets])
    assert written == "look(fish)<|im_end|>Cod.<|im_end|>"
