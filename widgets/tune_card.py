"""A training run as a card: its curves, its state, where the time goes, its answers, its table.

Like every card it is plain at every moment: a picture and text, so that a notebook saved at any time can be read.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from nbrunner.hosting_status import duration
from nbrunner.protocol.identity import short_peer
from nbrunner.tuning.history import History
from nbrunner.tuning.samples import Answers
from nbrunner.widgets.host_card import amount
from nbrunner.widgets.page import page, plain_table, state, table, text
from nbrunner.widgets.tune_curve import curve_svg

if TYPE_CHECKING:
    from nbrunner.tuning.progress import Progress
    from nbrunner.tuning.run import TrainingRun

_SIGNS = {
    "starting": "◐ starting",
    "running": "▶ running",
    "pausing": "◐ pausing after this step",
    "paused": "❚❚ paused",
    "stopping": "◐ stopping after this step",
    "stopped": "■ stopped",
    "done": "✔ done",
    "failed": "✖ failed",
}
_COLUMNS = ("step", "epoch", "loss", "smoothed", "evaluation", "learning rate", "tok/s")
_ROWS = 14
"""Of the table, at most; all of them are in ``run.history``."""


@dataclass(frozen=True)
class TuneCard:
    """A run at one moment: displays as a card, prints as text.

    Attributes
    ----------
    names
        PeerID → what to call that server.
    learned
        How many numbers learn.
    """

    title: str
    progress: Progress
    history: History
    answers: Sequence[Answers] = ()
    prompts: Sequence[str] = ()
    names: Mapping[str, str] = field(default_factory=dict)
    learned: int = 0
    folder: str = ""

    def __repr__(self) -> str:
        facts = [f"{name}: {value}" for name, value in self._facts()]
        rows = self._rows()
        shown = [plain_table(_COLUMNS, rows)] if rows else []
        samples = [
            f"{prompt!r}: " + " → ".join(f"{name}: {told!r}" for name, told in self._told(index))
            for index, prompt in enumerate(self.prompts)
        ]
        return "\n".join(one for one in [self.title, self._state(), *facts, *samples, *shown] if one)

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> dict[str, str]:
        return {"text/html": self.html(), "text/plain": repr(self)}

    def html(self) -> str:
        """Everything in one piece, as a page of its own."""
        return page(self.picture_html(), self._body(), self.samples_html(), self.table_html())

    # -- its parts -----------------------------------------------------------------------------------------------

    def svg(self, *, narrow: bool = False) -> str:
        """The curves."""
        return curve_svg(self.history, steps=self.progress.steps, title=self.title, narrow=narrow)

    def picture_html(self) -> str:
        """The curves for a page that may be narrow."""
        return (
            f"<div class='nbr-tune-picture'><div class='nbr-wide'>{self.svg()}</div>"
            f"<div class='nbr-narrow'>{self.svg(narrow=True)}</div></div>"
        )

    def body_html(self) -> str:
        """State, facts, where the time goes, who takes part."""
        return page(self._body())

    def _body(self) -> str:
        facts = "".join(
            f"<div class='nbr-fact'><dt>{text(name)}</dt><dd>{text(value)}</dd></div>"
            for name, value in self._facts()
        )
        error = f"<ul class='nbr-alert'><li>{text(self.progress.error)}</li></ul>" if self.progress.error else ""
        return "".join(
            [
                f"<section class='nbr-host nbr-tune nbr-tune-{text(self.progress.state)}' "
                f"aria-label='{text(self.title)}'>",
                f"<div><strong>{text(self.title)}</strong></div>",
                f"<div class='nbr-host-state' role='status'>{text(self._state())}</div>",
                f"<progress max='{max(self.progress.steps, 1)}' value='{self.progress.step}' "
                f"aria-label='steps done'>{self.progress.step} of {self.progress.steps}</progress>",
                f"<dl>{facts}</dl>",
                error,
                self._time_html(),
                self._participants_html(),
                "</section>",
            ]
        )

    def samples_html(self) -> str:
        """The same prompts before, during and after, side by side."""
        if not self.prompts or not self.answers:
            return ""
        columns = [name for name, _ in self._told(0)]
        rows = [
            [text(prompt), *(text(told) for _, told in self._told(index))]
            for index, prompt in enumerate(self.prompts)
        ]
        wrap = range(1, len(columns) + 1)
        return table("Answers", ("prompt", *columns), rows, wrap=tuple(wrap))

    def table_html(self) -> str:
        """Some of the steps."""
        rows = self._rows()
        if not rows:
            return ""
        escaped = [[text(cell) for cell in row] for row in rows]
        return table(
            f"Steps ({len(rows)} of {self.progress.step})", _COLUMNS, escaped, numbers=range(1, len(_COLUMNS))
        )

    # -- words ---------------------------------------------------------------------------------------------------

    def _state(self) -> str:
        progress = self.progress
        line = _SIGNS.get(progress.state, progress.state)
        if progress.state == "running" and progress.left is not None:
            line += f", {duration(progress.left)} left"
        return line

    def _facts(self) -> list[tuple[str, str]]:
        progress, last = self.progress, self.history.last
        facts = [("step", f"{progress.step} of {progress.steps}, epoch {progress.epoch:.2f}")]
        if last is not None and last.loss is not None and last.smoothed is not None:
            facts.append(("loss", f"{last.loss:.4g}, smoothed {last.smoothed:.4g}"))
        evaluated = self.history.curve("eval_loss")
        if evaluated:
            accuracy = self.history.curve("eval_accuracy")
            right = f", {accuracy[-1][1]:.0%} right" if accuracy else ""
            facts.append(("evaluation", f"{evaluated[-1][1]:.4g}{right} (at first {evaluated[0][1]:.4g})"))
        facts.append(("learning rate", f"{progress.lr:.3g}"))
        costs = progress.costs
        if costs.steps:
            facts.append(
                ("speed", f"{costs.tokens_per_second:,.0f} tokens/s, {costs.seconds / costs.steps:.2f} s a step")
            )
            if costs.sent:
                facts.append(
                    (
                        "on the wire",
                        f"{_small(costs.sent / costs.steps)} out, {_small(costs.received / costs.steps)} in a step",
                    )
                )
        facts.append(("memory here", amount(progress.memory) if progress.memory else "unknown"))
        facts.append(("learned", f"{self.learned:,} numbers"))
        facts.append(("checkpoint", progress.checkpoint or "none yet"))
        if self.folder:
            facts.append(("folder", self.folder))
        if progress.note:
            facts.append(("note", progress.note))
        return facts

    def _time_html(self) -> str:
        costs = self.progress.costs
        if not costs.steps or not costs.seconds:
            return ""
        shares = [("this process", costs.client), ("on the way", costs.wire)]
        shares += [
            (self.names.get(peer, short_peer(peer)), seconds) for peer, seconds in sorted(costs.servers.items())
        ]
        rows = [
            [
                text(name),
                "<span class='nbr-bar' aria-hidden='true'>"
                f"<i style='left:0;width:{100 * seconds / costs.seconds:.1f}%'></i></span>"
                f"{seconds / costs.seconds:.0%}",
                text(f"{1e3 * seconds / costs.steps:.0f} ms"),
            ]
            for name, seconds in shares
            if seconds or name != "on the way"
        ]
        return table("Where the time of a step goes", ("who", "share", "a step"), rows, numbers=(2,))

    def _participants_html(self) -> str:
        given = self.progress.participants
        if not given:
            return ""
        rows = [
            [
                text(one.name),
                text(state(one.state)),
                text(f"{one.steps:,}"),
                text(f"{one.samples:,}"),
                text(one.note),
            ]
            for one in given
        ]
        return table("Who takes part", ("name", "state", "steps", "rows", ""), rows, numbers=(2, 3), wrap=(4,))

    def _told(self, index: int) -> list[tuple[str, str]]:
        """Before, the last one in between, and after: what one prompt was answered with."""
        chosen = {one.when: one for one in self.answers}
        if "after" in chosen and "before" in chosen and chosen.get("during") is not None:
            halves = [one for one in self.answers if one.when == "during"]
            chosen["during"] = halves[len(halves) // 2]
        names = {"before": "before", "during": "step {}", "after": "after"}
        return [
            (names[when].format(one.step), one.texts[index].strip() if index < len(one.texts) else f"✖ {one.error}")
            for when in ("before", "during", "after")
            if (one := chosen.get(when)) is not None
        ]

    def _rows(self) -> list[list[str]]:
        rows = self.history.rows
        if len(rows) > _ROWS:
            chosen = {round(index * (len(rows) - 1) / (_ROWS - 1)) for index in range(_ROWS)}
            rows = [rows[index] for index in sorted(chosen)]

        def shown(value: float | None, form: str = ".4g") -> str:
            return "–" if value is None else format(value, form)

        return [
            [
                str(row.step),
                f"{row.epoch:.2f}",
                shown(row.loss),
                shown(row.smoothed),
                shown(row.eval_loss),
                shown(row.lr, ".3g"),
                shown(row.tokens_per_second, ",.0f"),
            ]
            for row in rows
        ]


def card_of(run: TrainingRun) -> TuneCard:
    """A run as it is now."""
    progress = run.progress
    kind = (
        f"{run.settings.method}, rank {run.settings.lora_rank}" if run.settings.lora_rank else run.settings.method
    )
    return TuneCard(
        title=f"Fine-tuning {run.model_name} ({kind})",
        progress=progress,
        history=run.history,
        answers=tuple(run.answers),
        prompts=run.settings.samples,
        names=run.server_names,
        learned=run.taught.size,
        folder=_near(run.folder.path),
    )


def _near(path: Path) -> str:
    """A folder as seen from here; only its name where it is elsewhere."""
    here = Path.cwd().resolve()
    return os.path.relpath(path, here) if path.is_relative_to(here) else f"…/{path.name}"


def _small(size: float) -> str:
    return amount(size) if size >= 1e6 else f"{size / 1e3:.0f} kB"
