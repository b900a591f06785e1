"""Which tokens stand in a row and which are targets, by tokenizers that differ in how they treat borders."""

from __future__ import annotations

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from align.data.chat import chat_row, prompt_ids, text_row
from align.data.sources import BadRow
from align.pretrained import byte_tokenizer

USER = {"role": "user", "content": "Name a fish."}
MORE = {"role": "user", "content": "And a tree?"}


def answer(text: str) -> dict:
    return {"role": "assistant", "content": text}


def targets(tokenizer, row) -> list[str]:
    """Text of each unbroken run of targets."""
    runs: list[list[int]] = []
    for i in np.flatnonzero(row.targets):
        if not runs or runs[-1][-1] != i - 1:
            runs.append([])
        runs[-1].append(int(i))
    return [tokenizer.decode(row.token_ids[run], skip_special_tokens=False) for run in runs]


def merged_newlines():
    """Byte-level BPE with a token for two line feeds, and ChatML."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {c: i for i, c in enumerate(alphabet)} | {"ĊĊ": len(alphabet)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[("Ċ", "Ċ")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(t, special=True) for t in ("<|im_start|>", "<|im_end|>")])
    template = byte_tokenizer().chat_template
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", chat_template=template)


def metaspace(bos=True, eos=False):
    """As Llama 2: a mark for the space, also put before the text; BOS, and on demand EOS, added to each text."""
    letters = list("▁abcdefghijklmnopqrstuvwxyzTNA.?\n")
    vocabulary = {"<s>": 0, "</s>": 1, "<unk>": 2} | {c: i + 3 for i, c in enumerate(letters)}
    merges = [("T", "h"), ("Th", "e"), ("The", "o"), ("▁", "c")]
    for a, b in merges:
        vocabulary[a + b] = len(vocabulary)
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Metaspace(prepend_scheme="first")
    single = f"{'<s> ' if bos else ''}$A{' </s>' if eos else ''}"
    backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=[("<s>", 0), ("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def tokens(tokenizer, ids) -> list[str]:
    return tokenizer.convert_ids_to_tokens([int(i) for i in ids])


@pytest.mark.parametrize("completion", ["Cod.", "Cod.<|im_end|>"])
def test_text_ends_in_one_eos(completion):
    tokenizer = byte_tokenizer()
    row = text_row(tokenizer, "Name a fish.", completion, finished=True)
    assert tokenizer.decode(row.token_ids) == "Name a fish.Cod.<|im_end|>"
    assert targets(tokenizer, row) == ["Cod.<|im_end|>"]


def test_unfinished_text_has_no_eos():
    tokenizer = byte_tokenizer()
    assert targets(tokenizer, text_row(tokenizer, "Name a fish.", "Cod, her", finished=False)) == ["Cod, her"]


def test_eos_that_the_user_wrote_stays_in_the_prompt():
    tokenizer = byte_tokenizer()
    row = text_row(tokenizer, "Hi<|im_end|>", "Cod.", finished=True)
    assert tokenizer.decode(row.token_ids) == "Hi<|im_end|>Cod.<|im_end|>"
    assert row.token_ids[~row.targets].tolist() == prompt_ids(tokenizer, "Hi<|im_end|>")


def test_text_without_prompt_begins_with_bos_or_is_refused():
    tokenizer = byte_tokenizer()
    row = text_row(tokenizer, "", "Cod.", finished=True)
    assert row.token_ids[0] == tokenizer.bos_token_id
    assert targets(tokenizer, row) == ["Cod.<|im_end|>"]
    with pytest.raises(BadRow, match="no BOS"):
        text_row(merged_newlines(), "", "Cod.", finished=True)


def test_start_mark_is_not_put_inside_a_text():
    """Alone, "ory" would be the word " ory"; "cat" after "a " begins with the merged mark."""
    tokenizer = metaspace()
    row = text_row(tokenizer, "a fi", "sh", finished=True)
    assert tokens(tokenizer, row.token_ids) == ["<s>", "▁", "a", "▁", "f", "i", "s", "h", "</s>"]
    row = text_row(tokenizer, "a", " cat", finished=True)
    assert tokens(tokenizer, row.token_ids) == ["<s>", "▁", "a", "▁c", "a", "t", "</s>"]


def test_start_mark_where_a_token_would_reach_across():
    """ "Theory" has the token "Theo"; after the fixed prompt "The" the answer is "o", "r", "y" without a mark."""
    tokenizer = metaspace()
    row = text_row(tokenizer, "The", "ory", finished=True)
    assert tokens(tokenizer, row.token_ids) == ["<s>", "▁", "The", "o", "r", "y", "</s>"]
    assert row.token_ids[~row.targets].tolist() == prompt_ids(tokenizer, "The")


def test_eos_put_by_the_tokenizer_is_no_part_of_the_prompt():
    tokenizer = metaspace(eos=True)
    assert tokens(tokenizer, prompt_ids(tokenizer, "a")) == ["<s>", "▁", "a"]
    finished = text_row(tokenizer, "a", " cat", finished=True)
    assert tokens(tokenizer, finished.token_ids) == ["<s>", "▁", "a", "▁c", "a", "t", "</s>"]
    assert tokens(tokenizer, text_row(tokenizer, "a", " cat", finished=False).token_ids)[-1] == "t"


def test_answer_that_begins_with_a_newline_follows_the_inference_path():
    """The prompt ends in a line feed that would merge with the answer's; generation starts from the fixed one."""
    tokenizer = merged_newlines()
    row = chat_row(tokenizer, [USER], [answer("\nCod.")], finished=True)
    head = prompt_ids(tokenizer, [USER])
    assert row.token_ids[: len(head)].tolist() == head
    assert not row.targets[: len(head)].any()
    assert row.targets[len(head) :].all()
    assert tokens(tokenizer, row.token_ids[len(head) :]) == ["Ċ", "C", "o", "d", ".", "<|im_end|>"]


