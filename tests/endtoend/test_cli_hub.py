"""Adapters by their hub id: from a local server instead of the hub, from the cache, and offline."""

import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import inference_kit
import pytest
from cli_kit import ENVIRONMENT, PLAIN, Done, rows, write_rows
from huggingface_hub import constants

from brushstroke import errors, fetch, hub, save
from brushstroke.formats.peft import ADAPTER_FILES, README
from brushstroke.formats.templates import OTHERS, SETTINGS

COMMIT = "0123456789abcdef0123456789abcdef01234567"
ID = "somebody/some-lora_1.0"
NO_HUB = "http://127.0.0.1:9"  # nothing answers there


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter for the tiny base, with a file beside it that nobody should fetch."""
    model = inference_kit.llama()
    made = save(inference_kit.adapter(model), tmp_path_factory.mktemp("adapter") / "made")
    (made / "optimizer.pt").write_bytes(b"not for you")
    return made


class StandIn(ThreadingHTTPServer):
    """The few answers of the hub that fetching one repository asks for."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.files = {path.name: path.read_bytes() for path in folder.iterdir()}
        self.asked: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Answers(BaseHTTPRequestHandler):
    server: StandIn

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        self.server.asked.append(path)
        if path in (f"/api/models/{ID}", f"/api/models/{ID}/revision/main"):
            siblings = [{"rfilename": name} for name in self.server.files]
            self._json({"id": ID, "modelId": ID, "sha": COMMIT, "siblings": siblings})
        elif path == f"/api/models/{ID}/tree/{COMMIT}":
            entries = [
                {"type": "file", "path": name, "size": len(content), "oid": self._etag(content)}
                for name, content in self.server.files.items()
            ]
            self._json(entries)
        elif path.startswith(f"/{ID}/resolve/") and path.rpartition("/")[2] in self.server.files:
            content = self.server.files[path.rpartition("/")[2]]
            self._send(200, content, {"ETag": f'"{self._etag(content)}"', "X-Repo-Commit": COMMIT})
        else:
            self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})

    @staticmethod
    def _etag(content: bytes) -> str:
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()

    def _json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)


@pytest.fixture
def server(adapter: Path) -> Iterator[StandIn]:
    made = StandIn(adapter)
    thread = threading.Thread(target=made.serve_forever)
    thread.start()
    yield made
    made.shutdown()
    thread.join()
    made.server_close()


def run(home: Path, *words: object, endpoint: str = NO_HUB, **more: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own: the hub's client reads its settings when it is imported."""
    environment = {
        **ENVIRONMENT,
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(home),
        "HF_ENDPOINT": endpoint,
        **more,
    }
    command = [sys.executable, "-c", "import sys; from brushstroke.cli import main; sys.exit(main())"]
    return subprocess.run(
        [*command, *map(str, words)], env=environment, capture_output=True, text=True, cwd=home, timeout=300
    )


def cached(home: Path, adapter: Path, leave_out: str = "") -> Path:
    """The hub client's cache, as an earlier fetch has left it."""
    folder = home / "hub" / f"models--{ID.replace('/', '--')}"
    snapshot = folder / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(COMMIT)
    (folder / "blobs").mkdir()
    for path in adapter.iterdir():
        if path.name not in (leave_out, "optimizer.pt"):
            (folder / "blobs" / path.name).write_bytes(path.read_bytes())
            (snapshot / path.name).symlink_to(folder / "blobs" / path.name)
    return snapshot


def test_a_hub_id_is_fetched_once_and_shown_again_without_a_network(
    server: StandIn, adapter: Path, tmp_path: Path
) -> None:
    expected = run(tmp_path, "show", adapter, "--json")
    shown = run(tmp_path, "show", ID, "--json", endpoint=server.url)
    assert shown.returncode == 0, shown.stderr
    assert json.loads(shown.stdout)["sites"] == json.loads(expected.stdout)["sites"]
    assert shown.stderr == ""
    fetched = {path.rpartition("/")[2] for path in server.asked if "/resolve/" in path}
    assert fetched == {"adapter_config.json", "adapter_model.safetensors", "brushstroke.json"}
    for more in ({}, {"HF_HUB_OFFLINE": "1"}):
        again = run(tmp_path, "show", ID, "--json", **more)
        assert (again.returncode, again.stdout, again.stderr) == (0, shown.stdout, "")


@pytest.mark.slow
def test_other_commands_accept_hub_ids(
    cli: Callable[..., Done], tiny: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("HF_HUB_CACHE", str(tmp_path / "hub")), ("ENDPOINT", NO_HUB)):
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "_known", [])
    monkeypatch.chdir(tmp_path)
    cached(tmp_path, adapter)
    data = write_rows(tmp_path / "rows.jsonl", rows(2))
    flags = ("--max-new-tokens", "3", "--json", *PLAIN)
    one = cli("generate", tiny, "Hi", "--adapter", ID, *flags)
    two = cli("generate", tiny, "Hi", "--adapter", adapter, *flags)
    assert one.status == two.status == 0, one.err
    answers = [json.loads(done.out) for done in (one, two)]
    assert [answer["adapter"] for answer in answers] == ["some-lora_1.0", "made"]
    assert answers[0]["answer"] == answers[1]["answer"]
    commands: list[tuple[object, ...]] = [
        ("merge", tiny, ID, "--out", tmp_path / "merged"),
        ("compare", ID, adapter),
        ("train", tiny, data, "--from", ID, "--out", tmp_path / "run", "--max-steps", "1", *PLAIN),
    ]
    for words in commands:
        done = cli(*words)
        assert done.status == 0, (words, done.err)
    assert (tmp_path / "merged" / "model.safetensors").is_file()


