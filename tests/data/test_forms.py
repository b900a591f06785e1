"""Each form on rows in the shape of the public sets, written by hand, and on rows that it must leave out or refuse."""

from __future__ import annotations

import copy
import json

import pytest

from align.cli import main
from align.data.audit import LEFT_OUT, TIE
from align.data.formats import Tokenised, parse
from align.data.forms import FORMS, nearest
from align.data.load import load
from align.data.prompts import load_prompts
from align.data.sources import BadRow, NotUsed
from align.models.pretrained import byte_tokenizer
from tests.data.helpers import settings

ASKED = {"role": "user", "content": "Name a fish."}
HUMAN = "\n\nHuman: Name a fish.\n\nAssistant:"


def said(text, role="assistant"):
    return {"role": role, "content": text}


def read(name, *rows):
    """What a form makes of rows: rows, and the reasons of those that are left out without fault. Raises BadRow."""
    made, left = [], []
    for where, row in FORMS[name].rows((f"f:{i}", copy.deepcopy(row)) for i, row in enumerate(rows, 1)):
        assert where.startswith("f:")
        if isinstance(row, NotUsed):
            left.append(row.reason)
        elif isinstance(row, BadRow):
            raise row
        else:
            made.append(row)
    return made, left


def learnt(row):
    """Kind of a row, its prompt as text or messages, and its answers, as the framework reads them."""
    record = parse(row)
    sides = list(record.sides.values())
    assert not any(isinstance(side, Tokenised) for side in sides)
    answers = [
        side.completion
        if isinstance(side.completion, str)
        else [m["content"] for m in side.completion if m["role"] == "assistant"]
        for side in sides
    ]
    return record.kind, sides[0].prompt, answers


@pytest.mark.parametrize("name", FORMS)
def test_the_example_of_each_form_is_read(name):
    form = FORMS[name]
    made, left = read(name, *form.example)
    assert made
    assert not left
    for row in made:
        kind, prompt, answers = learnt(row)
        assert kind in ("pair", "ranked", "single")
        assert "Human:" not in str(prompt)
        assert all(answers)
    assert form.line
    assert set().union(*form.example) <= set(form.columns)
    assert nearest(form.example[0])


ULTRAFEEDBACK = {
    "source": "evol_instruct",
    "instruction": "Name a fish.",
    "models": ["alpaca-7b", "gpt-4", "wizardlm-7b"],
    "completions": [
        {
            "annotations": {
                "helpfulness": {"Rating": helpful, "Rationale": "...", "Type": ["1"]},
                "honesty": {"Rating": honest, "Rationale": "..."},
                "instruction_following": {"Rating": "4", "Rationale": "..."},
                "truthfulness": {"Rating": "4", "Rationale": "...", "Type": ["None"]},
            },
            "custom_system_prompt": "As an AI assistant, answer truthfully.",
            "model": "alpaca-7b",
            "principle": "helpfulness",
            "response": text,
            "critique": "...",
            "overall_score": score,
            "fine-grained_score": 3.5,
        }
        for text, score, helpful, honest in (
            ("Oak.", 2.0, "1", "2"),
            ("Cod.", 9.0, "3", "N/A"),
            ("A cod.", 7.5, "5", "5"),
        )
    ],
    "correct_answers": ["None"],
    "incorrect_answers": ["None"],
}
HELPSTEER = [
    {
        "prompt": "Name a fish.",
        "response": "Oak.",
        "helpfulness": 1,
        "correctness": 0,
        "coherence": 4,
        "complexity": 1,
        "verbosity": 1,
    },
    {
        "prompt": "Name a fish.",
        "response": "Cod.",
        "helpfulness": 4,
        "correctness": 4,
        "coherence": 4,
        "complexity": 1,
        "verbosity": 0,
    },
]
SAFE = {
    "prompt": "Name a fish.",
    "response_0": "Cod.",
    "response_1": "Oak.",
    "prompt_source": "...",
    "is_response_0_safe": False,
    "is_response_1_safe": True,
    "response_0_harm_category": {"Endangering National Security": False},
    "response_0_severity_level": 1,
    "response_1_severity_level": 0,
    "better_response_id": 0,
    "safer_response_id": 1,
}
TWO = {"prompt": "?", "response_0": "Cod.", "response_1": "Oak."}
CHAT = [ASKED, said("Cod."), said("Another?", "user")]
ARENA = {
    "question_id": "58210e39",
    "model_a": "vicuna-13b",
    "model_b": "koala-13b",
    "winner": "model_b",
    "judge": "arena_user_973",
    "conversation_a": [*CHAT, said("Oak.")],
    "conversation_b": [*CHAT, said("Eel.")],
    "turn": 2,
}


