"""Loading by path in Hugging Face format, and what is not loaded unless asked for."""

from __future__ import annotations

import json

import pytest
import torch

from align.models.pretrained import byte_tokenizer, from_hub, tiny

OPTIONS = {"revision": None, "trust_remote_code": False, "allow_pickle": False, "chat_template": None, "dtype": "auto"}


@pytest.fixture
def directory(tmp_path):
    source = tiny(seed=0, hidden_size=32, num_layers=1)
    source.model().save_pretrained(tmp_path / "model")
    source.tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_local_directory_loads_with_its_tokenizer(directory):
    source = from_hub(path=str(directory), **OPTIONS)
    original = tiny(seed=0, hidden_size=32, num_layers=1).model()
    ids = torch.arange(10)[None]
    torch.testing.assert_close(source.model()(ids).logits, original(ids).logits)
    assert source.tokenizer()("héllo").input_ids == byte_tokenizer()("héllo").input_ids


def test_pickled_weights_need_permission(directory):
    from safetensors.torch import load_file

    torch.save(load_file(directory / "model.safetensors"), directory / "pytorch_model.bin")
    (directory / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="model.allow_pickle=true"):
        from_hub(path=str(directory), **OPTIONS).model()
    assert from_hub(path=str(directory), **(OPTIONS | {"allow_pickle": True})).model() is not None


def test_code_that_comes_with_a_model_does_not_run(directory, tmp_path):
    canary = tmp_path / "canary"
    (directory / "modeling_evil.py").write_text(f"open({str(canary)!r}, 'w').write('ran')\n")
    config = json.loads((directory / "config.json").read_text())
    config |= {
        "model_type": "evil",
        "auto_map": {"AutoConfig": "modeling_evil.C", "AutoModelForCausalLM": "modeling_evil.M"},
    }
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="trust_remote_code"):
        from_hub(path=str(directory), **OPTIONS).model()
    assert not canary.exists()


def test_unreachable_hub_name_is_one_sentence_with_the_cure():
    with pytest.raises(ValueError, match=r"model.path=no-such/model cannot be loaded .* give a hub name"):
        from_hub(path="no-such/model", **OPTIONS).tokenizer()


def test_own_chat_template_replaces_the_models(directory, tmp_path):
    (tmp_path / "t.jinja").write_text("{{ messages[0]['content'] }}")
    source = from_hub(path=str(directory), **(OPTIONS | {"chat_template": str(tmp_path / "t.jinja")}))
    messages = [{"role": "user", "content": "plain"}]
    assert source.tokenizer().apply_chat_template(messages, tokenize=False) == "plain"
    with pytest.raises(ValueError, match="no such file"):
        from_hub(path=str(directory), **(OPTIONS | {"chat_template": "missing.jinja"}))


def test_bytes_come_back():
    tokenizer = byte_tokenizer()
    text = "naïve 漢字 \n\t🙂"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
