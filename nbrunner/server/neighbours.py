"""The servers that this user runs on this machine, found without a word to any of them.

Each server keeps a file in its daemon's private folder, and a lock on it. The kernel lets go of the lock when the
process ends, however it ends: a file that nobody holds is of a server that is no more, whoever has its process
number by now. The folder itself goes with the daemon, or when the next one starts.
"""

from __future__ import annotations

import fcntl
import json
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from nbrunner.server.options import PARENTS_FOLDER, PARENTS_PREFIX
from nbrunner.swarm.daemon import FOLDER_PREFIX, socket_root

_NAME = "serving"
_MOST_BYTES = 1 << 16


@dataclass(frozen=True)
class Neighbour:
    """What a server tells its neighbours.

    Attributes
    ----------
    threads
        That it was told to take; 0: its share.
    processors
        Numbers of those it may run on; empty: any.
    """

    threads: int = 0
    processors: frozenset[int] = frozenset()


class Seat:
    """Our own file: others count us from now until it is closed, or this process ends."""

    def __init__(self, folder: Path, facts: Neighbour) -> None:
        self.path = folder / _NAME
        part = folder / f"{_NAME}.part"  # nobody looks for it: they would take what is not locked yet for dead
        self._file = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            text = json.dumps({"threads": facts.threads, "processors": sorted(facts.processors)})
            os.write(self._file, text.encode())
            part.rename(self.path)
        except BaseException:
            os.close(self._file)
            raise

    def close(self) -> None:
        """Stop counting. May be called more than once."""
        file, self._file = self._file, -1
        if file >= 0:
            self.path.unlink(missing_ok=True)
            os.close(file)


def neighbours(own: Seat | None = None) -> list[Neighbour]:
    """Of all servers of this user but our own, as far as they keep their sockets where we do."""
    files = [path for path in _files(_root()) if own is None or path != own.path]
    return [found for path in files if (found := _read(path)) is not None]


def _root() -> Path:
    """Where daemons have their folders; of a local swarm's server, where its parent's folder is."""
    parents = os.environ.get(PARENTS_FOLDER)
    return Path(socket_root(str(Path(parents).parent) if parents else None))


def _files(root: Path) -> Iterator[Path]:
    for pattern in (f"{FOLDER_PREFIX}*", f"{PARENTS_PREFIX}*/{FOLDER_PREFIX}*"):
        yield from root.glob(f"{pattern}/{_NAME}")


def _read(path: Path) -> Neighbour | None:
    """None if it is another user's, or nobody's any more."""
    try:
        folder = path.parent.lstat()
        if not stat.S_ISDIR(folder.st_mode) or folder.st_uid != os.getuid() or stat.S_IMODE(folder.st_mode) & 0o077:
            return None
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return None  # it has just left
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return None
        except BlockingIOError:
            return _parse(os.read(file, _MOST_BYTES))
    except OSError:
        return None
    finally:
        os.close(file)


def _parse(text: bytes) -> Neighbour:
    """Of a version that says other things: that it is there at least."""
    try:
        facts = json.loads(text)
        return Neighbour(max(0, int(facts["threads"])), frozenset(int(one) for one in facts["processors"]))
    except (ValueError, TypeError, KeyError):
        return Neighbour()