def blocks(*messages):
    return [
        {"role": m["role"], "content": [{"type": "text", "text": m["content"], "image": None, "mimeType": None}]}
        for m in messages
    ]


@pytest.mark.parametrize(
    "name, row, wanted",
    [
        (
            "alpaca",
            {"instruction": "Name it.", "input": "a fish", "output": "Cod.", "text": "### Response: Cod."},
            ("single", "Name it.\n\na fish", ["Cod."]),
        ),
        (
            "alpaca",
            {"instruction": "Name a fish.", "input": "", "output": "Cod."},
            ("single", "Name a fish.", ["Cod."]),
        ),
        (
            "ranked",
            {
                "prompt": "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: Name a fish.\n\nAssistant: ",
                "answers": [
                    {"answer": "Oak.", "model": "a", "rank": 3.0},
                    {"answer": "Cod.", "model": "b", "rank": 1.0},
                    {"answer": "Fish.", "model": "c", "rank": 2.0},
                ],
                "turns": 2,
                "num_responses": 3,
                "source": ["lmsys-chat-1m"],
                "good_natured": True,
            },
            ("ranked", (said("Hi", "user"), said("Hello."), ASKED), [["Cod."], ["Fish."], ["Oak."]]),
        ),
        ("scored", ULTRAFEEDBACK, ("ranked", "Name a fish.", ["Cod.", "A cod.", "Oak."])),
        ("rated", ULTRAFEEDBACK, ("ranked", "Name a fish.", ["A cod.", "Cod.", "Oak."])),
        (
            "scored",  # distilabel's lists side by side
            {"input": "Name a fish.", "generations": ["Oak.", "Cod."], "ratings": [1.0, 5.0]},
            ("ranked", "Name a fish.", ["Cod.", "Oak."]),
        ),
        ("attributes", HELPSTEER[0], ("single", "Name a fish.", ["Oak."])),
        ("comparison", TWO | {"prompt": "User: who?", "choice": 0}, ("pair", "User: who?", ["Cod.", "Oak."])),
        ("comparison", SAFE, ("pair", "Name a fish.", ["Cod.", "Oak."])),
        ("safer", SAFE, ("pair", "Name a fish.", ["Oak.", "Cod."])),
        (
            "comparison",
            {
                "domain": "general",
                "language": "english",
                "context": [said("Hi", "user"), said("Hello."), ASKED],
                "response1": "Oak.",
                "response2": "Cod.",
                "overall_preference": 2,
                "individual_preference": [{"score": 2, "reasoning": "...", "feedback1": "...", "feedback2": "..."}],
            },
            ("pair", (said("Hi", "user"), said("Hello."), ASKED), [["Cod."], ["Oak."]]),
        ),
        (
            "comparison",
            {
                "split": "train",
                "prompt": "Hi\n<extra_id_1>Assistant\nHello.\n<extra_id_1>User\nName a fish.",
                "response_1": "Cod.",
                "response_2": "Oak.",
                "preference_strength": -1,
                "preference_statement": "Response 1 is slightly better.",
            },
            ("pair", (said("Hi", "user"), said("Hello."), ASKED), [["Cod."], ["Oak."]]),
        ),
        (
            "comparison",  # AlpacaFarm
            {"instruction": "Name it.", "input": "a fish", "output_1": "Oak.", "output_2": "Cod.", "preference": 2},
            ("pair", "Name it.\n\na fish", ["Cod.", "Oak."]),
        ),
        (
            "comparison",
            {"question": "Name a fish.", "response_a": "Oak.", "response_b": "Cod.", "preference": "B"},
            ("pair", "Name a fish.", ["Cod.", "Oak."]),
        ),
        (
            "comparison",
            {
                "question": "Name a fish.",
                "model_answer": "x",
                "response_0": "Oak.",
                "response_1": "Cod.",
                "preferred_index": 1.0,
            },
            ("pair", "Name a fish.", ["Cod.", "Oak."]),
        ),
        (
            "comparison",
            {"question": "Name a fish.", "responseA": [said("Oak.")], "responseB": [said("Cod.")], "verdict": "[[B]]"},
            ("pair", (ASKED,), [["Cod."], ["Oak."]]),
        ),
        (
            "comparison",
            {"question": "Name a fish.", "response_a": "Oak.", "response_b": "Cod.", "chosen": "Cod."},
            ("pair", "Name a fish.", ["Cod.", "Oak."]),
        ),
        (
            "comparison",
            {"question": "Name a fish.", "answer_a": "Oak.", "answer_b": "Cod.", "winner": "assistant_b"},
            ("pair", "Name a fish.", ["Cod.", "Oak."]),
        ),
        (
            "ranked",
            {"prompt": "Name a fish.", "responses": ["Oak.", "Cod."], "ranks": [2, 1]},
            ("ranked", "Name a fish.", ["Cod.", "Oak."]),
        ),
        (
            "arena",
            {"messages_1": [ASKED, said("Oak.")], "messages_2": [ASKED, said("Cod.")], "preference": 2},
            ("pair", (ASKED,), [["Cod."], ["Oak."]]),
        ),
        (
            "openai",
            {"input": "Name a fish.", "preferred_output": "Cod.", "non_preferred_output": "Oak."},
            ("pair", "Name a fish.", ["Cod.", "Oak."]),
        ),
        (
            "comparison",
            {"question": "Name a fish.", "answer_a": "Oak.", "answer_b": "Cod.", "winner": "answer_b"},
            ("pair", "Name a fish.", ["Cod.", "Oak."]),
        ),
        (
            "comparison",  # SHP
            {
                "history": "Name a fish.",
                "human_ref_A": "Cod.",
                "human_ref_B": "Oak.",
                "labels": 1,
                "score_A": 9,
                "score_B": 2,
            },
            ("pair", "Name a fish.", ["Cod.", "Oak."]),
        ),
        (
            "comparison",  # WebGPT
            {
                "question": {"dataset": "eli5", "id": "x", "full_text": "Name a fish."},
                "answer_0": "Oak.",
                "score_0": -0.5,
                "answer_1": "Cod.",
                "score_1": 0.5,
            },
            ("pair", "Name a fish.", ["Cod.", "Oak."]),
        ),
        (
            "comparison",  # summarize_from_feedback, after data.columns.prompt=info.post
            {
                "prompt": "Fish.",
                "summaries": [{"text": "Oak.", "policy": "a"}, {"text": "Cod.", "policy": "b"}],
                "choice": 1,
            },
            ("pair", "Fish.", ["Cod.", "Oak."]),
        ),
        ("arena", ARENA, ("pair", tuple(CHAT), [["Eel."], ["Oak."]])),
        (
            "arena",  # the set of 140 000, whose messages are blocks with empty fields
            ARENA
            | {
                "winner": "model_a",
                "conversation_a": blocks(ASKED, said("Cod.")),
                "conversation_b": blocks(ASKED, said("Oak.")),
            },
            ("pair", (ASKED,), [["Cod."], ["Oak."]]),
        ),
        (
            "arena",  # the set of 55 000, whose turns are JSON text
            {
                "id": 30192,
                "prompt": '["Hi", "Name a fish."]',
                "response_a": '["Hello.", "Oak."]',
                "response_b": '["Hello.", "Cod."]',
                "winner_model_a": 0,
                "winner_model_b": 1,
                "winner_tie": 0,
            },
            ("pair", (said("Hi", "user"), said("Hello."), ASKED), [["Cod."], ["Oak."]]),
        ),
        (
            "hh",
            {
                "chosen": "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: Name a fish.\n\nAssistant: Cod: it\n\nswims.",
                "rejected": "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: Name a fish.\n\nAssistant: Oak.",
            },
            ("pair", (said("Hi", "user"), said("Hello."), ASKED), [["Cod: it\n\nswims."], ["Oak."]]),
        ),
        (
            "hh",  # parts early: what the user says later is context, not an answer
            {
                "chosen": "\n\nHuman: Name a fish.\n\nAssistant: Cod.\n\nHuman: And a bird?\n\nAssistant: Heron.",
                "rejected": "\n\nHuman: Name a fish.\n\nAssistant: Oak.\n\nHuman: No.\n\nAssistant: Elm.",
            },
            ("pair", (ASKED,), [["Cod.", "Heron."], ["Oak.", "Elm."]]),
        ),
        (
            "hh",  # a turn begins with a line where none begins behind a blank one
            {
                "chosen": "### User: Name a fish.\n### Assistant: Cod.",
                "rejected": "### User: Name a fish.\n### Assistant: Oak.",
            },
            ("pair", (ASKED,), [["Cod."], ["Oak."]]),
        ),
        (
            "hh",
            {"prompt": "Human: Name a fish.", "chosen": "Assistant: Cod.", "rejected": "Assistant: Oak."},
            ("pair", (ASKED,), [["Cod."], ["Oak."]]),
        ),
        (
            "hh",  # with the prompt in a column
            {"prompt": HUMAN, "response": " Cod.", "chosen": " Cod.", "rejected": " Oak."},
            ("pair", (ASKED,), [["Cod."], ["Oak."]]),
        ),
        (
            "openai",
            {
                "input": {"messages": [said("Be brief.", "system"), ASKED], "tools": [], "parallel_tool_calls": True},
                "preferred_output": [said("Cod.")],
                "non_preferred_output": [{"role": "assistant", "content": [{"type": "text", "text": "Oak."}]}],
            },
            ("pair", (said("Be brief.", "system"), ASKED), [["Cod."], ["Oak."]]),
        ),
        (
            "blocks",
            {"prompt": blocks(ASKED), "chosen": blocks(said("Cod.")), "rejected": [{"type": "text", "text": "Oak."}]},
            ("pair", (ASKED,), [["Cod."], ["Oak."]]),
        ),
        (
            "rewardbench",
            {
                "prompt": "Name a fish.",
                "chosen": "Cod.",
                "chosen_model": "a",
                "rejected": "Oak.",
                "rejected_model": "b",
                "subset": "alpacaeval-easy",
                "id": 0,
            },
            ("pair", "Name a fish.", ["Cod.", "Oak."]),
        ),
        (
            "gsm8k",
            {"question": "3 cod and 2 eels?", "answer": "3 + 2 = <<3+2=5>>5\n#### 5"},
            ("single", "3 cod and 2 eels?", ["3 + 2 = <<3+2=5>>5\n#### 5"]),
        ),
        (
            "math",
            {
                "problem": "Half of 1?",
                "level": "Level 1",
                "type": "Algebra",
                "solution": r"It is $\boxed{\frac{1}{2}}$.",
            },
            ("single", "Half of 1?", [r"It is $\boxed{\frac{1}{2}}$."]),
        ),
    ],
)
def test_rows_of_public_sets(name, row, wanted):
    made, left = read(name, row)
    assert [learnt(row) for row in made] == [wanted]
    assert not left


