"""The inside of the Python tool: a script, started by align.tools.python in a process of its own; never imported.

Reads the program from standard input, gives up what it can give up, runs the program. Imports nothing of align, and
little at all: its start is paid for at each call.
"""

import _thread
import json
import os
import resource
import sys

_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
# What the standard library reads of the system: itself, shared libraries, time zones, randomness.
_READABLE = ("/usr/lib", "/usr/lib64", "/lib", "/lib64", "/usr/share/zoneinfo", "/etc/ld.so.cache", "/etc/localtime",
             "/dev/null", "/dev/urandom")  # fmt: skip
_REFUSED = ("socket.", "subprocess.", "ctypes.", "os.fork", "os.forkpty", "os.exec", "os.posix_spawn", "os.spawn",
            "os.system", "os.kill", "os.killpg", "pty.", "signal.pthread_kill", "resource.setrlimit", "os.chdir",
            "os.setxattr", "os.removexattr", "sys.addaudithook")  # fmt: skip
_CHANGES = ("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate", "os.chmod",
            "os.chown", "os.utime", "os.chflags")  # fmt: skip


def limit(settings: dict) -> None:
    """Hard limits: an unprivileged process cannot raise them again."""
    for name, value in (
        ("RLIMIT_CPU", settings["cpu_s"]),
        ("RLIMIT_AS", settings["memory"]),
        ("RLIMIT_FSIZE", settings["file"]),
        ("RLIMIT_NOFILE", settings["open_files"]),
        # Counted per user, threads too: a limit below what the user already runs only forbids new ones, which is
        # what is wanted here. Root is exempt; audit() refuses new processes and threads in any case.
        ("RLIMIT_NPROC", 0),
        ("RLIMIT_CORE", 0),
    ):
        kind = getattr(resource, name)
        hard = resource.getrlimit(kind)[1]
        if hard != resource.RLIM_INFINITY:
            value = min(value, hard)
        resource.setrlimit(kind, (value, value))


def isolate(directory: str, readable: tuple) -> list:
    """The kernel's layers: no network interfaces, no files but these. Returns the names of those in force."""
    layers = []
    if not sys.platform.startswith("linux"):
        return layers
    try:
        import ctypes
    except ImportError:
        return layers
    libc = ctypes.CDLL(None, use_errno=True)
    # Before the limits: a user namespace of its own also takes root's privileges over the outside away.
    if libc.unshare(0x10000000 | 0x40000000 | 0x08000000) == 0:  # CLONE_NEWUSER, CLONE_NEWNET, CLONE_NEWIPC
        layers.append("network")
    libc.prctl(1, 9, 0, 0, 0)  # PR_SET_PDEATHSIG, SIGKILL: a killed run leaves no program behind
    if _landlock(ctypes, libc, directory, readable):
        layers.append("files")
    return layers


def _landlock(ctypes, libc, directory: str, readable: tuple) -> bool:
    """Landlock (linux/landlock.h), whose system calls have the same numbers on every architecture but alpha."""
    create, add, restrict = 444, 445, 446
    version = libc.syscall(create, None, 0, 1)
    if version < 1:
        return False
    read = 1 << 2 | 1 << 3
    every = (1 << 13) - 1  # version 1: execute, write, read, list, remove, make
    if version >= 2:
        every |= 1 << 13  # link or rename to another directory
    if version >= 3:
        every |= 1 << 14  # truncate
    ruleset = libc.syscall(create, ctypes.byref(ctypes.c_uint64(every)), ctypes.c_size_t(8), 0)
    if ruleset < 0:
        return False
    for path, access in [(directory, every & ~1), *((p, read) for p in readable)]:
        try:
            fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except OSError:
            continue
        if not os.path.isdir(path):
            access &= ~(1 << 3)
        rule = access.to_bytes(8, sys.byteorder) + fd.to_bytes(4, sys.byteorder)
        libc.syscall(add, ruleset, 1, rule, 0)
        os.close(fd)
    done = libc.prctl(38, 1, 0, 0, 0) == 0 and libc.syscall(restrict, ruleset, 0) == 0  # 38: PR_SET_NO_NEW_PRIVS
    os.close(ruleset)
    return done


