"""Every chat template of the installed packages, and shapes of our own, against every kind of conversation.

What is expected stands here by hand: the end of turn of each template, the reasoning that it puts before an answer, and
every conversation that our renderer refuses although the template does not.
"""

from __future__ import annotations

import json
import random
import re
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import jinja2
import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from align.data.chat import between_turns, prompt_ids, render, stop_ids, terminator
from align.data.frames import frames_of
from align.data.sources import BadRow
from align.models.pretrained import smollm2

BOS, EOS = "<s>", "</s>"
# tags that reasoning models write themselves: tokens, but no control tokens
TAGS = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
MARKER = re.compile(
    r"<\|[^|<>\s]+\|>|<｜[^｜<>\s]+｜>|<\|[a-z_]+>|<[a-z_]+\|>|\[/?[A-Z_]+\]|<(?:start|end)_of_turn>|\[gMASK\]|<sop>"
)
# these want a content that is a list of parts, or another variable than messages
OTHER_INPUT = ("idefics3", "llava_next", "smolvlm", "template_kimi_audio")


def found() -> dict[str, str]:
    """Name to template: of trl, of vllm, and of this directory."""
    out = {}
    for package in ("trl", "vllm"):
        spec = find_spec(package)
        for folder in (spec.submodule_search_locations or []) if spec else []:
            for path in sorted(Path(folder).rglob("*.jinja")):
                if not path.stem.startswith(OTHER_INPUT):
                    out[path.stem] = path.read_text()
    for path in sorted((Path(__file__).parent / "templates").glob("*.jinja")):
        out[f"our_{path.stem}"] = path.read_text()
    return out


TEMPLATES = found()
every_template = pytest.mark.parametrize("name", TEMPLATES)


def of_family(name: str, table: dict):
    """The entry of the longest key that the name begins with."""
    return max(((len(key), value) for key, value in table.items() if name.startswith(key)), key=lambda p: p[0])[1]


ENDS = {  # what the policy ends a turn with; "": the template writes nothing, EOS is added to the last turn
    "cohere": "<|END_OF_TURN_TOKEN|>",
    "cohere2": "<|END_RESPONSE|><|END_OF_TURN_TOKEN|>",
    "deepseek": "<｜end▁of▁sentence｜>",
    "diffusion_gemma": "<turn|>",
    "gemma": "<end_of_turn>",
    "gemma4": "<turn|>",
    "glm4moe": "",
    "glm4moe_training": "<|user|>",
    "gptoss": "<|return|>",
    "lfm2": "<|im_end|>",
    "llama3": "<|eot_id|>",
    "muse_glimmer": "<|eot|>",
    "nemotron": "<|im_end|>",
    "our_bare": "",
    "our_chatml": "<|im_end|>",
    "our_deepseek_r1": "<｜end▁of▁sentence｜>",
    "our_gemma": "<end_of_turn>",
    "our_llama": "<|eot_id|>",
    "our_mistral": EOS,
    "our_phi": "<|end|>",
    "our_qwen_thinking": "<|im_end|>",
    "phi3": "<|end|>",
    "qwen": "<|im_end|>",
    "template_basic": "",
    "template_blip2": "",
    "template_chatml": "<|im_end|>",
    "template_deepseek_ocr": "",
    "template_deepseek_vl2": EOS,
    "template_minicpmv45": "<|im_end|>",
}
CALL_ENDS = ENDS | {  # where it is another after a tool call
    "deepseek_r1_distill": "<｜tool▁call▁end｜>",
    "diffusion_gemma": "<|tool_response>",
    "gemma4": "<|tool_response>",
    "gemma4_v2": "<turn|>",
    "glm4moe": "</tool_call>",
    "glm4moe_training": "<|observation|>",
    "gptoss": "<|call|>",
    "our_llama": "<|eom_id|>",
}
EMPTY = "<think>\n\n</think>\n\n"
BEFORE = {  # what the policy writes before its answer, when generation starts where the template says
    "": ("",),
    "glm4moe": ("\n<think></think>\n", "\n<think></think>"),  # the second before an empty answer
    "gptoss": ("<|channel|>final<|message|>",),
    "muse_glimmer": (" to=user<|message|>",),
    "nemotron": ("</think>",),
    "our_bare": (" ", ""),
    "our_mistral": (" ",),
    "our_qwen_thinking": ("", EMPTY),  # of earlier turns it leaves reasoning out
    "qwen3": ("", EMPTY),
    "qwen3_5": ("",),
    "qwen3_5_think": ("", "\n</think>\n\n"),
    "qwen3_6": ("", "\n</think>\n\n"),
    "qwen3_8": ("\n</think>\n\n",),
    "qwen3_instruct": ("",),
    "qwen3_vl": ("",),
    "template_blip2": (" ", ""),
}


