"""Models from files, whole: what transformers would fill with random numbers, leave unread or only warn of is refused.

Which class a model has and where its files lie is the caller's.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import numpy as np

from align.deferred import Tensor, torch
from align.jsons import Tokenizer

_PIECE = 1 << 26  # numbers looked at together: what is made of them in float32 has 256 MiB


class WrongWeights(ValueError):
    """Files that are not, or not only, the weights of the model that they are to be."""


def load_model(auto_class: Any, path: str, name: str, unused: Sequence[str] = (), **options: Any) -> Any:
    """`auto_class.from_pretrained(path, **options)`, all of whose weights are those of the files.

    name: what messages call it. unused: patterns of names in the files that may stay unread.
    Raises WrongWeights for weights that are missing, unread, of another shape or not finite.
    """
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()  # its report of the same is many lines long
    try:
        model, loading_info = auto_class.from_pretrained(
            path, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    finally:
        logging.set_verbosity(before)
    kind = type(model).__name__
    unread = [key for key in loading_info["unexpected_keys"] if not any(re.search(pattern, key) for pattern in unused)]
    if loading_info["missing_keys"]:
        raise WrongWeights(
            f"{name}: its files do not hold {_first(loading_info['missing_keys'])} of {kind}, which would be random; "
            "the copy is not complete, or config.json belongs to another model"
        )
    if loading_info["mismatched_keys"]:
        weight, there, here = min(loading_info["mismatched_keys"])
        raise WrongWeights(
            f"{name}: {weight} is {tuple(there)} in its files and {tuple(here)} in {kind} as config.json has it; give "
            "a copy whose config.json belongs to its weights"
        )
    if unread:
        raise WrongWeights(
            f"{name}: its files hold {_first(unread)}, for which {kind} has no place; it is another kind of model, or "
            "config.json belongs to another one"
        )
    check_finite(name, model.named_parameters())
    return model


def load_classifier(auto_class: object, path: str, revision: str | None, dtype: str) -> Any:
    """A model with a score head, from safetensors. The head of the language model that it was made of may stay unread.

    dtype: auto, float32 or bfloat16. Raises WrongWeights as load_model does.
    """
    wanted = dtype if dtype == "auto" else getattr(torch, dtype)
    own = {"revision": revision, "trust_remote_code": False, "use_safetensors": True, "dtype": wanted}
    return load_model(auto_class, path, f"path={path}", unused=[r"^lm_head\."], **own)


def check_finite(name: str, weights: Iterable[tuple[str, Tensor]]) -> None:
    """Raises WrongWeights if a weight is nan or inf anywhere. Weights of fewer than 16 bits are not looked at."""
    for key, weight in weights:
        if not weight.is_floating_point() or weight.itemsize < 2 or weight.is_meta:
            continue
        # a sum is many times faster than a look at each number; only a sum that is not finite needs the look
        parts = weight.detach().flatten().split(_PIECE)
        if all(math.isfinite(float(part.sum(dtype=torch.float32))) for part in parts):
            continue
        count = sum(int((~part.isfinite()).sum()) for part in parts)
        if count:
            raise WrongWeights(f"{name}: {count} numbers of {key} are nan or inf; its files are damaged")


def check_tokens(name: str, tokenizer: Tokenizer, size: int, rows: Iterable[Sequence[int] | np.ndarray]) -> None:
    """Raises ValueError if rows of token ids hold one that an embedding of `size` rows has not."""
    largest = max((int(np.max(row)) for row in rows if len(row)), default=0)
    if largest >= size:
        text = tokenizer.convert_ids_to_tokens(largest)
        raise ValueError(
            f"{name}: its tokenizer writes {text!r} as token {largest}, and its embedding has rows 0 to {size - 1}; "
            "the tokenizer belongs to another model, or the model was not resized when tokens were added"
        )


def check_generation_config(name: str, config: Any) -> None:
    """Raises ValueError for settings of generation that transformers reads but would not save."""
    if config is None:
        return
    try:
        config.validate(strict=True)
    except ValueError as error:
        fault = next((line[2:] for line in str(error).splitlines() if line.startswith("- ")), str(error))
        raise ValueError(
            f"{name}: its generation_config.json cannot be saved with a trained model ({fault[:300]}); mend that file"
        ) from error


def _first(names: Collection[str]) -> str:
    """The first of some names, and how many others there are."""
    others = len(names) - 1
    return f"{min(names)}{f' and {others} other weights' if others else ''}"
