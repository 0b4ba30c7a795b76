"""How many tokens to guess: a decision from what rounds have cost and how many guesses were right. Pure arithmetic.

A round of ``k`` guesses brings ``1 + a + … + a^k`` tokens if each guess is right with probability ``a`` (Leviathan
et al. 2023, equation 1) and takes ``base + k · (slope + guess)`` seconds. The window is the ``k`` that brings most
tokens a second; 0 where guesses do not pay.
"""

from __future__ import annotations

from dataclasses import dataclass, field

MOST = 16
"""Guesses of one round. Beyond it even very regular texts gain little, and one wrong guess wastes the rest."""

_FORGET = 0.9
_PRIOR_RIGHT, _PRIOR_ASKED = 0.4, 0.5
_PRIOR_SLOPE = 0.1
"""Of a round without guesses, what one more token is taken to cost until it has been measured."""


@dataclass
class Window:
    """Learns from rounds and says how many tokens to guess in the next.

    Attributes
    ----------
    fixed
        Always so many; None decides.
    rounds, tokens
        What has been learned from: rounds (the first, which reads the prompt, included), and tokens they brought.
    """

    fixed: int | None = None
    rounds: int = 0
    tokens: int = 0
    _right: float = 0.0
    _asked: float = 0.0
    _guess_seconds: float = 0.0
    _fit: _Line = field(default_factory=lambda: _Line())

    @property
    def tokens_per_round(self) -> float:
        """What one trip through the chain has brought, on the average."""
        return self.tokens / self.rounds if self.rounds else 0.0

    @property
    def acceptance(self) -> float:
        """Probability that a guess is right, as far as is known; beginning with 0.8."""
        return (self._right + _PRIOR_RIGHT) / (self._asked + _PRIOR_ASKED)

    def size(self, *, rolls_back: bool = True) -> int:
        """Guesses for the next round.

        Parameters
        ----------
        rolls_back
            Whether wrong guesses can be taken out of the caches; without it a wrong one costs the whole text, and
            only a fixed window guesses.
        """
        if self.fixed is not None:
            return self.fixed
        if not rolls_back:
            return 0
        base, slope = self._fit.base_and_slope()
        if base <= 0:
            return 0
        right, best, rate = min(self.acceptance, 0.99), 0, 1 / base
        brought = 1.0
        for count in range(1, MOST + 1):
            brought += right**count
            found = brought / (base + count * (slope + self._guess_seconds))
            if found > rate:
                best, rate = count, found
        return best

    def learn(self, *, guessed: int, accepted: int, seconds: float, first: bool = False) -> None:
        """Take in a round.

        Parameters
        ----------
        guessed, accepted
            Guesses, and how many of them were right before the first wrong one.
        seconds
            From sending to having chosen.
        first
            It read the prompt, so that its time says nothing.
        """
        self.rounds += 1
        self.tokens += accepted + 1
        if guessed:
            self._right = _FORGET * self._right + accepted
            self._asked = _FORGET * self._asked + accepted + (accepted < guessed)
        else:
            # what has been learned fades, so that guessing is tried again when the text may have changed
            self._right *= 0.98
            self._asked *= 0.98
        if not first:
            self._fit.add(guessed, seconds)

    def guessing(self, *, seconds: float) -> None:
        """Take in what one guess has cost."""
        before = self._guess_seconds or seconds
        self._guess_seconds = before + 0.3 * (seconds - before)


@dataclass
class _Line:
    """Least squares of seconds over guesses, forgetting old rounds."""

    weight: float = 0.0
    x: float = 0.0
    y: float = 0.0
    xx: float = 0.0
    xy: float = 0.0

    def add(self, x: float, y: float) -> None:
        for name, value in (("weight", 1.0), ("x", x), ("y", y), ("xx", x * x), ("xy", x * y)):
            setattr(self, name, _FORGET * getattr(self, name) + value)

    def base_and_slope(self) -> tuple[float, float]:
        """Seconds of a round without guesses, and of each guess; (0, 0) before the first."""
        if not self.weight:
            return 0.0, 0.0
        mean_x, mean_y = self.x / self.weight, self.y / self.weight
        spread = self.xx / self.weight - mean_x**2
        prior = _PRIOR_SLOPE * mean_y / (1 + _PRIOR_SLOPE * mean_x)
        slope = prior
        if spread > 0.25:
            slope = (self.xy / self.weight - mean_x * mean_y) / spread
        slope = min(max(slope, 0.0), mean_y)
        return max(mean_y - slope * mean_x, 0.1 * mean_y), slope
