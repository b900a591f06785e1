"""The inside of a reward's process, started by align.rewards.calls: imports the user's function and calls it.

How a function is called is read from the names of its parameters:

    completion, prompt          for each completion: returns its number
    completions, prompts        for all at once: returns a list of numbers, one each, in order
    one parameter, other name   for all at once, with the list of Conversation objects

Beside them a function may ask for finished, messages, prompt_ids, token_ids (completion_ids for all at once), and any
other name is a column of the prompts' rows; **columns receives all columns that no parameter names. For all at once
each is a list. A parameter whose column a row lacks takes its default; without a default that completion has no score.
A class is instantiated once with the component's own keys and its __call__ follows the same rule; a function gets
these keys at each call.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import json
import math
import numbers
import os
import queue
import signal
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

from align.contracts import declared_by
from align.jsons import Fields
from align.rewards.base import Conversation, RewardTarget

# Of a message in a refusal or a failure: what fits a line for people.
MESSAGE = 300

# What a conversation offers besides the columns, by the name of a parameter: called for each, and for all at once.
_EACH = {
    "prompt": "prompt",
    "completion": "completion",
    "finished": "finished",
    "messages": "messages",
    "prompt_ids": "prompt_ids",
    "token_ids": "token_ids",
}
_ALL = {
    "prompts": "prompt",
    "completions": "completion",
    "finished": "finished",
    "messages": "messages",
    "prompt_ids": "prompt_ids",
    "token_ids": "token_ids",
    "completion_ids": "token_ids",
}
_RULE = (
    "ask for completion (called for each), completions (called for all at once), or one parameter of another name for "
    "the conversations"
)

Answer = float | tuple[str, str]  # a score, or (reason, message)


class Refused(ValueError):
    """The component cannot be used at all; the message goes to the user."""


@dataclass(frozen=True)
class Signature:
    """How a function wants to be called."""

    style: str  # each, all or conversations
    offered: tuple[tuple[str, str], ...]  # parameter -> attribute of Conversation
    required: tuple[str, ...]  # columns without a default
    optional: tuple[str, ...]  # columns with one
    rest: bool  # **columns


def resolve(path: str) -> Any:
    """What a dotted path names: module.name or module.Class.name. Raises Refused with the import's own error."""
    parts = path.split(".")
    if len(parts) < 2 or not all(part.isidentifier() for part in parts):
        raise Refused("is not a dotted path such as my.module.function")
    for length in range(len(parts) - 1, 0, -1):
        name = ".".join(parts[:length])
        try:
            found = importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is not None and (name == error.name or name.startswith(error.name + ".")):
                missing = error
                continue  # the last parts may be attributes
            raise Refused(f"cannot be imported ({_line(error)})") from error
        except Exception as error:  # whatever a module does while it is imported
            raise Refused(f"cannot be imported ({_line(error)})") from error
        for attribute in parts[length:]:
            try:
                found = getattr(found, attribute)
            except AttributeError as error:
                raise Refused(f"cannot be found ({_line(error)})") from error
        return found
    raise Refused(f"cannot be imported ({_line(missing)}); is its directory on PYTHONPATH?")


def bound(path: str, keys: Fields) -> tuple[Callable[..., object], Signature]:
    """The callable of a component and how to call it. Raises Refused for what cannot be called with these keys."""
    return bound_to(resolve(path), keys)


def bound_to(target: object, keys: Fields) -> tuple[Callable[..., object], Signature]:
    """The same of the object that a path names."""
    if not callable(target):
        raise Refused(f"is no function or class but {type(target).__name__}")
    if inspect.isclass(target):
        _check_keys(target, keys)
        try:
            target = target(**keys)
        except Exception as error:
            raise Refused(f"cannot be made: {_line(error)}") from error
        keys = {}
        if not callable(target):
            raise Refused("is a class without __call__")
    call = target if inspect.isroutine(target) else getattr(target, "__call__", target)  # noqa: B004
    if inspect.iscoroutinefunction(call) or inspect.isasyncgenfunction(call):
        raise Refused("is async; a reward is a plain function")
    try:
        parameters = inspect.signature(target).parameters
    except ValueError as error:
        raise Refused("has no signature that Python can read; wrap it in a function") from error
    signature = _signature(parameters.values(), keys)
    if not keys:
        return target, signature
    return lambda *args, **given: target(*args, **given, **keys), signature


