"""docs/data.md says for each public set what to type: typed here, on a row in the set's own columns and types."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from align.config import compose
from align.data.load import load
from align.data.wanted import Wanted
from align.models.pretrained import byte_tokenizer

PAGE = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
LINES = re.findall(
    r"^\| ([^|`]+) \| `data\.train=(\S+)([^`]*)` \| (pair|ranked|labelled|single) \|$", PAGE, re.MULTILINE
)

ASKED = {"role": "user", "content": "Name a fish."}
COD, OAK = ({"role": "assistant", "content": text} for text in ("Cod.", "Oak."))
PAIR = {"prompt": "Name a fish.", "chosen": [ASKED, COD], "rejected": [ASKED, OAK]}
ULTRAFEEDBACK = {
    "source": "evol_instruct",
    "instruction": "Name a fish.",
    "models": ["alpaca-7b", "gpt-4"],
    "completions": [
        {
            "annotations": {
                "helpfulness": {"Rating": rating, "Rationale": "r", "Type": ["1"]},
                "honesty": {"Rating": rating, "Rationale": "r"},
            },
            "custom_system_prompt": "As an AI assistant, answer truthfully.",
            "model": "m",
            "principle": "helpfulness",
            "response": text,
            "critique": "c",
            "overall_score": float(rating),
            "fine-grained_score": float(rating),
        }
        for text, rating in (("Oak.", "2"), ("Cod.", "5"))
    ],
    "correct_answers": ["None"],
    "incorrect_answers": ["None"],
}
SAFE = {
    "prompt": "Name a fish.",
    "response_0": "Oak.",
    "response_1": "Cod.",
    "prompt_source": "s",
    "response_0_source": "Alpaca-7B",
    "response_1_source": "Alpaca-7B",
    "is_response_0_safe": True,
    "is_response_1_safe": True,
    "response_0_harm_category": {"Insulting Behavior": False},
    "response_1_harm_category": {"Insulting Behavior": False},
    "response_0_severity_level": 0,
    "response_1_severity_level": 0,
    "better_response_id": 1,
    "safer_response_id": 1,
    "response_0_sha256": "a",
    "response_1_sha256": "b",
}
STEER = {"helpfulness": 3, "correctness": 3, "coherence": 4, "complexity": 1, "verbosity": 1}
HELPSTEER = [
    {"prompt": "Name a fish.", "response": "Oak.", **STEER},
    {"prompt": "Name a fish.", "response": "Cod.", **STEER, "helpfulness": 4},
]
ARENA = {
    "question_id": "q",
    "model_a": "vicuna-13b",
    "model_b": "koala-13b",
    "winner": "model_b",
    "judge": "arena_user_973",
    "conversation_a": [ASKED, OAK],
    "conversation_b": [ASKED, COD],
    "turn": 1,
    "anony": True,
    "language": "English",
    "tstamp": 1682351591.1,
    "openai_moderation": {"flagged": False},
    "toxic_chat_tag": {"flagged": False},
}


def in_blocks(*messages):
    part = {"type": "text", "image": None, "mimeType": None}
    return [{"role": m["role"], "content": [part | {"text": m["content"]}]} for m in messages]


ROWS = {
    "UltraFeedback, binarised": PAIR
    | {"prompt_id": "a", "messages": [ASKED, COD], "score_chosen": 8.5, "score_rejected": 5.0},
    "UltraFeedback, cleaned": PAIR
    | {"source": "s", "chosen-rating": 5.0, "chosen-model": "m", "rejected-rating": 3.5, "rejected-model": "m"},
    "UltraFeedback of TRL": {
        "chosen": [ASKED, COD], "rejected": [ASKED, OAK], "score_chosen": 8.5, "score_rejected": 5.0,
    },
    "Tulu 3 preference mixtures": PAIR | {"id": "a", "source": "s", "chosen_model": "m", "rejected_model": "m"},
    "Skywork reward preferences": {"chosen": [ASKED, COD], "rejected": [ASKED, OAK], "source": "magpie"},
    "ORPO-DPO mix": PAIR | {"source": "s", "question": "Name a fish."},
    "Capybara DPO": PAIR
    | {
        "source": "s",
        "conversation": [{"input": "Name a fish.", "output": "Cod."}],
        "original_response": "Cod.",
        "generation_prompt": ["p"],
        "raw_generation_responses": ["r"],
        "new_generations": ["g"],
        "rating_chosen": 5,
        "rating_rejected": 4,
        "chosen_model": "m",
        "rejected_model": "m",
    },
    "Orca pairs of Intel": {"system": "Be brief.", "question": "Name a fish.", "chosen": "Cod.", "rejected": "Oak."},
    "Orca pairs of distilabel": {
        "system": "Be brief.",
        "input": "Name a fish.",
        "chosen": "Cod.",
        "rejected": "Oak.",
        "generations": ["Cod.", "Oak."],
        "order": ["chosen", "rejected"],
        "labelling_model": "gpt-4",
        "labelling_prompt": [{"content": "c", "role": "system"}],
        "raw_labelling_response": "9\n7",
        "rating": [9.0, 7.0],
        "rationale": "r",
        "status": "unchanged",
        "original_chosen": "Cod.",
        "original_rejected": "Oak.",
        "chosen_score": 9.0,
        "in_gsm8k_train": False,
    },
    "UltraInteract": {
        "task": "Coding",
        "dataset": "codecontest",
        "trajectory": [{"from": "user", "value": "Name a fish."}],
        "chosen": "Cod.",
        "rejected": "Oak.",
        "id": "a",
        "parent_id": "0",
    },
    "HH-RLHF": {
        "chosen": "\n\nHuman: Name a fish.\n\nAssistant: Cod.",
        "rejected": "\n\nHuman: Name a fish.\n\nAssistant: Oak.",
    },
    "SafeRLHF, helpful": SAFE,
    "SafeRLHF, harmless": SAFE,
    "HelpSteer 2": HELPSTEER,
    "HelpSteer 3": {
        "domain": "general",
        "language": "english",
        "context": [ASKED],
        "response1": "Oak.",
        "response2": "Cod.",
        "overall_preference": 2,
        "individual_preference": [{"score": 2, "reasoning": "r", "feedback1": "a", "feedback2": "b"}],
    },
    "chatbot arena, 33k": ARENA,
    "chatbot arena, 55k": {
        "id": 30192,
        "model_a": "m",
        "model_b": "m",
        "prompt": '["Name a fish."]',
        "response_a": '["Oak."]',
        "response_b": '["Cod."]',
        "winner_model_a": 0,
        "winner_model_b": 1,
        "winner_tie": 0,
    },
    "chatbot arena, 140k": {
        "id": "a",
        "model_a": "m",
        "model_b": "m",
        "winner": "model_b",
        "evaluation_session_id": "e",
        "evaluation_order": 1,
        "conversation_a": in_blocks(ASKED, OAK),
        "conversation_b": in_blocks(ASKED, COD),
        "full_conversation": [{"user": in_blocks(ASKED)[0], "model_side_a": None, "model_side_b": None}],
        "conv_metadata": {"sum_user_tokens": 4},
        "category_tag": {"math_v0.1": {"math": False}},
        "language": "en",
        "is_code": False,
        "timestamp": "2025-05-31 12:00:00",
    },
    "Stanford Human Preferences": {
        "post_id": "a",
        "domain": "askculinary_train",
        "upvote_ratio": 0.98,
        "history": "Name a fish.",
        "c_root_id_A": "a",
        "c_root_id_B": "b",
        "human_ref_A": "Oak.",
        "human_ref_B": "Cod.",
        "labels": 0,
        "seconds_difference": 1.0,
        "score_A": 1,
        "score_B": 9,
        "score_ratio": 9.0,
    },
    "WebGPT comparisons": {
        "question": {"dataset": "eli5", "id": "a", "full_text": "Name a fish."},
        "quotes_0": {"title": ["t"], "extract": ["e"]},
        "answer_0": "Oak.",
        "tokens_0": {"prefix": [1], "completion": [2]},
        "score_0": -0.75,
        "quotes_1": {"title": ["t"], "extract": ["e"]},
        "answer_1": "Cod.",
        "tokens_1": {"prefix": [1], "completion": [2]},
        "score_1": 0.75,
    },
    "summaries of Reddit": {
        "info": {"id": "t3_a", "post": "Name a fish.", "title": "t", "subreddit": "r", "site": None, "article": None},
        "summaries": [{"text": "Oak.", "policy": "sup1", "note": "n"}, {"text": "Cod.", "policy": "ref", "note": "n"}],
        "choice": 1,
        "worker": "w",
        "batch": "b",
        "split": "train",
        "extra": {"confidence": None},
    },
    "RewardBench": {
        "prompt": "Name a fish.",
        "chosen": "Cod.",
        "chosen_model": "m",
        "rejected": "Oak.",
        "rejected_model": "m",
        "subset": "alpacaeval-easy",
        "id": 0,
    },
    "RewardBench 2": {
        "id": "0",
        "prompt": "Name a fish.",
        "chosen": ["Cod."],
        "rejected": ["Oak."],
        "num_correct": 1,
        "num_incorrect": 1,
        "total_completions": 2,
        "models": ["m", "m"],
        "subset": "Factuality",
        "additional_metadata": {"category": None, "label": "l"},
    },
    "OpenAI's preference format": {
        "input": {"messages": [ASKED], "tools": [], "parallel_tool_calls": True},
        "preferred_output": [COD],
        "non_preferred_output": [OAK],
    },
    "Nectar": {
        "prompt": "\n\nHuman: Name a fish.\n\nAssistant: ",
        "answers": [{"answer": "Cod.", "model": "m", "rank": 1.0}, {"answer": "Oak.", "model": "m", "rank": 2.0}],
        "turns": 1,
        "num_responses": 2,
        "source": ["sharegpt"],
        "good_natured": True,
    },
    "UltraFeedback, all answers": ULTRAFEEDBACK,
    "UltraFeedback, by its ratings": ULTRAFEEDBACK,
    "KTO mix of TRL": {"prompt": [ASKED], "completion": [COD], "label": True},
    "BeaverTails": {
        "prompt": "Name a fish.",
        "response": "Cod.",
        "category": {"animal_abuse": False},
        "is_safe": True,
    },
    "HelpSteer 2, attributes": HELPSTEER[1],
    "Alpaca": {
        "instruction": "Name a fish.",
        "input": "",
        "output": "Cod.",
        "text": "Below is an instruction.\n\n### Instruction:\nName a fish.\n\n### Response:\nCod.",
    },
    "ShareGPT and its like": {
        "id": "a",
        "conversations": [{"from": "human", "value": "Name a fish."}, {"from": "gpt", "value": "Cod."}],
    },
    "Anthropic's messages": {"messages": in_blocks(ASKED, COD)},
    "GSM8K": {"question": "Name a fish.", "answer": "Cod.\n#### 5"},
    "MATH": {"problem": "Name a fish.", "level": "Level 1", "type": "Algebra", "solution": r"\boxed{Cod.}"},
}  # fmt: skip
SINGLE = {"GSM8K": "Cod.\n#### 5", "MATH": r"\boxed{Cod.}"}


def test_every_set_of_the_page_has_rows():
    assert [name for name, *_ in LINES] == list(ROWS)


@pytest.mark.parametrize("name, source, words, kind", LINES)
def test_what_the_page_says_to_type(tmp_path, name, source, words, kind):
    assert source.endswith((".json", ".jsonl")) or re.fullmatch(r"[\w.-]+/[\w.-]+(@\w+)?(:\w+)?", source)
    rows = ROWS[name]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in (rows if isinstance(rows, list) else [rows])))
    composed = compose(["objective=nll", "model=tiny", f"data.train={file}", "data.heldout_fraction=0", *words.split()])
    tokenizer = byte_tokenizer()
    (row,) = load(composed.data, tokenizer, Wanted(kind=None), keep=True).train_rows
    learnt = [
        tokenizer.decode(shown.row.token_ids[shown.row.targets].tolist(), skip_special_tokens=True)
        for shown in row.renderings.values()
    ]
    assert row.kind == kind
    assert learnt == ([SINGLE.get(name, "Cod.")] if kind in ("single", "labelled") else ["Cod.", "Oak."])
    assert {e.label for e in row.examples} == {True if kind == "labelled" else None}
    for shown in row.renderings.values():
        before = tokenizer.decode(shown.row.token_ids[: shown.prompt_length].tolist())
        assert before.count("Name a fish.") == 1
        assert "Human:" not in before
        assert ("Be brief." in before) == ("Orca" in name)