def test_local_folder_takes_precedence_over_hub_id(server: StandIn, adapter: Path, tmp_path: Path) -> None:
    folder = tmp_path / ID
    folder.mkdir(parents=True)
    shown = run(tmp_path, "show", ID, endpoint=server.url)
    assert shown.returncode == 1
    assert f"{ID} has no adapter_config.json" in shown.stderr
    for path in adapter.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    assert run(tmp_path, "show", ID, endpoint=server.url).returncode == 0
    assert not server.asked


@pytest.mark.parametrize(
    ("words", "more"),
    [
        (("show", "nobody/nothing"), {}),
        (("show", "nobody/nothing"), {"HF_HUB_OFFLINE": "1"}),
        (("generate", "BASE", "Hi", "--adapter", "nobody/nothing"), {}),
        (("merge", "BASE", "nobody/nothing", "--out", "new"), {}),
        (("spectrum", "nobody/nothing"), {}),
    ],
)
def test_offline_it_fails_in_one_line_before_torch_is_loaded(
    words: tuple[str, ...], more: dict[str, str], tiny: Path, tmp_path: Path
) -> None:
    began = os.times().children_user
    done = run(tmp_path, *(tiny if word == "BASE" else word for word in words), **more)
    assert os.times().children_user - began < 3  # of the processor: other processes make the clock run
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith(
        "error: there is no folder nobody/nothing, and the Hugging Face hub cannot be reached"
    )
    code = (
        "import sys; from brushstroke.cli import main; "
        f"main({[str(tiny) if word == 'BASE' else word for word in words]!r}); print('torch' in sys.modules)"
    )
    environment = {**ENVIRONMENT, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    loaded = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, cwd=tmp_path
    )
    assert loaded.stdout == "False\n", loaded.stderr


def test_unresponsive_hub_fails_fast(adapter: Path, tmp_path: Path) -> None:
    import socket

    cached(tmp_path, adapter)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        began = time.perf_counter()
        done = run(tmp_path, "show", "nobody/nothing", endpoint=endpoint)
        assert time.perf_counter() - began < fetch.PATIENCE + 15  # busy machines start slowly; it was 50 s
        assert "cannot be reached" in done.stderr
        assert run(tmp_path, "show", ID, endpoint=endpoint).returncode == 0  # what the cache has is used


def test_unknown_hub_id_is_refused(server: StandIn, tmp_path: Path) -> None:
    done = run(tmp_path, "show", "nobody/nothing", endpoint=server.url)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert "the Hugging Face hub has no model of that name, or a private one" in line


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"config.json", "model.safetensors"}, "has no adapter_config.json, so it is no adapter"),
        (
            {"adapter_config.json", "adapter_model.bin"},
            "has no adapter_model.safetensors, but adapter_model.bin",
        ),
        ({"a/adapter_config.json", "b/adapter_config.json"}, "no adapter_config.json, but adapters in a, b:"),
    ],
)
def test_hub_model_without_adapter_is_refused(
    server: StandIn, files: set[str], said: str, tmp_path: Path
) -> None:
    server.files = dict.fromkeys(files, b"{}")
    done = run(tmp_path, "show", ID, endpoint=server.url)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert said in line
    assert not [path for path in server.asked if "/resolve/" in path]


def test_incomplete_hub_cache_is_refused(adapter: Path, tmp_path: Path) -> None:
    cached(tmp_path, adapter, leave_out="adapter_model.safetensors")
    done = run(tmp_path, "show", ID)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert "has no adapter_model.safetensors" in line


@pytest.mark.parametrize("name", ["/a/b", "./a/b", "~/a/b", "a", "a/b/c", "a/b/", ".a/b", "a/.b", "a b/c"])
def test_paths_are_not_hub_ids(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "_fetch", lambda asked: pytest.fail(f"{asked} was looked up"))
    assert fetch.find_adapter(name) == Path(name).expanduser()


def test_all_files_that_are_read_are_fetched() -> None:
    assert {*ADAPTER_FILES} - {README} | {SETTINGS, f"{OTHERS}/*.jinja"} <= set(fetch.FETCHED)


def test_missing_adapter_folder_is_refused(tmp_path: Path) -> None:
    from brushstroke import load

    with pytest.raises(errors.AdapterFileError, match=r"there is no folder .*or a hub id \(owner/name\)"):
        load(tmp_path / "nowhere")
