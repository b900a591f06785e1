"""The Python tool, against real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from align.tools.python import Limits, PythonTool, run_python

LIMITS = Limits(seconds=10.0)
BRIEF = Limits(seconds=0.5)


def test_prints_and_reports_no_error():
    result = run_python("print(6 * 7)", LIMITS)
    assert (result.output, result.error, result.timed_out, result.truncated) == ("42\n", "", False, False)
    assert {"limits", "audit"} <= set(result.isolation)


@pytest.mark.parametrize(
    "program, output",
    [
        ("x = 3\nx * 2", "6\n"),  # a last expression is shown, as at the prompt
        ("'a'", "'a'\n"),
        ("print('a')", "a\n"),  # whose value is None
        ("3 if True else 4; x = 1", ""),  # not last
        ("def f():\n    return 2\n[f() for _ in range(2)]", "[2, 2]\n"),
        ("print('no newline', end='')", "no newline"),
        ("print('h\u00e9 \u2603 \U0001f600')", "h\u00e9 \u2603 \U0001f600\n"),
        ("import os\nos.write(1, b'\\xff')\nNone", "\ufffd"),
        ("import sys\nprint('a', file=sys.stderr)", "a\n"),
        ("", ""),
        ("import sys, os\nprint(sys.argv, dict(os.environ), os.listdir())", "['program.py'] {} []\n"),
        ("from fractions import Fraction\nimport math, decimal, statistics\nFraction(1, 3)", "Fraction(1, 3)\n"),
        ("open('a', 'w').write('kept')\nprint(open('a').read())", "kept\n"),
        ("if __name__ == '__main__':\n    print('main')", "main\n"),
    ],
)  # fmt: skip
def test_output(program, output):
    result = run_python(program, LIMITS)
    assert (result.output, result.error) == (output, "")


@pytest.mark.parametrize(
    "program, error",
    [
        ("x = 1\nx / 0", "line 2: ZeroDivisionError: division by zero"),
        ("import json\njson.loads('')", "line 2: JSONDecodeError: Expecting value: line 1 column 1 (char 0)"),
        ("print('a'", "line 1: SyntaxError: '(' was never closed"),
        ("def f():\n    g()\n\nf()", "line 2: NameError: name 'g' is not defined"),
        ("raise ValueError", "line 1: ValueError"),
        ("input()", "line 1: EOFError: EOF when reading a line"),
        ("import sys\nsys.exit(3)", "SystemExit: 3"),
        ("import sys\nsys.exit('bad')", "SystemExit: bad"),
        ("import numpy", "line 1: ModuleNotFoundError: No module named 'numpy'"),
        ("def f():\n    return f()\nf()", "line 2: RecursionError: maximum recursion depth exceeded"),
        ("import os\nos.abort()", "ended by signal SIGABRT"),
        ("x = [0] * 10**10", "line 1: MemoryError"),
        ("open('a', 'wb').write(bytes(1 << 22))", "line 1: OSError: [Errno 27] File too large"),
    ],
)  # fmt: skip
def test_errors_name_the_line_and_no_path(program, error):
    assert run_python(program, LIMITS).error == error


@pytest.mark.parametrize("program", ["import sys\nsys.exit()", "import sys\nsys.exit(0)", "raise SystemExit"])
def test_a_clean_exit_is_no_error(program):
    assert run_python(program, LIMITS).error == ""


def test_output_before_an_error_is_kept():
    result = run_python("print('a')\nprint('b', end='')\n1 / 0", LIMITS)
    assert (result.output, result.error) == ("a\nb", "line 3: ZeroDivisionError: division by zero")


@pytest.mark.parametrize(
    "program",
    ["while True: pass", "import time\ntime.sleep(60)", "import os\nos.close(1)\nos.close(2)\nwhile True: pass"],
)
def test_endless_programs_end_in_time(program):
    start = time.monotonic()
    result = run_python(f"print('begun', flush=True)\n{program}", BRIEF)
    assert time.monotonic() - start < 5
    assert result.timed_out
    assert result.output == "begun\n"
    assert result.error == "TimeoutError: not finished after 0.5 s"


def test_a_flood_is_cut_and_ended():
    result = run_python("while True: print('x' * 99)", Limits(seconds=30.0, output_bytes=1000))
    assert result.output == ("x" * 99 + "\n") * 10
    assert result.truncated
    assert not result.timed_out
    assert result.seconds < 20
    assert result.error == "OutputError: more than 1000 bytes of output"


def test_exactly_the_limit_is_not_cut():
    result = run_python("print('x' * 999)", Limits(output_bytes=1000))
    assert (len(result.output), result.truncated) == (1000, False)


def test_a_program_longer_than_a_pipe():
    result = run_python("#" * 300_000 + "\nprint('end')", LIMITS)
    assert (result.output, result.error) == ("end\n", "")


@pytest.mark.parametrize(
    "program",
    [
        "import os\nwhile True: os.fork()",
        "import subprocess\nsubprocess.run(['true'])",
        "import os\nos.system('true')",
        "import os\nos.execv('/bin/true', ['true'])",
        "import os\nos.posix_spawn('/bin/true', ['true'], {})",
        "import multiprocessing\np = multiprocessing.Process(target=print)\np.start()",
        "import threading\nthreading.Thread(target=print).start()",
        "import socket\nsocket.socket()",
        "import socket\nsocket.getaddrinfo('localhost', 80)",
        "import ctypes",
        "import os, signal\nos.kill(os.getppid(), 0)",
        "open('/etc/passwd').read()",
        "import os\nopen(f'/proc/{os.getppid()}/environ').read()",
        "import os\nos.listdir('/')",
        "open('../escaped', 'w')",
        "import os\nos.symlink('/etc', 'here')\nopen('here/passwd').read()",
        "import os\nos.remove('/etc/hostname')",
        "import os\nos.chdir('/')",
        "import resource\nresource.setrlimit(resource.RLIMIT_CPU, (99, 99))",
    ],
)
def test_refused(program):
    assert "PermissionError" in run_python(program, LIMITS).error


def test_nothing_is_written_outside(tmp_path):
    target = tmp_path / "mark"
    result = run_python(f"import pathlib\npathlib.Path({str(target)!r}).write_text('x')", LIMITS)
    assert "PermissionError" in result.error
    assert not target.exists()


def test_the_kernel_refuses_what_the_audit_hook_would(tmp_path, monkeypatch):
    """With the hook's refusals off, the namespace and Landlock still stand, where the kernel has them."""
    import align.tools.python as module

    source = module._SANDBOX.read_text()
    bare = tmp_path / "sandbox.py"
    bare.write_text(source.replace("    sys.addaudithook(hook)", "    assert hook"))
    assert bare.read_text() != source
    monkeypatch.setattr(module, "_SANDBOX", bare)
    target = tmp_path / "mark"
    isolation = run_python("", LIMITS).isolation
    write = run_python(f"open({str(target)!r}, 'w')", LIMITS)
    connect = run_python("import socket\nsocket.create_connection(('127.0.0.1', 9), 1)", LIMITS)
    environ = run_python("import os\nprint(len(open(f'/proc/{os.getppid()}/environ').read()))", LIMITS)
    assert ("PermissionError" in write.error) == ("files" in isolation)
    assert target.exists() != ("files" in isolation)
    assert ("Network is unreachable" in connect.error) == ("network" in isolation)
    if "files" in isolation:
        assert "PermissionError" in environ.error