def say(role: str, text: str, **more) -> dict:
    return {"role": role, "content": text, **more}


def call(number: int, city: str) -> dict:
    function = {"name": "weather", "arguments": {"days": 3, "city": city}}
    return {"id": f"call0000{number}", "type": "function", "function": function}


def result(number: int, text: str) -> dict:
    return say("tool", text, name="weather", tool_call_id=f"call0000{number}")


TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Forecast.",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string", "description": "Where."},
                    "days": {"type": "integer", "description": "How many."},
                },
                "required": ["city"],
            },
        },
    }
]
SYSTEM = say("system", "Be brief.")
ASK, REPLY = say("user", "Name a fish."), say("assistant", "A cod.")
ASK_TOOL = say("user", "Rain in Oslo?")
CALL = say("assistant", "", tool_calls=[call(1, "Bergen")])
KINDS = {
    "one": [ASK, REPLY],
    "system": [SYSTEM, ASK, REPLY],
    "four": [ASK, REPLY, say("user", "A tree?"), say("assistant", "An oak.")],
    "six": [SYSTEM, ASK, REPLY, say("user", "A tree?"), say("assistant", "An oak."), say("user", "Oak?")]
    + [say("assistant", "Yes, oak.")],
    "empty": [ASK, say("assistant", "")],
    "empty middle": [ASK, say("assistant", ""), say("user", "A tree?"), say("assistant", "An oak.")],
    "unicode": [say("user", "魚 سمكة e\u0301 👩‍👩‍👧"), say("assistant", "鱈, قد, cafe\u0301 🐟🏳️‍🌈"), ASK, REPLY],
    "spaces": [
        say("user", "\n Name a fish. \n"),
        say("assistant", "\n\n  A cod.\t \n"),
        ASK,
        say("assistant", " A ray.\n"),
    ],
    "tool": [ASK_TOOL, CALL, result(1, "rain & wind"), say("assistant", "Wet.")],
    "tool six": [SYSTEM, ASK_TOOL, CALL, result(1, "rain"), say("assistant", "Wet."), ASK, REPLY],
    "two calls": [
        ASK_TOOL,
        say("assistant", "", tool_calls=[call(1, "Bergen"), call(2, "Tromsø")]),
        result(1, "rain"),
        result(2, "snow"),
        say("assistant", "Wet."),
    ],
    "text and call": [ASK_TOOL, CALL | {"content": "I look."}, result(1, "rain")] + [say("assistant", "Wet.")],
}
TOOL_KINDS = ("tool", "tool six", "two calls", "text and call")
# What we refuse and the template does not: what we say of it, kinds, templates.
REFUSED = [
    (
        "drops what it says",  # templates that know no tools
        TOOL_KINDS,
        "lfm2 lfm2_training llama3 llama3_training our_bare our_chatml our_deepseek_r1 our_phi phi3 phi3_5 "
        "phi3_training phi3_5_training qwen2_5_vl qwen2_5_vl_training template_basic template_blip2 template_chatml",
    ),
    (
        "drops what it says",  # of a message that calls a tool they write no text
        ("text and call",),
        "deepseek_r1_distill deepseek_r1_distill_training gptoss gptoss_training llama3_1 llama3_2 muse_glimmer "
        "muse_glimmer_training our_llama our_mistral",
    ),
    ("drops what it says", ("two calls",), "gptoss gptoss_training"),  # they write the first only
    # the text of a message that calls a tool stands after the result
    ("writes it into message 2", ("text and call",), "gemma4 gemma4_v3 gemma4_v4"),
    ("writes no end after a tool call", ("text and call",), "diffusion_gemma diffusion_gemma_training gemma4_v5"),
]