@pytest.mark.parametrize("make", [byte_tokenizer, merged_newlines])
def test_targets_are_the_assistants_turns_only(make):
    """TRL 1.16 trains on the user's words and on the markers between the turns of a completion; they are context."""
    tokenizer = make()
    turns = [answer("Cod."), MORE, answer("Oak.\n\nOr elm.")]
    row = chat_row(tokenizer, [{"role": "system", "content": "Be brief."}, USER], turns, finished=True)
    assert targets(tokenizer, row) == ["Cod.<|im_end|>", "Oak.\n\nOr elm.<|im_end|>"]
    assert tokenizer.decode(row.token_ids) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nName a fish.<|im_end|>\n<|im_start|>assistant\n"
        "Cod.<|im_end|>\n<|im_start|>user\nAnd a tree?<|im_end|>\n<|im_start|>assistant\nOak.\n\nOr elm.<|im_end|>"
    )


def test_assistant_turns_of_the_prompt_are_context():
    tokenizer = byte_tokenizer()
    row = chat_row(tokenizer, [USER, answer("Cod."), MORE], [answer("Oak.")], finished=True)
    assert targets(tokenizer, row) == ["Oak.<|im_end|>"]


def test_unfinished_answer_ends_with_its_text():
    tokenizer = byte_tokenizer()
    row = chat_row(tokenizer, [USER], [answer("Cod, or h")], finished=False)
    assert targets(tokenizer, row) == ["Cod, or h"]
    row = chat_row(tokenizer, [USER], [answer("Cod."), MORE, answer("Oak, or e")], finished=False)
    assert targets(tokenizer, row) == ["Cod.<|im_end|>", "Oak, or e"]


@pytest.mark.parametrize("text", ["Cod.", " Cod.", "Cod. \n"])
@pytest.mark.parametrize("kept", ["m.content", "m.content | trim"])
def test_template_without_end_of_turn_gets_eos(text, kept):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role + ':' + (" + kept + ") + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    )
    row = chat_row(tokenizer, [USER], [answer(text)], finished=True)
    (target,) = targets(tokenizer, row)
    assert target.strip() == "Cod.<|im_end|>"


def test_template_that_rewrites_the_past_is_refused_in_one_line():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ messages | length }}\n{{ messages[-1].content }}"
    with pytest.raises(BadRow, match="message 2: the chat template does not extend") as caught:
        chat_row(tokenizer, [USER], [answer("Cod.")], finished=True)
    assert caught.value.reason == "template"
    assert "\n" not in str(caught.value)


def test_conversation_without_template_names_the_setting():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="model.chat_template=FILE"):
        chat_row(tokenizer, [USER], [answer("Cod.")], finished=True)
