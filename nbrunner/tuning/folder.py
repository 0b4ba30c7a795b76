"""A run on the disk: what it is, its data, its checkpoints. Everything appears whole or not at all.

::

    run.json                what was asked for, of which model
    data.jsonl, eval.jsonl  the examples
    checkpoint-000012/      adapter, optimiser, scheduler, random state, position, history
    adapter/                the result, a PEFT directory
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nbrunner.errors import UserInputError
from nbrunner.tuning.data import Examples, parse_lines, read_examples

RUN_FILE = "run.json"
ADAPTER = "adapter"
HISTORY_FILE = "history.json"
LEARNED_FILE = "learned.safetensors"
FORMAT = 1

_CHECKPOINT = re.compile(r"checkpoint-(\d+)$")
_KEEP = 2
"""Checkpoints that stay: one may be on a disk that fills up just now."""


class RunFolder:
    """The folder of one run, locked against a second process that would continue the same run.

    Raises
    ------
    UserInputError
        It cannot be written, or another process uses it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path.expanduser().resolve()
        self._lock: Any = None

    @classmethod
    def create(cls, path: str | Path | None, method: str) -> RunFolder:
        """A new one; without a path, in ``nbrunner-runs`` below the working directory."""
        if path is None:
            base = Path("nbrunner-runs") / f"{time.strftime('%Y%m%d-%H%M%S')}-{method}"
            path, number = base, 1
            while path.exists():
                number += 1
                path = base.with_name(f"{base.name}-{number}")
        folder = cls(Path(path))
        if (folder.path / RUN_FILE).exists():
            raise UserInputError(
                f"{path} holds a run already: nbrunner.resume({str(path)!r}) goes on with it; another out_dir "
                "begins one."
            )
        try:
            folder.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserInputError(f"the run cannot be kept in {path}: {error}") from None
        folder.lock()
        return folder

    @classmethod
    def open(cls, path: str | Path) -> RunFolder:
        """One that exists."""
        folder = cls(Path(path))
        if folder.path.name.startswith("checkpoint-") and (folder.path.parent / RUN_FILE).exists():
            folder = cls(folder.path.parent)
        if not (folder.path / RUN_FILE).is_file():
            raise UserInputError(f"there is no run in {path}: {RUN_FILE} is missing.")
        folder.lock()
        return folder

    def lock(self) -> None:
        """Keep others out until `unlock`, or until this process ends in whatever way."""
        try:
            import fcntl
        except ImportError:  # Windows: two processes that continue one run are the user's to avoid
            return
        file = (self.path / ".lock").open("w")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.close()
            raise UserInputError(
                f"the run in {self.path} is open already, here or in another process: stop it there first."
            ) from None
        self._lock = file

    def unlock(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    # -- what it is ----------------------------------------------------------------------------------------------

    def write(self, facts: dict[str, Any], data: Examples, evaluation: Examples | None) -> None:
        """Write down what the run is, before it starts."""
        _write(self.path / "data.jsonl", data.dumps())
        if evaluation is not None:
            _write(self.path / "eval.jsonl", evaluation.dumps())
        _write(self.path / RUN_FILE, json.dumps({"format": FORMAT, **facts}, indent=2, ensure_ascii=False) + "\n")

    def read(self) -> dict[str, Any]:
        """What it is.

        Raises
        ------
        UserInputError
            The file was changed into something else, or comes from a later version.
        """
        try:
            facts = json.loads((self.path / RUN_FILE).read_text("utf-8"))
            if not isinstance(facts, dict) or not isinstance(facts["settings"], dict):
                raise TypeError("no settings")
            if facts["format"] > FORMAT:
                raise UserInputError(
                    f"the run in {self.path} was made by a later version of nbrunner; update this one."
                )
        except (OSError, ValueError, KeyError, TypeError) as error:
            if isinstance(error, UserInputError):
                raise
            raise UserInputError(f"{self.path / RUN_FILE} cannot be read: {error!r}") from None
        return facts

    def data(self, *, labelled: bool) -> tuple[Examples, Examples | None]:
        """The examples to learn and to evaluate."""

        def read(name: str) -> Examples:
            rows = parse_lines((self.path / name).read_text("utf-8"), name=name)
            return read_examples(rows, labelled=labelled, name=name)

        try:
            return read("data.jsonl"), read("eval.jsonl") if (self.path / "eval.jsonl").exists() else None
        except OSError as error:
            raise UserInputError(f"the data of the run in {self.path} are gone: {error}") from None

    # -- checkpoints ---------------------------------------------------------------------------------------------

    @property
    def checkpoints(self) -> list[Path]:
        """Whole ones, oldest first."""
        found = [one for one in self.path.glob("checkpoint-*") if _CHECKPOINT.search(one.name)]
        return sorted(found, key=_step_of)

    @property
    def last_checkpoint(self) -> Path | None:
        return self.checkpoints[-1] if self.checkpoints else None

    @contextlib.contextmanager
    def writing(self, name: str) -> Iterator[Path]:
        """An empty folder to write into, which becomes ``name`` when the block ends well, and nothing otherwise."""
        self.sweep()
        staged = Path(tempfile.mkdtemp(prefix=".writing-", dir=self.path))
        try:
            yield staged
            for file in staged.rglob("*"):
                if file.is_file():
                    _to_disk(file)
            final = self.path / name
            old = staged.with_name(f".old-{staged.name}")
            if final.exists():
                final.replace(old)
            staged.replace(final)
            shutil.rmtree(old, ignore_errors=True)
        except BaseException:
            shutil.rmtree(staged, ignore_errors=True)
            raise
        if _CHECKPOINT.search(name):
            for earlier in self.checkpoints[:-_KEEP]:
                shutil.rmtree(earlier, ignore_errors=True)

    def sweep(self) -> None:
        """Remove what a killed process was writing."""
        for pattern in (".writing-*", ".old-*"):
            for one in self.path.glob(pattern):
                shutil.rmtree(one, ignore_errors=True)


def checkpoint_name(step: int) -> str:
    """Of the checkpoint after a step."""
    return f"checkpoint-{step:06d}"


def _step_of(checkpoint: Path) -> int:
    match = _CHECKPOINT.search(checkpoint.name)
    return int(match[1]) if match else -1


def _write(path: Path, content: str) -> None:
    staged = path.with_name(f".{path.name}.part")
    staged.write_text(content, "utf-8")
    _to_disk(staged)
    staged.replace(path)


def _to_disk(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
