"""`align average`: words to a directory. Loads torch only after the words have been read."""

from __future__ import annotations

from collections.abc import Callable

from align.averaging.words import parse

USAGE = """\
align average MODEL_DIR... out=DIR [method=NAME] [key=value ...] [--check]

  method=uniform                                 the mean (of reward models: WARM)
  method=weighted weights=[0.2,0.8]              a weighted mean; outside [0, 1] with extrapolate=true
  method=loss|steps penalty=P [values=[..]]      weights from held-out losses or steps
  method=stock base=DIR [filter_wise=true] [clamp=false]      Model Stock
  method=interpolate base=DIR alpha=A | sweep=[0,0.5,1] | blocks=[10,20] alphas=[a,b,c] other=d
                                                 A * base + (1 - A) * model, the same or by block of layers
  method=localize base=DIR density=D             each model's largest changes, stitched into the base
  merge=BASE                                     LoRA adapters: into the base, not as an adapter
  dtype=float32|bfloat16|float16|float64  shard_gib=5  max_memory_mib=256
  --check                                        only compare the models
"""


def run(words: list[str], say: Callable[[str], None]) -> int:
    """Do what stands after `align average`. Raises ValueError, one line, for all that the user can cure."""
    request = parse(words)
    from align.averaging.engine import average

    average(request, say)
    return 0