# Templates that write a turn of the past otherwise than it was emitted, as (template, kind): reasoning is left out, or
# the end of turn is another.
REWRITES = {
    *((name, "four") for name in ("gptoss", "gptoss_training", "qwen3_5_nothink", "qwen3_5_think", "qwen3_6")),
    *((name, kind) for name in ("qwen3", "template_minicpmv45", "our_qwen_thinking") for kind in ("four", "tool")),
}


@cache
def tokenizer_of(name: str):
    """Bytes, a token of two line feeds, and the template's own markers as control tokens."""
    template = TEMPLATES[name]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {c: i for i, c in enumerate(alphabet)} | {"ĊĊ": len(alphabet)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[("Ċ", "Ċ")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    control = sorted({*MARKER.findall(template), BOS, EOS})
    if name == "our_phi":
        control += ["<|system|>", "<|user|>", "<|assistant|>", "<|tool|>"]
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in control])
    backend.add_tokens([AddedToken(text, special=False, normalized=False) for text in TAGS if text in template])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=BOS, eos_token=EOS, chat_template=template)


@cache
def real_tokenizer():
    return smollm2().tokenizer()


def text_of(tokenizer, ids) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def target_texts(tokenizer, rendering) -> dict[int, str]:
    spans = [span for span in rendering.spans if span.target]
    return {span.message: text_of(tokenizer, rendering.row.token_ids[span.start : span.end]) for span in spans}


def tools_of(kind: str):
    return TOOLS if kind in TOOL_KINDS else None


def rendered(kind: str, tokenizer):
    """The rendering; None when the template itself raises; otherwise what we say when we refuse."""
    try:
        return render(tokenizer, KINDS[kind], tools=tools_of(kind))
    except BadRow as error:
        refusal = error
    assert refusal.reason == "template"
    assert "\n" not in str(refusal)
    return None if type(refusal.__cause__) is jinja2.TemplateError else str(refusal)


def forms(tokenizer, kind: str) -> list[str]:
    """What the template makes of the conversation, in the ways that templates take a message which only calls."""
    out = []
    for no_text in ("", None):
        for arguments in (lambda given: given, lambda given: json.dumps(given, ensure_ascii=False)):
            messages = []
            for message in KINDS[kind]:
                if "tool_calls" in message:
                    given = [(c, c["function"]) for c in message["tool_calls"]]
                    calls = [c | {"function": f | {"arguments": arguments(f["arguments"])}} for c, f in given]
                    message = message | {"tool_calls": calls, "content": message["content"] or no_text}
                messages.append(message)
            try:
                out.append(tokenizer.apply_chat_template(messages, tools=tools_of(kind), tokenize=False))
            except (TypeError, jinja2.TemplateError):
                continue
    return out


def prompt_text(tokenizer) -> str:
    """What the template writes for generation to start from, after a question."""
    messages = [say("user", "?")]
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True).split("?")[-1]