def test_answers_for_verifiers_stand_in_the_column_answer():
    (row,), _ = read("gsm8k", {"question": "?", "answer": "5 * 250 = 1250\n#### 1,250"})
    assert row["answer"] == "1250"
    (row,), _ = read(
        "math", {"problem": "?", "level": "Level 5", "solution": r"\boxed{1}, no: $\boxed{\frac{\sqrt{3}}{2}}$"}
    )
    assert row["answer"] == r"\frac{\sqrt{3}}{2}"
    assert row["level"] == "Level 5"  # columns that no form reads go to the rewards
    (row,), _ = read("math", {"problem": "?", "answer": 27})  # AIME: problems to be asked only
    assert row == {"prompt": "?", "answer": "27"}


def test_helpsteer_compares_the_neighbours_of_one_prompt():
    other = {**HELPSTEER[0], "prompt": "Name a tree."}
    made, left = read("helpsteer", *HELPSTEER, other, *HELPSTEER[::-1])
    assert [learnt(row) for row in made] == 2 * [("pair", "Name a fish.", ["Cod.", "Oak."])]
    assert left == [LEFT_OUT]  # an answer without another
    assert made[0]["numbers"] == {"margin": 3.0}
    assert made[0]["scores"]["chosen"] == {
        "helpfulness": 4,
        "correctness": 4,
        "coherence": 4,
        "complexity": 1,
        "verbosity": 0,
    }
    third = {**HELPSTEER[0], "response": "Fish.", "helpfulness": 2}
    made, left = read("helpsteer", *HELPSTEER, third)  # HelpSteer 1 has up to four
    assert [learnt(row) for row in made] == [("ranked", "Name a fish.", ["Cod.", "Fish.", "Oak."])]
    (row,), _ = read("attributes", HELPSTEER[1])
    assert row["numbers"]["helpfulness"] == 4


