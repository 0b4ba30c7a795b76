"""Where a text comes from, written down so that it can be checked and done again."""

from __future__ import annotations

import functools
import importlib.metadata
import platform
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from nbrunner.client.reroute import Reroute
from nbrunner.client.result import Chain, Timings, iso_time

if TYPE_CHECKING:
    from nbrunner.client.connection import SwarmConnection

_PACKAGES = ("nbrunner", "torch", "transformers", "hivemind")


def model_facts(model: Any) -> dict[str, Any]:
    """What a receipt says about the model. Of a directory only its name: receipts are shown to others."""
    uid = str(getattr(getattr(model, "runner", None), "model", ""))
    return {
        "name": uid.partition("@")[0] or str(model.config._name_or_path),
        "uid": uid,
        "revision": getattr(model.config, "_commit_hash", None),
        "type": str(model.config.model_type),
        "dtype": str(model.dtype).removeprefix("torch."),
        "wire": "int8" if _travels_in_8bit(model) else "exact",
    }


def _travels_in_8bit(model: Any) -> bool:
    options = getattr(getattr(model, "runner", None), "options", None)
    return bool(getattr(options, "in_8bit", False))


def make_receipt(
    model: Mapping[str, Any],
    connection: SwarmConnection | None,
    *,
    sampling: Mapping[str, Any],
    chain: Chain,
    earlier_chains: Sequence[Chain],
    prompt_tokens: int,
    tokens: int,
    finish: str,
    timings: Timings,
    reroutes: Sequence[Reroute] = (),
) -> dict[str, Any]:
    """The receipt of one generation, ready for JSON; times in seconds, dates in UTC.

    Parameters
    ----------
    model
        From `model_facts`.
    connection
        Whose directory knows the dtypes of the hops; None for a model in this process.
    """
    return {
        "model": dict(model),
        "chain": [_hop(connection, *hop) for hop in chain],
        "earlier_chains": [[list(hop) for hop in earlier] for earlier in earlier_chains],
        "reroutes": [
            {
                "peer": one.peer,
                "blocks": [one.start, one.end],
                "why": one.why,
                "replaced_by": [list(hop) for hop in one.replaced_by],
                "after_token": one.token,
            }
            for one in reroutes
        ],
        "sampling": dict(sampling),
        "prompt_tokens": prompt_tokens,
        "tokens": tokens,
        "finish": finish,
        "timings": {
            "started": iso_time(timings.started),
            "first_token": timings.first_token,
            "total": timings.total,
            "tokens_per_second": timings.tokens_per_second,
            "longest_gap": timings.longest_gap,
        },
        "versions": _versions(),
    }


def _hop(connection: SwarmConnection | None, peer: str, start: int, end: int) -> dict[str, Any]:
    facts: dict[str, Any] = {"peer": peer, "start": start, "end": end}
    entry = connection.directory.view.servers.get(peer) if connection is not None else None
    if entry is not None:
        record = entry.record
        facts.update(dtype=record.dtype, quantization=record.quantization, version=record.version)
    return facts


@functools.cache
def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