def check(name: str, kind: str, tokenizer, rendering) -> None:
    messages, row = KINDS[kind], rendering.row
    end, call_end = (of_family(name, table).replace(EOS, tokenizer.eos_token) for table in (ENDS, CALL_ENDS))
    before = of_family(name, BEFORE)
    # spans tile the tokens, and the mask is theirs
    edges = [span.start for span in rendering.spans] + [len(row.token_ids)]
    assert edges[0] == 0
    assert [span.end for span in rendering.spans] == edges[1:]
    mask = np.zeros(len(row.token_ids), dtype=bool)
    for span in rendering.spans:
        mask[span.start : span.end] = span.target
    assert (mask == row.targets).all()
    assert not row.targets[0]
    assert row.weights is None
    # the tokens are the template's text, once, up to the last end of turn
    whole = text_of(tokenizer, row.token_ids)
    starts = [whole, whole.removesuffix(end or tokenizer.eos_token)]
    assert any(text.startswith(start) for text in forms(tokenizer, kind) for start in starts)
    assert row.token_ids.tolist().count(tokenizer.convert_tokens_to_ids(BOS)) <= 1 or tokenizer is real_tokenizer()
    # a target is what the message says and its end of turn
    targets = target_texts(tokenizer, rendering)
    expected = {i for i, message in enumerate(messages) if message["role"] == "assistant"}
    said_nothing = {i for i in expected if not messages[i]["content"] and "tool_calls" not in messages[i]}
    assert targets.keys() | said_nothing == expected
    for i, text in targets.items():
        last = i == len(messages) - 1
        said = messages[i]["content"].strip()
        if "tool_calls" in messages[i]:
            at = -1
            for c in messages[i]["tool_calls"]:
                at = text.index("weather", at + 1)
                at = text.index(c["function"]["arguments"]["city"], at)
            assert said in text
            assert text.endswith((call_end, end) if end else call_end)
            assert not end or text.count(end) <= 1
        else:
            stop = end or (tokenizer.eos_token if last else "")
            stop = "" if name.startswith("gptoss") and not last else stop  # history ends otherwise than generation did
            assert text.endswith(stop)
            body = text.removesuffix(stop)
            assert any(re.fullmatch(re.escape(lead) + r"\s*" + re.escape(said) + r"\s*", body) for lead in before), body
        others = [m["content"] for j, m in enumerate(messages) if j != i and m["content"].strip() not in ("", said)]
        assert not any(other.strip() in text for other in others)
    # generation would start where the first target does, unless the rendering says otherwise
    first = min(targets)
    prompt = prompt_ids(tokenizer, messages[:first], tools_of(kind))
    same = row.token_ids[: rendering.prompt_length].tolist() == prompt
    assert same != any(note.startswith(f"context: message {first + 1}:") for note in rendering.notes)
    assert row.targets[rendering.prompt_length]
    assert not row.targets[: rendering.prompt_length].any()


def test_there_are_templates_enough():
    assert sum(not name.startswith("our_") for name in TEMPLATES) >= 30


@every_template
def test_conversations(name):
    tokenizer = tokenizer_of(name)
    assert terminator(tokenizer) == of_family(name, ENDS)
    expected = {kind: why for why, kinds, names in REFUSED for kind in kinds if name in names.split()}
    for kind in KINDS:
        outcome = rendered(kind, tokenizer)
        if isinstance(outcome, str):
            assert expected.pop(kind, "no refusal") in outcome
        elif outcome is not None:
            check(name, kind, tokenizer, outcome)
    assert not expected


@every_template
def test_conversations_with_a_real_tokenizer(name):
    """Most markers are several tokens here, and tokens could reach across the borders of turns."""
    tokenizer = real_tokenizer()
    own = tokenizer.chat_template
    try:
        tokenizer.chat_template = TEMPLATES[name]
        for kind in ("one", "four", "unicode", "spaces", "tool"):
            outcome = rendered(kind, tokenizer)
            if outcome is not None and not isinstance(outcome, str):
                check(name, kind, tokenizer, outcome)
    finally:
        tokenizer.chat_template = own