def test_rewardbench2_is_each_right_answer_beside_each_wrong_one():
    row = {
        "id": "1",
        "prompt": "Name a fish.",
        "chosen": ["Cod.", "Eel."],
        "rejected": ["Oak.", "Elm."],
        "num_correct": 2,
        "num_incorrect": 2,
        "total_completions": 4,
        "models": ["a"],
        "subset": "Ties",
        "additional_metadata": {"category": "x"},
    }
    made, _ = read("rewardbench2", row)
    pairs = [["Cod.", "Oak."], ["Cod.", "Elm."], ["Eel.", "Oak."], ["Eel.", "Elm."]]
    assert [learnt(row)[2] for row in made] == pairs
    assert {parse(row).origin for row in made} == {"Ties"}


def test_numbers_of_comparisons():
    (row,), _ = read("safer", SAFE)
    assert parse(row).numbers == {"chosen_safe": 1.0, "rejected_safe": 0.0}
    (row,), _ = read("comparison", SAFE)
    assert parse(row).numbers == {"chosen_safe": 0.0, "rejected_safe": 1.0}
    (row,), _ = read("comparison", {"prompt": "?", "response1": "Cod.", "response2": "Oak.", "overall_preference": -3})
    assert parse(row).numbers == {"margin": 3.0}


