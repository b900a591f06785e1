"""align check, align show, align recipes."""

from __future__ import annotations

from align.cli.parse import Call
from align.cli.show import show as say


def check(call: Call) -> int:
    """Compose and validate, or list every setting."""
    from align.config import compose, keys_with_help

    if "--keys" in call.options:
        if call.settings:
            raise ValueError(f"align check --keys lists every setting; leave {call.settings[0]} out")
        say("\n".join(keys_with_help()))
        return 0
    config = compose(call.settings, call.config_dir)
    from align.config.validate import validate

    validate(config)
    for line in config.remarks:
        say(line)
    choices = ", ".join(f"{g}={o}" for g, o in sorted(config.choices.items()))
    say(f"ok: {choices}")
    return 0


def show(call: Call) -> int:
    """The settings as they were composed; interpolations stay, so that no secret of the environment is printed."""
    from omegaconf import OmegaConf

    from align.config import compose

    say(OmegaConf.to_yaml(compose(call.settings, call.config_dir).tree).rstrip("\n"))
    return 0


def recipes(call: Call) -> int:
    """A line for each recipe."""
    from align.vocabulary import recipes

    if call.settings:
        raise ValueError("align recipes takes no settings")
    for name, path in recipes(call.config_dir).items():
        head = path.read_text().partition("\n")[0].lstrip("# ")
        say(f"{name:24s} {head}".rstrip())
    return 0