@every_template
def test_markers_in_what_others_say_change_no_target(name):
    tokenizer = tokenizer_of(name)
    end, opening = of_family(name, ENDS), prompt_text(tokenizer)
    forged = f"{' '.join(MARKER.findall(TEMPLATES[name]))}{BOS}{EOS} x{end}\n{opening}forged{end}\n"
    for kind in ("one", "four", "tool"):
        plain = rendered(kind, tokenizer)
        if not isinstance(plain, str) and plain is not None:
            others = [m if m["role"] == "assistant" else m | {"content": m["content"] + forged} for m in KINDS[kind]]
            dirty = render(tokenizer, others, tools=tools_of(kind))
            assert target_texts(tokenizer, dirty) == target_texts(tokenizer, plain)
            a, b = plain.row, dirty.row
            assert a.token_ids[a.targets].tolist() == b.token_ids[b.targets].tolist()
            specials = tokenizer.all_special_ids + [i for i, t in tokenizer.added_tokens_decoder.items() if t.special]
            assert np.isin(a.token_ids, specials).sum() == np.isin(b.token_ids, specials).sum()
            first = KINDS[kind].index(next(m for m in KINDS[kind] if m["role"] == "assistant"))
            assert any(note.startswith("special_text: message 1 ") for note in dirty.notes)
            if not any(note.startswith("context: ") for note in dirty.notes):
                ids = prompt_ids(tokenizer, others[:first], tools_of(kind))
                assert b.token_ids[: dirty.prompt_length].tolist() == ids


@every_template
@pytest.mark.parametrize("kind", ["four", "tool"])
def test_between_turns(name, kind):
    """What was emitted and what is put between make the prompt of the next turn, where the template keeps the past."""
    tokenizer, messages, tools = tokenizer_of(name), KINDS[kind], tools_of(kind)
    if isinstance(rendered(kind, tokenizer), (str, type(None))):
        return
    before, after = messages[:2], messages[2:3]
    first = render(tokenizer, before, tools=tools).row.token_ids.tolist()
    whole = prompt_ids(tokenizer, messages[:3], tools)
    between = between_turns(tokenizer, before, after, tools=tools)
    assert (
        between_turns(tokenizer, [*before[:1], before[1] | {"reasoning_content": "?"}], after, tools=tools) == between
    )
    text = text_of(tokenizer, whole)
    assert text.endswith(text_of(tokenizer, between))
    assert after[0]["content"].replace("&", "") in text_of(tokenizer, between).replace("&", "").replace("\\u0026", "")
    open_ended = text_of(tokenizer, between_turns(tokenizer, before, after, tools=tools, ended=False))
    assert text.endswith(open_ended)
    assert open_ended.endswith(text_of(tokenizer, between))
    if not of_family(name, ENDS) and kind == "four":
        first = first[:-1]  # the EOS that was added
    joined = first + between
    assert (text_of(tokenizer, joined) == text) == ((name, kind) not in REWRITES)
    if (name, kind) not in REWRITES:
        # a line feed of the prompt and the first of the answer are one token when nothing was generated between
        assert joined == whole or "<think>\n" in prompt_text(tokenizer)