@pytest.mark.parametrize(
    "name, row, num_kept, left",
    [
        ("arena", ARENA | {"winner": "tie"}, 0, [TIE]),
        ("arena", ARENA | {"winner": "tie (bothbad)"}, 0, [TIE]),
        ("arena", ARENA | {"winner": "both_bad"}, 0, [TIE]),
        ("arena", ARENA | {"winner": None}, 0, [LEFT_OUT]),
        ("comparison", TWO | {"preference": float("nan")}, 0, [LEFT_OUT]),
        ("comparison", {"prompt": "?", "response1": "a", "response2": "b", "overall_preference": 0}, 0, [TIE]),
        ("comparison", {"prompt": "?", "response1": "a", "response2": "b", "overall_preference": None}, 0, [LEFT_OUT]),
        ("comparison", TWO | {"preference": "tie"}, 0, [TIE]),
        ("comparison", TWO | {"score_0": 1, "score_1": 1.0}, 0, [TIE]),
        ("helpsteer", [HELPSTEER[0], HELPSTEER[1] | {"helpfulness": 1}], 0, [TIE]),
        ("scored", {"prompt": "?", "generations": ["a", "b"], "ratings": [3, 3]}, 0, [TIE, TIE]),
        ("scored", {"prompt": "?", "generations": ["a", "b", "c"], "ratings": [3, 3, 4]}, 1, [TIE]),
        ("scored", {"prompt": "?", "generations": ["a", "b", "c"], "ratings": [3, None, 4]}, 1, [LEFT_OUT]),
        ("scored", {"prompt": "?", "generations": ["a", "a", "b"], "ratings": [3, 5, 4]}, 1, [TIE]),
    ],
)
def test_ties_and_unknown_winners_are_left_out_and_counted(name, row, num_kept, left):
    made, reasons = read(name, *(row if isinstance(row, list) else [row]))
    assert len(made) == num_kept
    assert reasons == left