def unmade(kind: type[RewardTarget], keys: Fields) -> Signature:
    """How an object of a class of ours is called, without one. Raises Refused as bound_to does."""
    _check_keys(kind, keys)
    try:
        kind.check_keys(**keys)
    except ValueError as error:
        raise Refused(f"cannot be made: {_line(error)}") from error
    _, *parameters = inspect.signature(kind.__call__).parameters.values()
    return _signature(parameters, {})


def _check_keys(kind: type, keys: Fields) -> None:
    try:
        inspect.signature(kind).bind(**keys)
    except TypeError as error:
        raise Refused(f"takes other keys: {_line(error)}") from error
    except ValueError:  # built in, without a signature
        pass


def _signature(parameters: Iterable[inspect.Parameter], keys: Fields) -> Signature:
    kinds = inspect.Parameter
    listed = [p for p in parameters if p.kind is not kinds.VAR_POSITIONAL]
    rest = any(p.kind is kinds.VAR_KEYWORD for p in listed)
    named = [p for p in listed if p.kind is not kinds.VAR_KEYWORD]
    names = {p.name for p in named}
    wrong = sorted(k for k in keys if k in _EACH or k in _ALL or (k not in names and not rest))
    if wrong:
        raise Refused(f"takes other keys: {', '.join(wrong)} cannot be set; its parameters are {', '.join(names)}")
    named = [p for p in named if p.name not in keys]
    each, every = names & {"prompt", "completion"}, names & {"prompts", "completions"}
    if each and every:
        raise Refused(f"asks for both {min(each)} and {min(every)}: {_RULE}")
    if not each and not every:
        wanted = [p for p in named if p.default is kinds.empty]
        if len(wanted) == 1 and wanted[0].name not in _EACH | _ALL and wanted[0].kind is not kinds.KEYWORD_ONLY:
            return Signature("conversations", (), (), (), False)
        raise Refused(f"cannot be called with parameters ({', '.join(p.name for p in listed)}): {_RULE}")
    positional = [p.name for p in named if p.kind is kinds.POSITIONAL_ONLY]
    if positional:
        raise Refused(f"has positional-only parameters ({', '.join(positional)}), which cannot be given by name")
    offers = _EACH if each else _ALL
    columns = [p for p in named if p.name not in offers]
    return Signature(
        "each" if each else "all",
        tuple((p.name, offers[p.name]) for p in named if p.name in offers),
        tuple(p.name for p in columns if p.default is kinds.empty),
        tuple(p.name for p in columns if p.default is not kinds.empty),
        rest,
    )


def call_each(function: Callable[..., object], signature: Signature, conversation: Conversation) -> Answer:
    """The number of one completion, whose row has the required columns."""
    given = {name: getattr(conversation, attribute) for name, attribute in signature.offered}
    fields = conversation.fields
    given |= {name: fields[name] for name in (*signature.required, *signature.optional) if name in fields}
    if signature.rest:
        given |= {name: value for name, value in fields.items() if name not in _EACH and name not in given}
    try:
        return number(function(**given))
    except Exception as error:
        return "raised", _line(error)


def call_all(
    function: Callable[..., object], signature: Signature, conversations: Sequence[Conversation]
) -> list[Answer] | tuple[str, str]:
    """The numbers of all, or (reason, message) where the call as a whole failed."""
    try:
        out: Any
        if signature.style == "conversations":
            out = function(list(conversations))
        else:
            out = function(**_columns(signature, conversations))
        out = out.tolist() if hasattr(out, "tolist") else out
    except Exception as error:
        return "raised", _line(error)
    if not isinstance(out, (list, tuple)):
        return "wrong_shape", f"returned {type(out).__name__} instead of a list of {len(conversations)} numbers"
    if len(out) != len(conversations):
        return "wrong_shape", f"returned {len(out)} values for {len(conversations)} completions"
    return [number(value) for value in out]


def _columns(signature: Signature, conversations: Sequence[Conversation]) -> Mapping[str, Sequence[object]]:
    given = {name: [getattr(c, attribute) for c in conversations] for name, attribute in signature.offered}
    present = dict.fromkeys(name for c in conversations for name in c.fields)
    names = [*signature.required, *(name for name in signature.optional if name in present)]
    if signature.rest:
        names += [name for name in present if name not in _ALL and name not in names]
    return given | {name: [c.fields.get(name) for c in conversations] for name in names}