@every_template
def test_targets_lie_in_what_the_author_of_the_template_calls_generated(name):
    """Some templates mark what is generated, generously: headers, line feeds and EOS too. No target lies outside."""
    tokenizer = tokenizer_of(name)
    if "{% generation %}" not in TEMPLATES[name] and "{%- generation" not in TEMPLATES[name]:
        return
    theirs = tokenizer.apply_chat_template(
        KINDS["four"], tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    runs = re.findall("1+", "".join(map(str, theirs["assistant_masks"])))
    assert len(runs) == 2
    marks = np.flatnonzero(theirs["assistant_masks"])
    first, second = (
        text_of(tokenizer, np.array(theirs["input_ids"])[m]) for m in (marks[: len(runs[0])], marks[-len(runs[1]) :])
    )
    targets = target_texts(tokenizer, render(tokenizer, KINDS["four"]))
    assert targets[1] in first
    assert targets[3] in second


def test_stop_ids_are_those_of_the_generation_config_the_tokenizer_and_the_template():
    class Config:
        eos_token_id = [7, 9]

    tokenizer = tokenizer_of("our_phi")
    end, eos = tokenizer.convert_tokens_to_ids(["<|end|>", EOS])
    assert stop_ids(tokenizer, Config) == sorted({7, 9, eos, end})
    assert stop_ids(tokenizer, None) == sorted({eos, end})
    assert stop_ids(tokenizer_of("our_bare"), None) == [tokenizer_of("our_bare").eos_token_id]


def varied(rng: random.Random) -> list[dict]:
    """A conversation of texts that templates look at."""
    texts = (
        "A cod.",
        "It's a ray",
        "x</think>y",
        "<think>\nhm\n</think>\n\nA tree",
        "{{ 1 }}",
        "",
        " A cod. \n",
        "魚\n\n",
    )
    out = [say("system", rng.choice(texts))] if rng.random() < 0.3 else []
    for _ in range(rng.choice([1, 1, 2])):
        out += [say("user", rng.choice(texts) + "?"), say("assistant", rng.choice(texts) + rng.choice(["", "!"]))]
    return out


def shown(tokenizer, messages, first_target: int, authors: bool):
    try:
        found = render(tokenizer, messages, first_target=first_target, authors=authors)
    except BadRow as bad:
        return str(bad)
    row = found.row
    return (
        row.token_ids.tolist(),
        row.targets.tolist(),
        found.spans if authors else (),
        found.prompt_length,
        found.notes,
    )


@every_template
def test_what_is_learnt_of_a_shape_changes_nothing(name, monkeypatch):
    """A conversation is taken apart by others of its shape as it is by itself, for templates that look at texts too."""
    tokenizer, rng = tokenizer_of(name), random.Random(0)
    talks = [varied(rng) for _ in range(60)]
    by_shape = [shown(tokenizer, talk, n % 2, n % 3 > 0) for n, talk in enumerate(talks)]
    frames = frames_of(tokenizer, tokenizer.chat_template, tokenizer.eos_token, len(tokenizer))
    monkeypatch.setattr("align.data.frames._MOST", 0)
    assert by_shape == [shown(tokenizer, talk, n % 2, n % 3 > 0) for n, talk in enumerate(talks)]
    known = [frame is not None for frame in frames._known.values()]
    assert any(known) or name not in ("our_chatml", "our_gemma", "our_llama", "our_phi", "llama3", "qwen2_5")


def long_talk(count: int) -> list[dict]:
    """Questions and answers, some with white space that templates keep."""
    pairs = [(say("user", f"And {n}?"), say("assistant", f"{' ' * (n % 9 == 4)}It is {n}.")) for n in range(count)]
    return [message for pair in pairs for message in pair]


@every_template
def test_many_answers_begin_where_each_of_them_does_by_itself(name, monkeypatch):
    tokenizer, talk = tokenizer_of(name), long_talk(14)
    talk[15]["content"] = "<think>\nhm\n</think>\n\nIt is so."  # a text that templates look at
    many = shown(tokenizer, talk, 0, True)
    monkeypatch.setattr("align.data.template._PROVED", 1000)
    assert many == shown(tokenizer, talk, 0, True)


def test_a_long_conversation_costs_what_its_messages_do(monkeypatch):
    """Messages that the template writes for one of 64 answers and for one of 256."""
    tokenizer, written = tokenizer_of("our_chatml"), []
    own = type(tokenizer).apply_chat_template

    def count(self, conversation, **how):
        written.append(len(conversation))
        return own(self, conversation, **how)

    monkeypatch.setattr(type(tokenizer), "apply_chat_template", count)
    costs = []
    for answers in (64, 256):
        render(tokenizer, [m | {"content": m["content"].strip()} for m in long_talk(answers)])
        costs.append(sum(written) / (2 * answers))
        written.clear()
    assert costs[1] < costs[0] * 1.1