@pytest.mark.parametrize(
    "name, row, words",
    [
        ("alpaca", {"instruction": "Name a fish.", "completion": "Cod."}, "the column 'output' is missing"),
        (
            "ranked",
            {"prompt": "?", "answers": [{"answer": "a", "rank": 1}, {"answer": "b"}]},
            "answer 2 of answers has no number 'rank'",
        ),
        ("ranked", {"answers": [{"answer": "a", "rank": 1}, {"answer": "b", "rank": 2}]}, "data.columns.prompt=COLUMN"),
        ("scored", {"prompt": "?", "answers": ["a", "b"]}, "have no score"),
        ("scored", {"prompt": "?", "answers": ["a", "b"], "scores": [1]}, "scores has 1 numbers for 2 answers"),
        ("scored", {"prompt": "?", "chosen": "a"}, "no column holds a list of answers"),
        ("rated", {"prompt": "?", "completions": [{"response": "a"}]}, "has no object 'annotations'"),
        ("helpsteer", {"prompt": "?", "chosen": "a"}, None),
        ("attributes", {"prompt": "?", "response": "a"}, "none of the columns helpfulness"),
        ("comparison", TWO, "no column says which answer is better"),
        ("comparison", TWO | {"preference": "C"}, "must name response_0 or response_1"),
        ("comparison", TWO | {"preference": 2}, "must name response_0 or response_1"),
        (
            "comparison",
            {"prompt": "?", "answer_a": "a", "answer_b": "b", "preference": 1},
            "must name answer_a or answer_b",
        ),
        ("comparison", {"prompt": "?", "answers": ["a", "b"], "choice": 2}, "from 0"),
        ("arena", ARENA | {"winner": "vicuna-13b"}, "must name conversation_a or conversation_b"),
        (
            "arena",
            {"prompt": '["a", "b"]', "response_a": '["a"]', "response_b": '["b"]', "winner": "model_a"},
            "2 turns",
        ),
        ("hh", {"prompt": "Name a fish.", "chosen": "Cod.", "rejected": "Oak."}, "chosen must be a transcript"),
        ("hh", {"chosen": HUMAN + " Cod.", "rejected": "Oak."}, "rejected must be a transcript"),
        (
            "openai",
            {"input": {"prompt": "?"}, "preferred_output": [], "non_preferred_output": []},
            "the column 'messages' is missing",
        ),
        (
            "openai",
            {"input": {"messages": [ASKED]}, "preferred_output": [said("Cod.")]},
            "'non_preferred_output' is missing",
        ),
        (
            "blocks",
            {"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]},
            "block of type 'image'",
        ),
        ("blocks", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "message 1 of messages"),
        ("blocks", {"question": "?"}, "none of messages"),
        (
            "rewardbench",
            {"prompt": "?", "rejected": "b", "subset": "x"},
            "the column 'chosen' is missing",
        ),
        (
            "rewardbench2",
            {"prompt": "?", "chosen": "a", "rejected": ["b"], "subset": "x"},
            "chosen must be a list, found str",
        ),
        ("gsm8k", {"question": "?", "answer": "It is 5."}, "#### NUMBER"),
        ("math", {"problem": "?", "solution": "It is 5."}, r"\boxed"),
    ],
)
def test_a_form_that_does_not_fit_names_the_field(name, row, words):
    rows = [row, row] if name == "helpsteer" else [row]
    with pytest.raises(BadRow) as caught:
        read(name, *rows)
    assert str(caught.value).startswith(f"data.form={name}: ")
    assert (words or "helpfulness") in str(caught.value)


def test_tools_in_blocks_are_calls_and_results():
    row = {
        "system": [{"type": "text", "text": "Be brief."}],
        "tools": [{"name": "pick", "description": "Picks.", "input_schema": {"type": "object", "properties": {}}}],
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "First."}, {"type": "text", "text": "Name a fish."}]},
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "I must look.", "signature": "x"},
                    {"type": "text", "text": "I "},
                    {"type": "text", "text": "look."},
                    {"type": "tool_use", "id": "a", "name": "pick", "input": {"kind": "fish"}},
                    {"type": "tool_use", "id": "b", "name": "pick", "input": {}},
                ],
            },
            {
                "role": "user",
                "content": [
                    {"type": "tool_result", "tool_use_id": "a", "content": [{"type": "text", "text": "cod"}]},
                    {"type": "tool_result", "tool_use_id": "b", "content": "none"},
                    {"type": "text", "text": "Go on."},
                ],
            },
            {"role": "assistant", "content": "Cod."},
        ],
    }
    (made,), _ = read("blocks", row)
    calls = [
        {"id": i, "type": "function", "function": {"name": "pick", "arguments": arguments}}
        for i, arguments in (("a", {"kind": "fish"}), ("b", {}))
    ]
    assert made["messages"] == [
        said("First.\n\nName a fish.", "user"),  # pieces of a user's stand for themselves
        {"role": "assistant", "content": "I look.", "reasoning_content": "I must look.", "tool_calls": calls},
        {"role": "tool", "tool_call_id": "a", "content": "cod"},
        {"role": "tool", "tool_call_id": "b", "content": "none"},
        said("Go on.", "user"),
        said("Cod."),
    ]
    assert made["system"] == "Be brief."
    function = {"name": "pick", "description": "Picks.", "parameters": {"type": "object", "properties": {}}}
    assert made["tools"] == [{"type": "function", "function": function}]
    assert learnt(made)[2] == [["I look.", "Cod."]]


