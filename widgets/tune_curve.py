"""The curves of a training run as one SVG: loss, evaluation, learning rate, and marks where something was done."""

from __future__ import annotations

import math
from collections.abc import Sequence

from nbrunner.client.svg import label, picture, words
from nbrunner.tuning.history import History, Mark

Curve = Sequence[tuple[int, float]]

_POINTS = 240
"""Of a line, at most: more cannot be seen, and a picture is sent again each second."""
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 14, 46, 34
_STRIP, _GAP = 34, 26
"""Heights of the learning rate's own plot, and of the room above it."""
_SIGNS = {"lr": "▼ lr", "error": "✖", "resumed": "▶"}
_APART = 36
"""Marks that are nearer to each other share a sign."""


def curve_svg(history: History, *, steps: int, title: str, narrow: bool = False) -> str:
    """The picture. ``steps``: how many there will be."""
    width, plot = (420, 170) if narrow else (760, 210)
    height = _TOP + plot + _GAP + _STRIP + _BOTTOM
    raw, smoothed, evaluated = (history.curve(name) for name in ("loss", "smoothed", "eval_loss"))
    done = max(step for step, _ in [*raw, *evaluated, (1, 0.0)])
    # as far as the run has come and somewhat on: the first steps of a long one are to be seen too
    right = max(done, min(steps, max(20, done + done // 4)))
    across = _Scale(0, right, _LEFT, width - _RIGHT)
    losses = [value for _, value in [*raw, *evaluated]]
    up = _Scale(*_range(losses), _TOP + plot, _TOP)
    parts = [_legend(narrow, bool(evaluated)), *_grid(up, width), *_steps_axis(across, _TOP + plot, height)]
    parts.append(_marks(history, across, plot, height))
    parts.append(_line(thinned(raw), across, up, "nbp-good-line", 1, opacity=0.45))
    parts.append(_line(thinned(smoothed), across, up, "nbp-good-line", 2.5))
    parts.append(_line(evaluated, across, up, "nbp-route-line", 1.5, dash="6 3"))
    parts += [
        _diamond(across(step), up(value), f"step {step}: evaluation {value:.4g}") for step, value in evaluated
    ]
    parts += _rates(history.curve("lr"), across, _TOP + plot + _GAP, width)
    if not losses:
        parts.append(words(width / 2, _TOP + plot / 2, "no step yet", kind="soft-fill", anchor="middle"))
    return picture(width, height, parts, title=title, description=described(history))


def described(history: History) -> str:
    """The curves in a sentence."""
    smoothed, evaluated = history.curve("smoothed"), history.curve("eval_loss")
    if not smoothed:
        return "No step yet."
    (first, began), (last, ended) = smoothed[0], smoothed[-1]
    told = f"Loss, smoothed: {began:.3g} at step {first}, {ended:.3g} at step {last}."
    if evaluated:
        told += f" Evaluation: {evaluated[0][1]:.3g} at step {evaluated[0][0]}, {evaluated[-1][1]:.3g} at the end."
    return " ".join([told, *(f"Step {mark.step}: {mark.text}." for mark in history.marks)])


def thinned(curve: Curve, points: int = _POINTS) -> Curve:
    """At most so many points: of each stretch the lowest and the highest, so that no peak is lost."""
    if len(curve) <= points:
        return curve
    size = math.ceil(len(curve) / (points // 2))
    found: list[tuple[int, float]] = []
    for at in range(0, len(curve), size):
        stretch = curve[at : at + size]
        ends = {min(stretch, key=lambda one: one[1]), max(stretch, key=lambda one: one[1])}
        found += sorted(ends)
    return found


class _Scale:
    """A value to a place."""

    def __init__(self, low: float, high: float, begin: float, end: float) -> None:
        self.low, self.high = low, high if high > low else low + 1
        self.begin, self.end = begin, end

    def __call__(self, value: float) -> float:
        return self.begin + (value - self.low) / (self.high - self.low) * (self.end - self.begin)

    @property
    def ticks(self) -> list[float]:
        """Four or so round values inside."""
        rough = (self.high - self.low) / 4
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(power * one for one in (1, 2, 2.5, 5, 10) if power * one >= rough)
        first = math.ceil(self.low / step - 1e-9)
        return [number * step for number in range(first, math.floor(self.high / step + 1e-9) + 1)]


def _range(values: Sequence[float]) -> tuple[float, float]:
    if not values:
        return 0.0, 1.0
    low, high = min(values), max(values)
    # from 0 where that costs little room: how far a loss still is from nothing is worth seeing
    low = 0.0 if low < high * 0.6 and low >= 0 else low
    margin = (high - low) * 0.05 or abs(high) * 0.1 or 1.0
    return (low if low == 0 else low - margin), high + margin


def _line(
    curve: Curve, across: _Scale, up: _Scale, kind: str, width: float, *, dash: str = "", opacity: float = 1
) -> str:
    if not curve:
        return ""
    if len(curve) == 1:
        (step, value) = curve[0]
        return f"<circle cx='{across(step):.1f}' cy='{up(value):.1f}' r='2.5' class='{kind}'/>"
    points = " ".join(f"{across(step):.1f},{up(value):.1f}" for step, value in curve)
    return (
        f"<polyline points='{points}' class='{kind}' stroke-width='{width}' stroke-linejoin='round' "
        f"opacity='{opacity}'{f' stroke-dasharray={dash!r}' if dash else ''}/>"
    )


def _diamond(x: float, y: float, told: str) -> str:
    points = f"{x - 4:.1f},{y:.1f} {x:.1f},{y - 4:.1f} {x + 4:.1f},{y:.1f} {x:.1f},{y + 4:.1f}"
    return f"<polygon points='{points}' class='nbp-route-fill'><title>{label(told)}</title></polygon>"


def _grid(up: _Scale, width: int) -> list[str]:
    parts = []
    for value in up.ticks:
        y = up(value)
        parts.append(f"<line x1='{_LEFT}' x2='{width - _RIGHT}' y1='{y:.1f}' y2='{y:.1f}' class='nbp-line-line'/>")
        parts.append(words(_LEFT - 6, y + 4, f"{value:.3g}", kind="small soft-fill", anchor="end"))
    return parts


def _steps_axis(across: _Scale, bottom: float, height: float) -> list[str]:
    y = height - _BOTTOM + 16
    ticks = [one for one in across.ticks if one == int(one)]
    parts = [words(across(one), y, f"{one:.0f}", kind="small soft-fill", anchor="middle") for one in ticks]
    parts.append(
        words((across.begin + across.end) / 2, height - 5, "step", kind="small soft-fill", anchor="middle")
    )
    return parts


def _legend(narrow: bool, evaluated: bool) -> str:
    entries = [("loss", "nbp-good-line", 1.0, ""), ("smoothed", "nbp-good-line", 2.5, "")]
    if evaluated:
        entries.append(("evaluation", "nbp-route-line", 1.5, "6 3"))
    parts, x = [], float(_LEFT)
    for name, kind, width, dash in entries:
        parts.append(
            f"<line x1='{x}' x2='{x + 22}' y1='16' y2='16' class='{kind}' stroke-width='{width}'"
            f"{f' stroke-dasharray={dash!r}' if dash else ''}/>"
        )
        parts.append(words(x + 28, 20, name, kind="small"))
        x += 100 if not narrow else 96
    return "".join(parts)


def _marks(history: History, across: _Scale, plot: float, height: float) -> str:
    """A dashed line through both plots, and a sign above it; what it was is said when it is pointed at."""
    groups: list[list[Mark]] = []
    for mark in sorted((one for one in history.marks if one.kind in _SIGNS), key=lambda one: one.step):
        if groups and across(mark.step) - across(groups[-1][0].step) < _APART:
            groups[-1].append(mark)  # their signs would stand on each other
        else:
            groups.append([mark])
    parts = []
    for group in groups:
        kinds = dict.fromkeys(mark.kind for mark in group)
        kind = "bad" if "error" in kinds else "soft"
        told = "; ".join(f"step {mark.step}: {mark.text}" for mark in group)
        lines = "".join(
            f"<line x1='{x:.1f}' x2='{x:.1f}' y1='{_TOP - 4}' y2='{height - _BOTTOM}' class='nbp-{kind}-line' "
            "stroke-dasharray='3 3'/>"
            for x in dict.fromkeys(across(mark.step) for mark in group)
        )
        sign = words(
            across(group[0].step),
            _TOP - 6,
            " ".join(_SIGNS[one] for one in kinds),
            kind=f"small {kind}-fill",
            anchor="middle",
        )
        parts.append(f"<g><title>{label(told)}</title>{lines}{sign}</g>")
    return "".join(parts)


def _rates(rates: Curve, across: _Scale, top: float, width: int) -> list[str]:
    highest = max((value for _, value in rates), default=0.0)
    up = _Scale(0.0, highest or 1.0, top + _STRIP, top)
    parts = [
        f"<line x1='{_LEFT}' x2='{width - _RIGHT}' y1='{top + _STRIP}' y2='{top + _STRIP}' class='nbp-line-line'/>",
        words(_LEFT, top - 6, "learning rate", kind="small"),
    ]
    if rates:
        parts.append(
            words(_LEFT - 6, top + 6, f"{highest:.1e}".replace("e-0", "e-"), kind="small soft-fill", anchor="end")
        )
    parts.append(_line(thinned(rates), across, up, "nbp-soft-line", 1.5))
    return parts