def test_the_parents_environment_does_not_reach_the_program(monkeypatch):
    monkeypatch.setenv("SECRET", "s3cret")
    result = run_python("import os\nprint(os.environ, os.getenv('SECRET'))", LIMITS)
    assert result.output == "environ({}) None\n"


def test_deterministic_programs_have_one_result():
    program = "print({'a', 'b', 'c'}, object(), hash('a'))\nimport os\nprint([0][1])"
    first, second = run_python(program, LIMITS), run_python(program, LIMITS)
    assert (first.output, first.error) == (second.output, second.error)
    assert "at 0x...>" in first.output


def test_the_directory_and_every_process_are_gone(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    result = run_python("import os\nopen('a', 'w')\nprint(os.getcwd(), os.getpid(), flush=True)\nwhile 1: pass", BRIEF)
    directory, pid = result.output.split()
    assert directory.startswith(str(tmp_path))
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid), 0)


def test_a_killed_parent_takes_the_program_with_it(tmp_path):
    program = "import os, time\nopen('mark', 'w').write(str(os.getpid()))\ntime.sleep(60)"
    call = f"from align.tools.python import *; run_python({program!r}, Limits(seconds=60.0))"
    parent = subprocess.Popen([sys.executable, "-c", call], env=os.environ | {"TMPDIR": str(tmp_path)})
    deadline = time.monotonic() + 30
    marks = []
    while time.monotonic() < deadline and not any(m.read_text() for m in marks):
        time.sleep(0.02)
        marks = list(tmp_path.glob("*/mark"))
    pid = int(marks[0].read_text())
    parent.kill()
    parent.wait()
    while time.monotonic() < deadline and _alive(pid):
        time.sleep(0.02)
    assert not _alive(pid)


def _alive(pid):
    try:
        return "Z" not in open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_no_descriptor_is_left_open():
    run_python("print(1)", LIMITS)
    before = len(os.listdir("/proc/self/fd"))
    run_python("print(1)", LIMITS)
    run_python("while True: pass", BRIEF)
    assert len(os.listdir("/proc/self/fd")) == before


def test_from_several_threads_at_once():
    results = {}
    threads = [
        threading.Thread(target=lambda n=n: results.update({n: run_python(f"print({n})", LIMITS)})) for n in range(8)
    ]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert {n: r.output for n, r in results.items()} == {n: f"{n}\n" for n in range(8)}


def test_a_signal_that_the_program_sends_itself_by_abort_is_named():
    assert signal.SIGABRT.name in run_python("import os\nos.abort()", LIMITS).error


@pytest.mark.parametrize(
    "text, call",
    [
        ("```python\nprint(1)\n```", "print(1)\n"),
        ("First\n```python\na\n```\nthen\n```python\nb\nc\n```\ndone", "b\nc\n"),
        ("  ```python  \na\n  ```", "a\n"),
        ("```python\nprint(1)", None),  # never closed
        ("```\nprint(1)\n```", None),
        ("```python\na\n```\n```output\n1\n```", "a\n"),
        ("The answer is 3.", None),
        ("```python\n```", ""),
        ("print('```python')", None),
    ],
)
def test_find(text, call):
    assert PythonTool(5.0, 512, 4096).find(text) == call


def test_observations():
    tool = PythonTool(5.0, 512, 100)
    assert tool.run("print('\\n\\na\\nb\\n')").text == "a\nb"
    failed = tool.run("print(1)\n1 / 0")
    assert (failed.text, failed.error) == ("1\nError: line 2: ZeroDivisionError: division by zero", True)
    assert tool.run("x = 1").text == ""
    flood = tool.run("print('x' * 200)")
    assert flood.text == "x" * 100 + "\nError: OutputError: more than 100 bytes of output"


def test_impossible_limits():
    with pytest.raises(ValueError, match="limits must be positive"):
        PythonTool(0.0, 512, 100)