def test_what_a_form_did_not_make_cannot_change_what_a_row_is():
    """Of two fields that decide what a row is one would be learnt and the other lost."""
    row = {"instruction": "?", "output": "Cod.", "text": "### Response: Cod.", "id": 7}  # Alpaca's: says all again
    assert read("alpaca", row) == ([{"prompt": "?", "completion": "Cod.", "id": 7}], [])
    row |= {"messages": [ASKED], "label": None}
    with pytest.raises(BadRow, match=r"the column messages is not read .* data.ignore=\[messages\]") as caught:
        read("alpaca", row)
    assert caught.value.reason == "unread_column"
    ((_, made),) = FORMS["alpaca"].rows([("f:1", row)], ignore=["messages"])
    assert parse(made).kind == "single"


def test_rows_that_cannot_be_read_pass_through():
    bad = BadRow("invalid_json", "no")
    rows = [("f:1", HELPSTEER[0]), ("f:2", bad), ("f:3", HELPSTEER[1])]
    found = list(FORMS["helpsteer"].rows(rows))
    assert [where for where, _ in found] == ["f:1", "f:2", "f:3"]
    assert found[1][1] is bad
    assert all(isinstance(row, NotUsed) for _, row in (found[0], found[2]))


@pytest.mark.parametrize(
    "row, words",
    [
        (SAFE, "data.form=comparison"),
        ({name: value for name, value in SAFE.items() if name != "better_response_id"}, "data.form=safer"),
        (ARENA, "data.form=arena"),
        (ULTRAFEEDBACK, "data.form=scored"),
        (HELPSTEER[0], "data.form=helpsteer"),
        (
            {"context": [ASKED], "response1": "Cod.", "response2": "Oak.", "overall_preference": -1},
            "data.form=comparison",
        ),
        ({"prompt": "?", "answers": [{"answer": "a", "rank": 1}, {"answer": "b", "rank": 2}]}, "data.form=ranked"),
        ({"instruction": "Name a fish.", "output": "Cod."}, "data.form=alpaca"),
        ({"question": "2 + 3?", "answer": "#### 5"}, "data.form=gsm8k"),
        ({"question": "Name a fish.", "answer": "Cod."}, ""),  # has the columns and not the rule
        ({"prompt": "?", "response": "a"}, ""),
        ({"id": 1, "blob": "x"}, ""),
    ],
)
def test_the_nearest_form_is_one_that_reads_the_row(row, words):
    assert nearest(row) == words


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def halved(row):
    """Of a user's own: the form reads what data.format made."""
    return None if row["question_id"] == "gone" else {**row, "winner": row["winner"].removeprefix("the ")}


