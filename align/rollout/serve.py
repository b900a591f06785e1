"""A vLLM server that takes weights while it runs: python -m align.rollout.serve --model DIRECTORY --port N [OPTION ...]

Every other option is vLLM's own. See docs/rollout_server.md. Never let it face the internet: who can reach it can give
it weights and make it read files.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence

from align.rollout import transfer

# What the client relies on.
_OURS = {
    "--generation-config": "vllm",  # none of the model's own settings
    "--logprobs-mode": "raw_logprobs",  # at temperature 1, before top_p and top_k
    "--weight-transfer-config": json.dumps({"backend": transfer.BACKEND}),
}
# Linear layers by their names in the Llama, Mistral, Qwen and Gemma families.
_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def arguments(words: Sequence[str], on_cpu: bool) -> list[str]:
    """vLLM's arguments. Raises ValueError for options that are ours and for what is missing."""
    given = {word.partition("=")[0].replace("_", "-") for word in words if word.startswith("--")}
    for option in _OURS:
        if option in given:
            raise ValueError(f"{option} is set by align.rollout.serve; leave it out")
    for option in ("--model", "--port"):
        if option not in given:
            raise ValueError(f"{option} is missing: python -m align.rollout.serve --model DIRECTORY --port N")
    out = list(words)
    if "--host" not in given:
        out += ["--host", "127.0.0.1"]
    for option, value in _OURS.items():
        out += [option, value]
    if "--enable-lora" in given and "--lora-target-modules" not in given:
        # vLLM cannot tell log-probs of more than one prompt when the head could carry an adapter
        out += ["--lora-target-modules", *_LINEAR]
    if on_cpu:
        # A prompt in parts takes back a draw from its generator, which generators of the CPU cannot do.
        out += ["--no-enable-chunked-prefill"]
        out += [] if given & {"--enforce-eager", "--no-enforce-eager"} else ["--enforce-eager"]
    return out


def environment(words: Sequence[str], on_cpu: bool) -> dict[str, str]:
    """Variables of the server; what stands in the environment already stays."""
    found = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_NO_USAGE_STATS": "1"}
    if "--enable-lora" in words:
        found["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "True"
    if on_cpu:
        # torch.compile would build a few of vLLM's helpers with g++ at the first request
        found["TORCHDYNAMO_DISABLE"] = "1"
    return found


def main(words: Sequence[str]) -> None:
    """Serve until a signal comes."""
    from vllm.platforms import current_platform

    on_cpu = current_platform.is_cpu()
    try:
        sys.argv = [sys.argv[0], *arguments(words, on_cpu)]
    except ValueError as error:
        raise SystemExit(str(error)) from None
    for name, value in environment(words, on_cpu).items():
        os.environ.setdefault(name, value)
    from vllm.entrypoints.launchers.api_server.entry import main as serve

    serve()


# vLLM's workers import this module again, under the second name, and look for the backend too.
if __name__ in ("__main__", "__mp_main__"):
    from align.rollout.file_transfer import register

    register()
if __name__ == "__main__":
    main(sys.argv[1:])