def number(value: Any) -> Answer:
    """A finite float, or why it is none."""
    try:
        if hasattr(value, "tolist"):  # of numpy or torch
            value = value.tolist()
        if value is None:
            return "none", "returned None"
        if not isinstance(value, numbers.Real):
            kind = "wrong_shape" if isinstance(value, (list, tuple)) else "not_a_number"
            return kind, f"returned {type(value).__name__} {_short(repr(value)[:80])} instead of a number"
        value = float(value)
    except OverflowError:
        return "inf", "returned a number beyond the largest float"
    except Exception as error:  # a value's own methods
        return "not_a_number", f"returned what cannot be read as a number ({_line(error)})"
    if math.isnan(value):
        return "nan", "returned NaN"
    return value if math.isfinite(value) else ("inf", f"returned {value}")


def _line(error: BaseException) -> str:
    try:
        said = _short(str(error))
    except Exception:  # the error's own __str__
        said = ""
    return f"{type(error).__name__}: {said}" if said else type(error).__name__


def _short(text: str) -> str:
    return " ".join(text[: 4 * MESSAGE].split())[:MESSAGE]


def write(file: int, message: object) -> None:
    """A message into a pipe: its length, then JSON."""
    body = json.dumps(message).encode()
    rest = memoryview(struct.pack("!I", len(body)) + body)
    while rest:
        rest = rest[os.write(file, rest) :]


def _read(stream: BinaryIO) -> Any:
    """The next message; None at the end."""
    head = stream.read(4)
    body = stream.read(struct.unpack("!I", head)[0]) if len(head) == 4 else b""
    return json.loads(body) if body else None


def _listen(stream: BinaryIO, requests: queue.SimpleQueue[object]) -> None:
    """Pass requests on. When the other side is gone the process ends, whatever the user's function is doing."""
    request: object = True
    while request is not None:
        try:
            request = _read(stream)
        except (OSError, ValueError):
            request = None
        requests.put(request)
    time.sleep(0.5)  # an idle main thread ends by itself before, with its atexit handlers
    os._exit(0)


def _serve(function: Callable[..., object], signature: Signature, request: Fields, answers: int) -> None:
    conversations = [
        Conversation(**c | {"messages": None if c["messages"] is None else tuple(c["messages"])})
        for c in request["conversations"]
    ]
    write(answers, {"begin": True})  # from here on the deadline counts
    if signature.style == "each":
        for conversation in conversations:
            write(answers, {"value": call_each(function, signature, conversation)})
        return
    out = call_all(function, signature, conversations)
    write(answers, {"failed": out} if isinstance(out, tuple) else {"values": out})


def _die_with_parent(parent: int) -> None:
    """Also where the interpreter cannot run another thread, inside foreign code that never returns."""
    if sys.platform.startswith("linux"):
        with contextlib.suppress(ImportError, OSError):
            import ctypes

            ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG
            if os.getppid() != parent:
                os._exit(0)


def _in_process(target: str) -> bool:
    found = resolve(target)
    try:
        return declared_by(found, RewardTarget, "").in_process
    except ValueError as error:  # what is said of it begins with the setting, as every refusal here will
        raise Refused(str(error).partition(": ")[2]) from error


def main() -> None:
    """Arguments: the two pipes and the parent's process id. The first request says what to import."""
    requests_in, answers, parent = map(int, sys.argv[1:4])
    _die_with_parent(parent)
    for file in (requests_in, answers):
        os.set_inheritable(file, False)
    os.dup2(2, 1)  # prints go where errors go: nobody reads this process's standard output
    requests: queue.SimpleQueue[Any] = queue.SimpleQueue()
    stream = os.fdopen(requests_in, "rb")
    threading.Thread(target=_listen, args=(stream, requests), daemon=True).start()
    first = requests.get()
    if first is None:
        return
    sys.argv = [first["target"]]
    try:
        if _in_process(first["target"]):
            write(answers, {"style": "in_process", "required": []})
            return
        function, signature = bound(first["target"], first["keys"])
    except Refused as error:
        write(answers, {"refused": str(error)})
        return
    write(answers, {"style": signature.style, "required": signature.required})
    while (request := requests.get()) is not None:
        _serve(function, signature, request, answers)