def test_rows_in_are_kept_or_left_out_with_their_reason(tmp_path):
    other = {"conversation_a": [said("And a bird?", "user"), said("Heron.")]}
    rows = [ARENA, ARENA | {"winner": "tie"}, ARENA | {"winner": None}, ARENA | other | {"winner": "the model_a"}]
    name = write(tmp_path / "arena.jsonl", [*rows, ARENA | {"question_id": "gone"}])
    config = settings(name, form="arena", on_bad_row="drop", max_bad_fraction=0.5, format=f"{__name__}.halved")
    audit = load(config, byte_tokenizer()).audit.train
    assert (audit.rows_in, audit.rows_kept) == (5, 1)
    # two questions are no pair; a null winner cannot be halved
    assert audit.dropped == {TIE: 1, LEFT_OUT: 1, "different_prompts": 1, "format": 1}
    told = {row["source"].rpartition(":")[2]: row["detail"] for row in audit.dropped_rows}
    assert told["2"] == "data.form=arena: winner is tie"


def test_a_source_of_ties_alone_has_no_rows(tmp_path):
    name = write(tmp_path / "arena.jsonl", [ARENA | {"winner": "tie"}])
    with pytest.raises(
        ValueError, match="0 usable rows of 1; the first: .*arena.jsonl:1: data.form=arena: winner is tie"
    ):
        load(settings(name, form="arena"), byte_tokenizer())


def test_a_bad_row_is_named_by_file_line_and_form(tmp_path):
    name = write(tmp_path / "pairs.jsonl", [SAFE, {**SAFE, "response_1": 7}])
    with pytest.raises(ValueError, match=r"pairs.jsonl:2: data.form=safer: response_1 must be a string, found int"):
        load(settings(name, form="safer"), byte_tokenizer())


def test_prompts_of_a_form_come_with_the_answer(tmp_path):
    """What reward=math and reward=numeric ask for."""
    name = write(tmp_path / "gsm8k.jsonl", [{"question": "2 + 3?", "answer": "2 + 3 = 5\n#### 5"}])
    (row,) = load_prompts(settings(name, form="gsm8k", max_tokens=300), byte_tokenizer(), 10).train
    assert row.text == "2 + 3?"
    assert row.fields["answer"] == "5"


def test_the_command_lists_every_form(capsys, tmp_path):
    assert main(["data", "forms", "--json", str(tmp_path / "forms.json")]) == 0
    shown = capsys.readouterr().out
    listed = json.loads((tmp_path / "forms.json").read_text())
    assert [form["name"] for form in listed] == list(FORMS)
    for form in listed:
        assert f"data.form={form['name']}: {form['line']}" in shown
        assert all(json.dumps(row, ensure_ascii=False) in shown for row in form["example"])
    assert main(["data", "forms", "arena"]) == 0
    assert capsys.readouterr().out.startswith("data.form=arena: ")


@pytest.mark.parametrize("words", [["data", "forms", "arenas"], ["check", "recipe=dpo", "data.form=arenas"]])
def test_a_form_that_is_none_is_refused_with_the_nearest(words, capsys):
    assert main(words) == 2
    assert "did you mean arena?" in capsys.readouterr().err
