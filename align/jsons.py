"""Names of what comes from outside and is known by its keys only: objects of JSON, and a tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

Json = dict[str, Any]  # an object of a JSON file, a row of data, the keys of a setting: values as json gives them
Fields = Mapping[str, Any]  # the same, to be read only


class Tokenizer(Protocol):
    """What is asked of a Hugging Face tokenizer."""

    chat_template: Any  # a text, several by name, or None
    all_special_ids: list[int]
    all_special_tokens: list[str]
    added_tokens_decoder: Mapping[int, Any]
    backend_tokenizer: Any
    eos_token: str | None
    bos_token_id: int | None
    eos_token_id: int | None
    pad_token_id: int | None
    is_fast: bool

    def __len__(self) -> int: ...
    def __call__(self, text: object, **how: object) -> Any: ...
    def decode(self, token_ids: object, **how: object) -> str: ...
    def apply_chat_template(self, conversation: object, **how: object) -> Any: ...
    def convert_ids_to_tokens(self, ids: object) -> Any: ...
    def add_special_tokens(self, tokens: Fields) -> int: ...
    def get_vocab(self) -> dict[str, int]: ...
    def save_pretrained(self, directory: object, **how: object) -> object: ...
