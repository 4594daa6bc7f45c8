"""Checks within seconds whether the Hugging Face hub can be reached.

It fetches nothing. The hub's client tries each request six times, which takes a minute without a network.
"""

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

SECONDS = 3.0  # without an answer after this time, the hub is unreachable; HF_HUB_ETAG_TIMEOUT overrides it
PAUSE = 0.5  # before the second and last try
KEPT_SECONDS = 30.0  # how long a result is cached
_OUT_OF_REACH = {"ConnectError", "ConnectTimeout", "ProxyError"}  # of httpx; any other error is an answer
_known: list[tuple[float, str]] = []  # the cached result: time, and why the hub is unreachable


@contextmanager
def hub_or_cache() -> Iterator[str]:
    """Context manager: if the hub cannot be reached, its clients use only their cache.

    Yields:
        Why it cannot be reached; an empty text if it can.
    """
    from huggingface_hub import constants

    found = constants.HF_HUB_OFFLINE
    why = "HF_HUB_OFFLINE is set" if found else _why_unreachable()
    try:
        constants.HF_HUB_OFFLINE = found or bool(why)
        yield why
    finally:
        constants.HF_HUB_OFFLINE = found


def is_cached(name: str, revision: str | None = None) -> bool:
    """Whether the cache holds the config of a model, which every load needs."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        return isinstance(try_to_load_from_cache(name, "config.json", revision=revision), str)
    except HFValidationError:
        return False


def _why_unreachable() -> str:
    if not _known or time.monotonic() - _known[-1][0] > KEPT_SECONDS:
        _known[:] = [(time.monotonic(), _ask())]
    return _known[-1][1]


def _ask() -> str:
    """Send the request in a separate thread, because a DNS look-up may take longer than any timeout."""
    from huggingface_hub import constants

    patience = constants.HF_HUB_ETAG_TIMEOUT if "HF_HUB_ETAG_TIMEOUT" in os.environ else SECONDS
    answers: list[str] = []

    def ask() -> None:
        answers.append(_head(patience) and _head(patience, PAUSE))

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(patience)
    return (
        answers[0] if answers else f"no answer within {patience:g} s; HF_HUB_ETAG_TIMEOUT sets another limit"
    )


def _head(patience: float, pause: float = 0.0) -> str:
    """Why one request gets no answer, or an empty text; a slow answer after the connection counts as one."""
    from huggingface_hub import constants, get_session

    time.sleep(pause)
    try:
        get_session().head(
            constants.ENDPOINT, timeout=(patience, PAUSE, PAUSE, patience), follow_redirects=False
        )
    except Exception as error:
        kinds = {kind.__name__ for kind in type(error).__mro__}
        return (str(error) or type(error).__name__) if kinds & _OUT_OF_REACH else ""
    return ""