def audit(directory: str, readable: tuple) -> None:
    """Refuse in Python what a program for a sum does not need; an audit hook cannot be taken away again."""
    realpath, fsdecode, separator = os.path.realpath, os.fsdecode, os.sep

    def inside(path, roots: tuple) -> bool:
        try:
            real = realpath(fsdecode(path))
        except (TypeError, ValueError):
            return False
        return any(real == root or real.startswith(root + separator) for root in roots)

    def hook(event: str, arguments: tuple) -> None:
        if event == "open":
            path, mode, flags = arguments
            if isinstance(path, int):
                return
            writing = bool((flags or 0) & _WRITING) or (isinstance(mode, str) and any(c in mode for c in "wax+"))
            if not inside(path, (directory,) if writing else (directory, *readable)):
                raise PermissionError(f"{'writing' if writing else 'reading'} {fsdecode(path)} is not allowed")
        elif event in ("os.listdir", "os.scandir"):
            if not inside(arguments[0] or ".", (directory, *readable)):
                raise PermissionError(f"listing {arguments[0]} is not allowed")
        elif event in _CHANGES:
            if not all(inside(a, (directory,)) for a in arguments if isinstance(a, (str, bytes))):
                raise PermissionError(f"{event} outside the working directory is not allowed")
        elif event.startswith(_REFUSED):
            raise PermissionError(f"{event} is not allowed")

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError("threads are not allowed")

    sys.addaudithook(hook)
    _thread.start_new_thread = _thread.start_new = refuse  # no event announces them


def execute(program: str) -> str:
    """Run it as __main__; returns the error in one line, "" if there was none. Raises SystemExit as it comes."""
    import _ast

    name = "<program>"
    scope = {"__name__": "__main__", "__builtins__": __builtins__}
    try:
        tree = compile(program, name, "exec", _ast.PyCF_ONLY_AST, True)
        assert isinstance(tree, _ast.Module)
        last = tree.body.pop() if tree.body and isinstance(tree.body[-1], _ast.Expr) else None
        exec(compile(tree, name, "exec", 0, True), scope)
        if isinstance(last, _ast.Expr):
            sys.displayhook(eval(compile(_ast.Expression(last.value), name, "eval", 0, True), scope))
    except SystemExit:
        raise
    except BaseException as error:
        return _line(error, name)
    return ""


def _line(error: BaseException, name: str) -> str:
    """Line of the program, kind and message: what a traceback says, without paths."""
    line = error.lineno if isinstance(error, SyntaxError) and error.filename == name else None
    message = error.msg if isinstance(error, SyntaxError) else ""
    step = error.__traceback__
    while step is not None and not isinstance(error, SyntaxError):
        if step.tb_frame.f_code.co_filename == name:
            line = step.tb_lineno
        step = step.tb_next
    try:
        message = message or str(error)
    except Exception:  # the program's own __str__
        message = ""
    kind = type(error).__name__
    return (f"line {line}: " if line else "") + (f"{kind}: {message}" if message else kind)


def main() -> None:
    settings = json.loads(sys.argv[1])
    directory = os.path.realpath(os.getcwd())
    prefixes = {os.path.realpath(p) for p in (sys.base_prefix, sys.base_exec_prefix)} - {"/usr", "/"}
    roots = {os.path.realpath(p) for p in sys.path if p} | prefixes | {os.path.realpath(p) for p in _READABLE}
    readable = tuple(sorted(roots))
    program = sys.stdin.buffer.read().decode("utf-8", errors="replace")
    sys.argv = ["program.py"]
    os.environ.clear()
    layers = isolate(directory, readable)
    limit(settings)
    audit(directory, readable)
    for name in [n for n in sys.modules if n in ("ctypes", "_ctypes", "resource") or n.startswith("ctypes.")]:
        del sys.modules[name]
    report = settings["report"]
    os.write(report, json.dumps({"isolation": ["limits", "audit", *layers]}).encode() + b"\n")
    code = 0
    error = ""
    try:
        error = execute(program)
    except SystemExit as stop:
        if stop.code is not None and not isinstance(stop.code, int):
            error = f"SystemExit: {stop.code}"
        code = stop.code if isinstance(stop.code, int) else 0
    try:
        sys.stdout.flush()
    except (OSError, ValueError) as closed:  # by the program, with text still to come
        error = error or _line(closed, "")
    if error:
        os.write(report, json.dumps({"error": error[:2000]}).encode() + b"\n")
    os._exit(code & 255 if not error else 1)  # no atexit handlers, no waiting for threads


if __name__ == "__main__":
    main()
