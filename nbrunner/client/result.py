"""What a generation leaves behind: text, tokens, how sure the model was, how long it took, who computed it."""

from __future__ import annotations

import datetime
import html
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from nbrunner.client.reroute import Reroute
from nbrunner.client.step_times import TokenTime, costs_most, typical
from nbrunner.client.waterfall import Waterfall
from nbrunner.errors import UserInputError
from nbrunner.protocol.identity import short_peer

Finish = Literal["length", "stop", "context", "cancelled", "interrupted", "failed"]
"""Why it ended: as many tokens as asked for, the model's own end, no room left, stopped by someone, an error."""

Chain = tuple[tuple[str, int, int], ...]
"""(PeerID, start, end) of every hop, in order."""

_FINISH_WORDS: Mapping[str, str] = {
    "length": "as many tokens as asked for",
    "stop": "the model ended its text",
    "context": "no room left in the model's context",
    "cancelled": "stopped",
    "interrupted": "interrupted",
    "failed": "failed",
}


@dataclass(frozen=True, slots=True)
class Token:
    """One generated token.

    Attributes
    ----------
    id
        In the tokenizer's vocabulary.
    text
        The text it completed; empty for special tokens and for parts of a character.
    logprob
        Natural logarithm of the probability the model itself gave it, before temperature, top-p and top-k.
    seconds
        From the request to this token.
    """

    id: int
    text: str
    logprob: float
    seconds: float

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds, from the moment the request was made.

    Attributes
    ----------
    started
        When that was, unix seconds.
    first_token
        Until the first token; None if there was none.
    total
        Until the end.
    tokens_per_second
        After the first token; None for fewer than two tokens.
    longest_gap
        The longest wait between two tokens: what a lost server costs is seen here.
    """

    started: float
    first_token: float | None
    total: float
    tokens_per_second: float | None
    longest_gap: float

    @classmethod
    def of(cls, tokens: Sequence[Token], *, started: float, total: float) -> Timings:
        times = [token.seconds for token in tokens]
        gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
        speed = len(gaps) / sum(gaps) if gaps and sum(gaps) > 0 else None
        return cls(started, times[0] if times else None, total, speed, max(gaps, default=0.0))


@dataclass(frozen=True)
class Generation:
    """A finished (or stopped) generation.

    Attributes
    ----------
    prompt, text
        What went in and what came out.
    tokens
        The generated tokens, special ones included.
    prompt_tokens
        How many tokens the prompt has.
    finish
        Why it ended.
    timings
        See `Timings`.
    chain
        Who computed the last token; empty for a model that runs in this process.
    earlier_chains
        The chains before it, when servers were lost or changed on the way.
    reroutes
        Who failed on the way, and who took over.
    times
        Where the time of each token went; empty without servers, and for beam search.
    rounds
        Trips through the chain, when tokens were guessed and checked several at once; 0 without.
    receipt
        All that is needed to say where this text comes from, ready for JSON: model and revision, chain, dtypes and
        quantisation, versions, seed and sampling, timings.
    """

    prompt: str
    text: str
    tokens: tuple[Token, ...]
    prompt_tokens: int
    finish: Finish
    timings: Timings
    chain: Chain = ()
    earlier_chains: tuple[Chain, ...] = ()
    reroutes: tuple[Reroute, ...] = ()
    times: tuple[TokenTime, ...] = field(default=(), repr=False)
    rounds: int = 0
    receipt: Mapping[str, Any] = field(default_factory=dict)

    @property
    def ids(self) -> list[int]:
        """The ids of the generated tokens."""
        return [token.id for token in self.tokens]

    @property
    def logprobs(self) -> list[float]:
        """Natural logarithms of the tokens' probabilities; see `Token.logprob`."""
        return [token.logprob for token in self.tokens]

    def waterfall(self, token: int | None = None) -> Waterfall:
        """Where the time of one token went, as a picture: this process, each way, each server's queue and compute.

        Parameters
        ----------
        token
            Its number, from 0; negative counts from the end. None takes a typical one: of median time among those
            after the first.

        Raises
        ------
        UserInputError
            No such token, or nothing was measured: a model in this process, or beam search.
        """
        if not self.times:
            raise UserInputError("there is no waterfall: no server was asked, or beams were searched together.")
        if token is None:
            chosen = typical(self.times)
        else:
            index = token + len(self.tokens) if token < 0 else token
            chosen = next((one for one in self.times if one.index == index), None)
        if chosen is None:
            raise UserInputError(f"there is no time of token {token}; give 0 to {self.times[-1].index}.")
        return Waterfall(chosen, self.tokens[chosen.index].text)

    def costs_most(self) -> str:
        """One sentence: what costs most of a typical token, and what would help; empty without servers."""
        chosen = typical(self.times)
        return costs_most(chosen) if chosen is not None else ""

    def summary(self) -> str:
        """One line: tokens per second, time to the first token, the chain by blocks."""
        parts = []
        if self.timings.tokens_per_second is not None:
            parts.append(f"{_number(self.timings.tokens_per_second)} tok/s")
        if self.timings.first_token is not None:
            parts.append(f"first token {self.timings.first_token:.2f} s")
        if not parts:
            parts.append(f"{len(self.tokens)} tokens in {self.timings.total:.2f} s")
        if 0 < self.rounds < len(self.tokens):
            parts.append(f"{len(self.tokens) / self.rounds:.1f} tokens a round trip")
        model = self.receipt.get("model")
        if isinstance(model, Mapping) and model.get("wire") == "int8":
            parts.append("8 bits on the wire")
        if self.chain or self.tokens:
            parts.append(chain_text(self.chain))
        changes = len(self.earlier_chains)
        if changes:
            parts.append(f"chain changed {'once' if changes == 1 else f'{changes} times'} on the way")
        if self.finish not in ("length", "stop"):
            parts.append(f"{_FINISH_WORDS[self.finish]} after {len(self.tokens)} tokens")
        return " · ".join(parts)

    def __str__(self) -> str:
        return self.text

    def __repr__(self) -> str:
        shown = self.text if len(self.text) <= 60 else self.text[:57] + "…"
        return f"<Generation {shown!r} · {len(self.tokens)} tokens · {self.summary()}>"

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><th scope='row'>{index}</th><td><code>{html.escape(repr(token.text))}</code></td>"
            f"<td>{token.id}</td><td>{token.logprob:.3f}</td><td>{token.seconds:.3f}</td></tr>"
            for index, token in enumerate(self.tokens)
        )
        receipt = html.escape(json.dumps(self.receipt, indent=2, ensure_ascii=False, default=str))
        return (
            f"<div style='white-space:pre-wrap'><span style='opacity:.65'>{html.escape(self.prompt)}</span>"
            f"<strong>{html.escape(self.text)}</strong></div>"
            f"<div><small>{html.escape(self.summary())}</small></div>"
            f"<details><summary>{len(self.tokens)} tokens</summary><table><caption>Generated tokens</caption>"
            "<thead><tr><th scope='col'>#</th><th scope='col'>text</th><th scope='col'>id</th>"
            "<th scope='col'>log-probability</th><th scope='col'>after, s</th></tr></thead>"
            f"<tbody>{rows}</tbody></table></details>"
            f"<details><summary>receipt</summary><pre>{receipt}</pre></details>"
        )


def chain_text(chain: Sequence[tuple[str, int, int]]) -> str:
    """``…ab12cd [0, 4) → …9f3e21 [4, 8)``; what a reader needs to tell two servers apart."""
    if not chain:
        return "in this process"
    return " → ".join(f"{short_peer(peer)} [{start}, {end})" for peer, start, end in chain)


def iso_time(seconds: float) -> str:
    """Unix seconds as ISO 8601 in UTC."""
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).isoformat(timespec="milliseconds")


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 10 else f"{value:.1f}"
