"""The curves of a run as a plain plotly figure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nbrunner.tuning.run import TrainingRun

_LOSS, _EVAL, _RATE = "#0072b2", "#d55e00", "#707880"
"""Told apart by colour-blind people too (after Okabe and Ito 2008); lines and points differ as well."""
_INK = {False: ("#ffffff", "#1f2328", "#d0d7de"), True: ("#161a1f", "#e6e9ec", "#3a424c")}


def run_figure(run: TrainingRun, *, dark: bool = False) -> Any:
    """Loss raw and smoothed, evaluation, learning rate, and marks where something was done."""
    from plotly import graph_objects as go

    back, ink, line = _INK[dark]
    history, figure = run.history, go.Figure()

    def add(column: str, name: str, **look: Any) -> None:
        curve = history.curve(column)
        if curve:
            steps, values = zip(*curve, strict=True)
            figure.add_scatter(x=steps, y=values, name=name, **look)

    add("loss", "loss", mode="lines", line={"color": _LOSS, "width": 1}, opacity=0.4)
    add("smoothed", "loss, smoothed", mode="lines", line={"color": _LOSS, "width": 2.5})
    add(
        "eval_loss",
        "evaluation",
        mode="lines+markers",
        line={"color": _EVAL, "dash": "dash"},
        marker={"symbol": "diamond"},
    )
    add("lr", "learning rate", mode="lines", yaxis="y2", line={"color": _RATE, "dash": "dot", "width": 1})
    for mark in history.marks:
        if mark.kind in ("lr", "error", "resumed"):
            figure.add_vline(x=mark.step, line={"color": _RATE, "dash": "dash", "width": 1})
            figure.add_annotation(
                x=mark.step, y=1, yref="paper", text=mark.kind, hovertext=mark.text, showarrow=False
            )
    axis = {"gridcolor": line, "zerolinecolor": line, "linecolor": line}
    figure.update_layout(
        template="none",
        title={"text": f"{run.settings.method}, step {run.step} of {run.steps}"},
        paper_bgcolor=back,
        plot_bgcolor=back,
        font={"color": ink},
        xaxis={"title": {"text": "step"}, **axis},
        yaxis={"title": {"text": "loss (nats per token)" if not run.classes else "loss (nats)"}, **axis},
        yaxis2={"title": {"text": "learning rate"}, "overlaying": "y", "side": "right", "showgrid": False, **axis},
        legend={"orientation": "h", "y": -0.2},
        height=420,
    )
    return figure
