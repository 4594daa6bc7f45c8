"""Copies files at URLs to the cache: s3://, gs://, hf://, https:// and all others that fsspec knows.

It does not read them. A file is copied again if its time or checksum on the server has changed, and each time
if the server tells neither.
"""

import json
from pathlib import Path

from brushstroke.data import cache
from brushstroke.errors import BrushstrokeError, DataError

_STAMPS = (  # facts by which file systems tell that a file has changed
    *("ETag", "etag", "Content-MD5", "Digest", "mtime", "created", "modified", "last_modified"),
    *("LastModified", "updated", "generation", "md5Hash", "checksum", "last_commit", "commit_hash"),
)


def is_url(source: object) -> bool:
    """Whether a source is the URL of a file.

    >>> is_url("s3://bucket/rows.jsonl"), is_url("rows.jsonl"), is_url("owner/name:train")
    (True, False, False)
    """
    return isinstance(source, str) and "://" in source


def local_copy(url: str) -> Path:
    """The copy of a remote file in the cache; it is fetched if there is none.

    Raises:
        DataError: there is no such file, or it cannot be fetched.
    """
    import fsspec

    try:
        system, place = fsspec.url_to_fs(url)
        name = Path(place.rstrip("/")).name
        if not name or not system.isfile(place):
            raise DataError(f"{url}: there is no such file; check the address (a folder cannot be read)")
        known = system.info(place)
        stamps = {name: known[name] for name in _STAMPS if known.get(name) is not None}
        key = cache.key_of(url, system.ukey(place), known.get("size"), stamps)
        found = cache.find("copies", key) if stamps else None
        if found is None:
            with cache.new_entry("copies", key) as new:
                system.get_file(place, str(new / name))
                (new / cache.META).write_text(json.dumps({"url": url}), "utf-8")
            found = cache.find("copies", key)
    except BrushstrokeError:
        raise
    except ImportError as error:
        raise DataError(f"{url}: {error}") from error
    except Exception as error:  # of the libraries of many file systems
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(f"{url}: cannot be fetched ({reason}); check the address and the network") from error
    if found is None:
        raise DataError(f"{url}: the copy in {cache.folder()} was removed; repeat the command")
    return found / name
