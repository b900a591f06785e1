"""A set on the hub is read by streaming: from a server here that answers as the hub does; tests have no network."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import datasets
import pytest

COMMIT = "a" * 40
API, FILES = "/api/datasets/me/pairs", "/datasets/me/pairs/resolve/"


class Hub(BaseHTTPRequestHandler):
    """The set me/pairs, of the files below `root`; asked: the paths of all requests."""

    root: Path
    asked: list[str]

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(self.path.partition("?")[0])
        self.asked.append(f"{self.command} {path}")
        if path.startswith(f"{API}/tree/"):
            self._tree(self.root / path.removeprefix(f"{API}/tree/").partition("/")[2])
        elif path.startswith(API):
            told = {"id": "me/pairs", "sha": COMMIT, "private": False, "tags": [], "downloads": 0, "likes": 0}
            self._json(told | {"siblings": [{"rfilename": name} for name in self._names()]})
        elif path.startswith(FILES) and (file := self.root / path.removeprefix(FILES).partition("/")[2]).is_file():
            self._file(file)
        else:
            self._send(404, b"{}", {"X-Error-Code": "EntryNotFound"})

    def _names(self) -> list[str]:
        return sorted(p.relative_to(self.root).as_posix() for p in self.root.rglob("*") if p.is_file())

    def _tree(self, folder: Path) -> None:
        found = []
        for path in sorted(folder.iterdir()):
            kind = "file" if path.is_file() else "directory"
            size = path.stat().st_size if path.is_file() else 0
            found.append({"type": kind, "oid": "b" * 40, "size": size, "path": str(path.relative_to(self.root))})
        self._json(found)

    def _file(self, file: Path) -> None:
        body, headers = file.read_bytes(), {"ETag": '"b"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        asked = self.headers.get("Range")
        if asked is None:
            self._send(200, body, headers)
            return
        first, last = asked.removeprefix("bytes=").split("-")
        a, z = int(first), min(int(last or len(body)), len(body) - 1)
        self._send(206, body[a : z + 1], headers | {"Content-Range": f"bytes {a}-{z}/{len(body)}"})

    def _json(self, value: object) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, code: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(code)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Nothing."""


@pytest.mark.slow
def test_a_hub_set_is_streamed_and_goes_on_from_its_place(tmp_path):
    """As the same rows of a folder; nothing of the set is left on this machine."""
    for part, first in enumerate((0, 20)):
        rows = [
            {"prompt": f"Question {i}?", "chosen": f"good {i}", "rejected": f"bad {i}"}
            for i in range(first, first + 20)
        ]
        path = tmp_path / "hub/data" / f"train-{part:05}-of-00002.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        datasets.Dataset.from_list(rows).to_parquet(path)
    served = type("Served", (Hub,), {"root": tmp_path / "hub", "asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), served)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    home = tmp_path / "home"
    env = os.environ | {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "0", "HF_DATASETS_OFFLINE": "0",
    }  # fmt: skip

    def rows_of(source: str, *steps: int) -> list[dict]:
        run = tmp_path / f"run-{Path(source).name}-{len(steps)}"
        for last in steps:
            words = ["train", "recipe=dpo", "model=tiny", f"data.train={source}", "data.streaming=true",
                     "data.shuffle_buffer=8", "data.heldout_fraction=0", f"trainer.max_steps={last}",
                     "trainer.schedule_steps=6", "trainer.batch_size=8", "trainer.num_samples=0",
                     "trainer.precision=float32", f"run.dir={run}"]  # fmt: skip
            done = subprocess.run([sys.executable, "-m", "align.cli", *words], env=env, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
        found = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in found]

    try:
        streamed = rows_of("me/pairs", 6)
        assert rows_of("me/pairs", 4, 6) == streamed
    finally:
        server.shutdown()
    assert rows_of(str(tmp_path / "hub"), 6) == streamed
    assert any(asked.startswith(f"GET {FILES}") for asked in served.asked)
    assert not list(home.rglob("*.arrow"))
    assert not list(home.rglob("*.parquet"))
