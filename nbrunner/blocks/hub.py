"""A checkpoint in a hub repository, of which only the needed bytes are downloaded.

Small files and whole shards come through `huggingface_hub.hf_hub_download`, so they share its cache, token,
endpoint and offline mode with everything else on the machine. Where a span needs only a part of a shard, the header
and the byte ranges of its tensors are fetched with HTTP range requests and written, at their places, into a sparse
file of the shard's full size: to everything that reads it, it is the shard. A second file beside it says which
tensors are there; it is written after them, so an interrupted download is continued and never believed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import BinaryIO

from huggingface_hub import cached_assets_path, hf_hub_download, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,  # the base of all errors of the HTTP client huggingface_hub uses, whichever release that is
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import WeakFileLock, build_hf_headers, hf_raise_for_status, http_stream_backoff

from ..errors import CheckpointError
from .checkpoint import (
    INDEX_FILE,
    SINGLE_FILE,
    Checkpoint,
    TensorEntry,
    by_file,
    header_length,
    no_safetensors,
    parse_header,
    read_config,
    read_index,
)

_FIRST_READ = 16 * 2**10  # holds the header of a shard of about a hundred tensors
_BRIDGED_GAP = 64 * 2**10  # one longer request costs less than two requests
_WHOLE_FILE_SHARE = 0.8  # from here on the shard is worth having in huggingface_hub's own cache
_ATTEMPTS = 5


@dataclass
class _Header:
    entries: dict[str, TensorEntry]
    size: int
    raw: bytes


class HubCheckpoint(Checkpoint):
    """A hub repository at one commit; see `nbrunner.blocks.checkpoint.resolve_checkpoint` for the parameters."""

    def __init__(
        self,
        repo: str,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
    ) -> None:
        self.name = self.source = self.repo = repo
        self.token = token
        self.cache_dir = None if cache_dir is None else str(cache_dir)
        # Read here and not when huggingface_hub was imported, so that setting it in a notebook works.
        self.endpoint = os.environ.get("HF_ENDPOINT") or None
        self.revision = revision
        config_file = self._required("config.json")
        self.commit: str = config_file.parent.name  # hf_hub_download answers .../snapshots/<commit>/config.json
        self.revision = self.commit
        self.uid = f"{repo}@{self.commit}"
        self.config = read_config(config_file, repo)
        index = self._download(INDEX_FILE)
        self._headers: dict[str, _Header] = {}
        if index is not None:
            self.weight_map = read_index(index, repo)
        else:
            self.weight_map = dict.fromkeys(self._header(SINGLE_FILE).entries, SINGLE_FILE)

    # -- what a Checkpoint offers ----------------------------------------------------------------------------------

    def file(self, name: str) -> Path | None:
        return self._download(name)

    def tensor_bytes(self, tensors: Iterable[str]) -> int:
        return sum(self._header(self.weight_map[name]).entries[name].nbytes for name in tensors)

    def fetch(self, tensors: Iterable[str]) -> dict[Path, list[str]]:
        return {self._file_with(file, names): names for file, names in by_file(self.weight_map, tensors).items()}

    # -- whole files -----------------------------------------------------------------------------------------------

    def _required(self, name: str) -> Path:
        path = self._download(name)
        if path is None:
            raise CheckpointError(f"{self.repo} has no {name}: it is not a whole model.", model=self.repo)
        return path

    def _download(self, name: str) -> Path | None:
        """Path of a file of the repository in huggingface_hub's cache, or None when it has no such file."""
        try:
            return Path(
                hf_hub_download(
                    self.repo,
                    name,
                    revision=self.revision,
                    token=self.token,
                    cache_dir=self.cache_dir,
                    endpoint=self.endpoint,
                    library_name="nbrunner",
                )
            )
        except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
            # A subclass of EntryNotFoundError that means the opposite: nobody could be asked.
            if self._cached("config.json") is not None and not self._indispensable(name):
                return None
            raise self._error(error) from error
        except EntryNotFoundError:
            return None
        except (HFValidationError, HfHubHTTPError, HTTPError, OSError) as error:
            raise self._error(error) from error

    def _indispensable(self, name: str) -> bool:
        """Whether a file is one without which the model cannot be used, so that not knowing is an error."""
        return name in (SINGLE_FILE, "config.json") or (
            name == INDEX_FILE and self._cached(SINGLE_FILE) is None and not self._partial(SINGLE_FILE).exists()
        )

    def _cached(self, name: str) -> Path | None:
        found = try_to_load_from_cache(self.repo, name, cache_dir=self.cache_dir, revision=self.revision)
        return Path(found) if isinstance(found, str) else None

    def _error(self, error: BaseException) -> CheckpointError:
        at = f" at revision {self.revision}" if self.revision else ""
        if isinstance(error, GatedRepoError):
            text = f"{self.repo} is gated: accept its terms on the hub, then pass token=... or run 'hf auth login'."
        elif isinstance(error, RevisionNotFoundError):
            text = f"{self.repo} has no revision {self.revision}: give a branch, tag or commit that exists."
        elif isinstance(error, RepositoryNotFoundError):
            text = (
                f"there is neither a directory nor a hub repository {self.repo}, or it is private: check the name, "
                "or pass token=... or run 'hf auth login'."
            )
        elif isinstance(error, HFValidationError):
            text = f"{self.repo!r} is neither a directory nor a valid repository id: give owner/repository."
        elif isinstance(error, (LocalEntryNotFoundError, OfflineModeIsEnabled)):
            text = (
                f"{self.repo}{at} is not in the local cache and the hub cannot be reached: connect, unset "
                "HF_HUB_OFFLINE, or use a directory."
            )
        else:
            text = f"{self.repo}{at} could not be fetched ({_first_line(error)}): try again, or use a directory."
        return CheckpointError(text, model=self.repo)

    # -- parts of files --------------------------------------------------------------------------------------------

    @cached_property
    def _partial_dir(self) -> Path:
        assets = None if self.cache_dir is None else str(Path(self.cache_dir) / "assets")
        return Path(cached_assets_path("nbrunner", namespace=self.repo, subfolder=self.commit, assets_dir=assets))

    def _partial(self, file: str) -> Path:
        return self._partial_dir / file

    def _file_with(self, file: str, tensors: list[str]) -> Path:
        """A file that reads as this shard as far as these tensors go."""
        whole = self._cached(file)
        if whole is not None:
            return whole
        header = self._header(file)
        for name in tensors:
            if name not in header.entries:
                raise CheckpointError(
                    f"{file} of {self.repo} lacks {name}, which its index says it holds.", model=self.repo
                )
        path = self._partial(file)
        with WeakFileLock(f"{path}.lock"):
            present = _present(path)
            needed = [header.entries[name] for name in tensors if name not in present]
            if not needed:
                return path
            if not present and sum(entry.nbytes for entry in needed) >= _WHOLE_FILE_SHARE * header.size:
                return self._required(file)
            try:
                self._fetch_ranges(file, header, needed)
            except RangeIgnoredError:
                return self._required(file)
            _write_whole(_notes(path), json.dumps({"tensors": sorted({*present, *tensors})}).encode())
        return path

    def _fetch_ranges(self, file: str, header: _Header, needed: list[TensorEntry]) -> None:
        path = self._partial(file)
        with path.open("r+b" if path.exists() else "w+b") as opened:
            opened.truncate(header.size)
            opened.write(header.raw)
            for start, end in coalesce([(entry.start, entry.end) for entry in needed]):
                opened.seek(start)
                self._get(file, start, end, opened)
            opened.flush()
            os.fsync(opened.fileno())

    def _header(self, file: str) -> _Header:
        known = self._headers.get(file)
        if known is None:
            known = self._headers[file] = self._read_header(file)
        return known

    def _read_header(self, file: str) -> _Header:
        where = f"{file} of {self.repo}"
        local = self._cached(file) or (self._partial(file) if _present(self._partial(file)) else None)
        if local is not None:
            with local.open("rb") as opened:
                first = opened.read(8)
                raw = first + opened.read(header_length(first, where))
            size = local.stat().st_size
        else:
            raw, size = self._get_header(file, where)
        return _Header(parse_header(raw[8:], size, where), size, raw)

    def _get_header(self, file: str, where: str) -> tuple[bytes, int]:
        try:
            raw, size = self._get_bytes(file, 0, _FIRST_READ)
            length = 8 + header_length(raw, where)
            if length > len(raw):
                raw += self._get_bytes(file, len(raw), length)[0]
            return raw[:length], size
        except RangeIgnoredError:
            whole = self._required(file)
            with whole.open("rb") as opened:
                first = opened.read(8)
                return first + opened.read(header_length(first, where)), whole.stat().st_size
        except EntryNotFoundError as error:
            if file != SINGLE_FILE:
                raise CheckpointError(
                    f"{self.repo} lacks {file}, which its index names: it was not uploaded whole.", model=self.repo
                ) from error
            pickled = self._download("pytorch_model.bin.index.json") is not None or self._exists(
                "pytorch_model.bin"
            )
            raise no_safetensors(self.repo, pickled=pickled) from error

    def _exists(self, file: str) -> bool:
        try:
            self._get_bytes(file, 0, 1)
        except (EntryNotFoundError, RangeIgnoredError) as error:
            return isinstance(error, RangeIgnoredError)
        return True

    def _get_bytes(self, file: str, start: int, end: int) -> tuple[bytes, int]:
        """Bytes ``[start, end)`` of a file, fewer where it ends before, and the size of the whole file."""
        pieces = list(self._stream(file, start, end))
        return b"".join(chunk for _, chunk in pieces), pieces[0][0] if pieces else 0

    def _get(self, file: str, start: int, end: int, into: BinaryIO) -> None:
        """Write bytes ``[start, end)`` of a file, continuing where a broken connection stopped."""
        problem: BaseException | None = None
        for _ in range(_ATTEMPTS):
            try:
                for _, chunk in self._stream(file, start, end):
                    into.write(chunk)
                    start += len(chunk)
            except HfHubHTTPError as error:
                raise self._error(error) from error
            except HTTPError as error:
                problem = error
            if start == end:
                return
        raise CheckpointError(
            f"{file} of {self.repo} could not be fetched whole ({_first_line(problem)}): try again.",
            model=self.repo,
        ) from problem

    def _stream(self, file: str, start: int, end: int) -> Iterator[tuple[int, bytes]]:
        """Pieces of bytes ``[start, end)`` of a file, each with the size of the whole file."""
        url = hf_hub_url(self.repo, file, revision=self.revision, endpoint=self.endpoint)
        headers = build_hf_headers(token=self.token, library_name="nbrunner")
        headers |= {"Range": f"bytes={start}-{end - 1}", "Accept-Encoding": "identity"}
        try:
            with http_stream_backoff("GET", url, headers=headers, max_retries=2, follow_redirects=True) as response:
                hf_raise_for_status(response)
                if response.status_code != 206:
                    raise RangeIgnoredError
                answered, _, total = response.headers["Content-Range"].removeprefix("bytes ").partition("/")
                if int(answered.partition("-")[0]) != start:
                    raise CheckpointError(f"the hub sent other bytes of {file} than asked for.", model=self.repo)
                left = end - start
                for chunk in response.iter_bytes(2**20):
                    yield int(total), chunk[:left]
                    left -= min(left, len(chunk))
        except (GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError, OfflineModeIsEnabled) as error:
            raise self._error(error) from error


class RangeIgnoredError(Exception):
    """The hub, or a mirror before it, answers range requests with the whole file."""


def coalesce(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Fewest requests for these half-open byte ranges, gaps of up to 64 KiB read along."""
    joined: list[tuple[int, int]] = []
    for start, end in sorted(ranges):
        if joined and start - joined[-1][1] <= _BRIDGED_GAP:
            joined[-1] = (joined[-1][0], max(joined[-1][1], end))
        elif end > start:
            joined.append((start, end))
    return joined


def _notes(path: Path) -> Path:
    return path.with_name(path.name + ".tensors.json")


def _present(path: Path) -> set[str]:
    """Names of the tensors that a sparse file really holds."""
    try:
        return set(json.loads(_notes(path).read_text())["tensors"]) if path.exists() else set()
    except (OSError, ValueError, KeyError):
        return set()


def _write_whole(path: Path, data: bytes) -> None:
    beside = path.with_name(path.name + ".new")
    beside.write_bytes(data)
    beside.replace(path)


def _first_line(error: BaseException | None) -> str:
    text = str(error).strip().splitlines() if error is not None else []
    return text[0][:200] if text else type(error).__name__
