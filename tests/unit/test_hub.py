"""Without a network a hub id fails in seconds or comes from the cache; a slow network still works."""

import http.server
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import inference_kit
import pytest
from huggingface_hub import constants

import brushstroke as bs
from brushstroke import hub
from brushstroke.base import load_tokenizer
from brushstroke.base.weights import open_base
from brushstroke.cli import main

LIMIT = 5.0  # seconds; a minute without the check
NOWHERE = "http://no-such-host.invalid"
PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY")


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """No answer is known, no proxy is set, and the cache is empty."""
    for name in (*PROXIES, "HF_HUB_ETAG_TIMEOUT"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(hub, "_known", [])
    huggingface_hub.close_session()
    yield
    huggingface_hub.close_session()


class Handler(http.server.BaseHTTPRequestHandler):
    delay = 0.0

    def do_HEAD(self) -> None:
        time.sleep(self.delay)
        self.send_response(404)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def do_CONNECT(self) -> None:
        self.send_error(403)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[str]:
    """An address where something answers."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


@pytest.fixture
def closed() -> str:
    """An address that refuses."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{taken.getsockname()[1]}"


@pytest.fixture
def silent() -> Iterator[str]:
    """An address that never answers: its queue of connections is full."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        waiting = [socket.socket() for _ in range(4)]
        for caller in waiting:
            caller.setblocking(False)
            caller.connect_ex(listener.getsockname())
        time.sleep(0.1)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        for caller in waiting:
            caller.close()


def set_up(case: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    if case == "no such host":
        monkeypatch.setattr(constants, "ENDPOINT", NOWHERE)
    elif case in ("closed", "silent"):
        monkeypatch.setattr(constants, "ENDPOINT", request.getfixturevalue(case))
    elif case == "offline":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    else:  # a proxy
        monkeypatch.setattr(constants, "ENDPOINT", "https://huggingface.co")
        proxy = request.getfixturevalue("server" if case == "proxy that refuses" else "closed")
        monkeypatch.setenv("HTTPS_PROXY", proxy)


CASES = {
    "no such host": r"\[Errno -\d\]",
    "closed": "refused",
    "silent": "no answer within 3 s",
    "closed proxy": "refused",
    "proxy that refuses": "403",
    "offline": "HF_HUB_OFFLINE is set",
}


@pytest.mark.parametrize("load", [bs.load_base, load_tokenizer, open_base], ids=lambda f: f.__name__)
@pytest.mark.parametrize("case", CASES)
def test_without_the_hub_an_unknown_id_is_refused_in_seconds(case, load, monkeypatch, request) -> None:
    import transformers  # noqa: F401  (not a part of what is timed)

    set_up(case, monkeypatch, request)
    began = time.monotonic()
    with pytest.raises(bs.errors.BaseLoadError, match=f"hub cannot be reached .*{CASES[case]}"):
        load("nobody/brushstroke-has-no-such-model")
    assert time.monotonic() - began < LIMIT
    assert (case == "offline") == constants.HF_HUB_OFFLINE


@pytest.mark.parametrize(
    "words", [("generate", "ID", "hello"), ("data", "ID", "ROWS"), ("plan", "ID", "ROWS")]
)
def test_commands_report_unreachable_hub_in_one_line(words, monkeypatch, capsys, tmp_path) -> None:
    import transformers  # noqa: F401

    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    monkeypatch.setattr(constants, "ENDPOINT", NOWHERE)
    places = {"ID": "nobody/brushstroke-has-no-such-model", "ROWS": str(tmp_path / "rows.jsonl")}
    began = time.monotonic()
    assert main([places.get(word, word) for word in words]) == 1
    assert time.monotonic() - began < LIMIT
    reported = capsys.readouterr().err.splitlines()[-1]
    assert reported.startswith("error: there is no folder 'nobody/")
    assert "check the spelling and the network" in reported


@pytest.mark.parametrize("case", CASES)
def test_without_the_hub_a_model_comes_from_the_cache(case, monkeypatch, request, tmp_path) -> None:
    repository = tmp_path / "cache" / "models--somebody--tiny"
    folder = repository / "snapshots" / ("0" * 40)
    inference_kit.llama().save_pretrained(folder)
    inference_kit.tokenizer().save_pretrained(folder)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    set_up(case, monkeypatch, request)
    began = time.monotonic()
    base = bs.load_base("somebody/tiny", dtype="float32", device="cpu")
    assert time.monotonic() - began < LIMIT
    assert base.tokenizer is not None
    assert len(open_base("somebody/tiny")) > 0


@pytest.mark.parametrize("delay", [0.0, 2.0])
def test_an_address_that_answers_late_or_with_an_error_is_reached(delay, server, monkeypatch) -> None:
    monkeypatch.setattr(Handler, "delay", delay)
    monkeypatch.setattr(constants, "ENDPOINT", server)
    with hub.hub_or_cache() as why:
        assert why == ""
        assert not constants.HF_HUB_OFFLINE


def test_timeout_follows_the_hub_clients_setting(silent, monkeypatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", silent)
    monkeypatch.setenv("HF_HUB_ETAG_TIMEOUT", "1")
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 1)
    with hub.hub_or_cache() as why:
        assert why.startswith("no answer within 1 s")


def test_reachability_is_cached_and_not_checked_for_folders(closed, monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", closed)
    asked = []
    monkeypatch.setattr(hub, "_ask", lambda: asked.append(1) or "")
    with pytest.raises(bs.errors.BaseLoadError):
        bs.load_base(tmp_path)
    assert not asked
    for _ in range(2):
        with hub.hub_or_cache():
            pass
    assert len(asked) == 1
    hub._known[:] = [(time.monotonic() - 2 * hub.KEPT_SECONDS, "")]
    with hub.hub_or_cache():
        pass
    assert len(asked) == 2
