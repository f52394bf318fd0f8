"""Verdicts on disk: one JSON file for a key, written whole or not at all.

The folder lies below ``XDG_CACHE_HOME``, or ``~/.cache``. Nothing that is read is executed: names are looked up among
the kernels that are registered. A file that cannot be read, or whose key is another, is as good as none. A folder that
cannot be written to costs a race in each process, no more.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from .contest import STRIKES, Verdict, from_json, to_json

try:
    import fcntl
except ImportError:  # Windows: processes race side by side
    fcntl = None  # type: ignore[assignment]

VERSION = 1


def folder() -> Path:
    """Where verdicts are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sm12x-compile" / "race"


class Verdicts:
    """The verdicts in one folder."""

    def __init__(self, where: Path | None = None) -> None:
        self.folder = where or folder()

    def load(self, key: Mapping[str, Any]) -> Verdict | None:
        """What was found for this key, or None."""
        data = _read(self._path(key))
        try:
            if data["version"] != VERSION or data["key"] != json.loads(_text(key)):
                return None
            return from_json(data["verdict"])
        except (KeyError, TypeError, ValueError):
            return None

    def store(self, key: Mapping[str, Any], verdict: Verdict) -> bool:
        """Keep a verdict; whether that was possible."""
        data = {"version": VERSION, "key": json.loads(_text(key)), "verdict": to_json(verdict)}
        return _write(self._path(key), data)

    def strikes(self, key: Mapping[str, Any]) -> DiskStrikes:
        """Who was running when earlier processes ended."""
        return DiskStrikes(self._path(key).with_suffix(".strikes.json"))

    def _path(self, key: Mapping[str, Any]) -> Path:
        return self.folder / f"{hashlib.sha256(_text(key).encode()).hexdigest()[:32]}.json"

    @contextlib.contextmanager
    def alone(self, patience: float) -> Iterator[None]:
        """One process at a time, so that races don't disturb each other; after `patience` seconds, regardless."""
        file = None
        if fcntl is not None:
            with contextlib.suppress(OSError):
                self.folder.mkdir(parents=True, exist_ok=True)
                file = (self.folder / "lock").open("w")
        try:
            if file is not None:
                until = time.monotonic() + patience
                while time.monotonic() < until:
                    try:
                        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                        break
                    except OSError:
                        time.sleep(0.05)
            yield
        finally:
            if file is not None:
                file.close()  # gives the lock back


class DiskStrikes:
    """A strike stands on disk while a candidate runs; if the process ends meanwhile, it stays."""

    def __init__(self, path: Path) -> None:
        self.path = path
        found = _read(path)
        counts = found.items() if isinstance(found, dict) else ()
        self._counts: dict[str, int] = {n: c for n, c in counts if isinstance(c, int) and not isinstance(c, bool)}
        self._before = dict(self._counts)

    def count(self, name: str) -> int:
        return self._before.get(name, 0)

    def begin(self, name: str) -> None:
        self._counts[name] = self._before.get(name, 0) + 1
        _write(self.path, self._counts)

    def condemn(self, name: str) -> None:
        """It is not tried again."""
        self._counts[name] = STRIKES
        _write(self.path, self._counts)

    def end(self, name: str) -> None:
        self._counts.pop(name, None)
        if self._counts:
            _write(self.path, self._counts)
        else:
            with contextlib.suppress(OSError):
                self.path.unlink(missing_ok=True)


def _text(key: Mapping[str, Any]) -> str:
    return json.dumps(key, sort_keys=True, default=str)


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return None


def _write(path: Path, data: Any) -> bool:
    temporary = ""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False) as file:
            temporary = file.name
            json.dump(data, file)
        os.replace(temporary, path)
        return True
    except OSError:
        if temporary:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
        return False
