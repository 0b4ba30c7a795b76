"""Pictures of a trace and of a patch grid, as plain plotly figures of a few kB.

Tokens come from a model and a text, so they are escaped: plotly reads some HTML, entities and LaTeX in its labels.
"""

from __future__ import annotations

import html
import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from nbrunner.client.svg import tidy
from nbrunner.client.trace import Trace
from nbrunner.errors import UserInputError

if TYPE_CHECKING:
    from nbrunner.client.patching import PatchGrid

Kind = Literal["lens", "norms", "trajectory", "pca"]

_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b07d00", "#56b4e9", "#7a4fb5", "#808080")
"""Told apart by colour-blind people too (after Okabe and Ito 2008); the dash changes with each as well."""
_DASHES = ("solid", "dash", "dot", "dashdot", "longdash")
_INK = {False: ("#ffffff", "#1f2328", "#d0d7de"), True: ("#161a1f", "#e6e9ec", "#3a424c")}
"""Dark or not → background, text, lines. Painted by the figure, since plotly does not know the page it is on."""
_WIDE_ENOUGH = 24
"""Columns up to which a cell has room for a word."""
_SINGLE_LINES = 12
"""Positions up to which each has its own line of norms."""


def trace_figure(trace: Trace, kind: Kind, *, position: int | None = None, dark: bool = False) -> Any:
    """See `Trace.figure`."""
    if kind == "lens":
        return _lens(trace, dark)
    if kind == "norms":
        return _norms(trace, dark)
    if kind == "trajectory":
        return _trajectory(trace, position, dark)
    if kind == "pca":
        return _pca(trace, dark)
    raise UserInputError(f"there is no figure {kind!r}: lens, norms, trajectory or pca")


def grid_figure(grid: PatchGrid, *, dark: bool = False) -> Any:
    """See `PatchGrid.figure`."""
    go, (_, _, line) = _plotly(), _INK[dark]
    corrupted, clean = grid.corrupted, grid.clean
    hover = [
        [
            f"state {layer}, token {place}: {_quoted(corrupted.tokens[place])} gets the state of "
            f"{_quoted(clean.tokens[place])}<br>brings back {grid.values[row, column]:.3f}"
            for column, place in enumerate(grid.positions)
        ]
        for row, layer in enumerate(grid.layers)
    ]
    reach = max(1.0, float(np.abs(grid.values).max()))
    cells = go.Heatmap(
        z=_numbers(grid.values),
        zmin=-reach,
        zmax=reach,
        colorscale="RdBu",
        colorbar={"title": {"text": "brought back"}, "outlinecolor": line},
        text=hover,
        hovertemplate="%{text}<extra></extra>",
        **_in_cells("%{z:.2f}", len(grid.positions)),
    )
    labels = [
        _label(corrupted.tokens[one])
        if corrupted.tokens[one] == clean.tokens[one]
        else f"{_label(clean.tokens[one])} → {_label(corrupted.tokens[one])}"
        for one in grid.positions
    ]
    figure = go.Figure(cells, _layout("What each state brings back when it is patched in", dark))
    return _grid_axes(figure, labels, grid.layers)


def _lens(trace: Trace, dark: bool) -> Any:
    if trace.top_ids is None or trace.top_probs is None:
        raise UserInputError("this trace has not kept the lens: model.trace(…, keep=('lens', …))")
    go, (_, _, line) = _plotly(), _INK[dark]
    text, hover = [], []
    for row, layer in enumerate(trace.layers):
        peer = trace.peer_of(layer)
        where = f"<br>computed by …{_safe(peer[-6:])}" if peer else ""
        text.append([_label(trace.token_text(ids[0])) for ids in trace.top_ids[row]])
        hover.append(
            [
                f"state {layer}, token {place}: {_quoted(trace.tokens[place])}{where}<br>"
                + "<br>".join(
                    f"{probability:.3f} {_quoted(trace.token_text(token))}"
                    for token, probability in zip(
                        trace.top_ids[row, column], trace.top_probs[row, column], strict=True
                    )
                )
                for column, place in enumerate(trace.positions)
            ]
        )
    cells = go.Heatmap(
        z=_numbers(trace.top_probs[..., 0]),
        zmin=0,
        zmax=1,
        colorscale="Cividis",
        colorbar={"title": {"text": "probability"}, "outlinecolor": line},
        text=text,
        hovertext=hover,
        hovertemplate="%{hovertext}<extra></extra>",
        **_in_cells("%{text}", len(trace.positions)),
    )
    figure = go.Figure(cells, _layout("What each state would say as it is (logit lens)", dark))
    for row, (below, above) in enumerate(itertools.pairwise(trace.layers)):
        if trace.peer_of(below) != trace.peer_of(above):
            figure.add_hline(y=row + 0.5, line={"color": "#d55e00", "width": 2, "dash": "dash"})
    return _grid_axes(figure, [_label(trace.tokens[one]) for one in trace.positions], trace.layers)


def _norms(trace: Trace, dark: bool) -> Any:
    if trace.norm is None:
        raise UserInputError("this trace has not kept the norms: model.trace(…, keep=('norm', …))")
    go, norm = _plotly(), trace.norm
    if norm.shape[1] <= _SINGLE_LINES:
        names = [f"{place} {_label(trace.tokens[place])}" for place in trace.positions]
        curves = list(zip(names, norm.T, strict=True))
    else:
        curves = [
            ("largest", norm.max(1)),
            ("median", np.median(norm, axis=1)),
            ("smallest", norm.min(1)),
        ]
    figure = go.Figure(layout=_layout("Length of the states (Euclidean norm)", dark))
    for index, (name, values) in enumerate(curves):
        figure.add_scatter(x=trace.layers, y=_numbers(values), name=name, mode="lines+markers", **_style(index))
    # some models have a few states a thousand times longer than the rest
    wide = bool(norm.min() > 0) and float(norm.max() / norm.min()) > 50
    figure.update_yaxes(title="norm", type="log" if wide else "linear")
    return _layer_axis(figure, trace.layers)


def _trajectory(trace: Trace, position: int | None, dark: bool) -> Any:
    go = _plotly()
    at = trace.positions[-1] if position is None else position
    at = at + len(trace.ids) if at < 0 else at
    if at not in trace.positions:
        raise UserInputError(f"position {position} was not traced: one of {trace.positions}")
    column = trace.positions.index(at)
    title = f"Probability in the lens at token {at}, {_quoted(trace.tokens[at])}"
    figure = go.Figure(layout=_layout(title, dark))
    for index, (token, values) in enumerate(_paths_of_tokens(trace, column)):
        figure.add_scatter(
            x=trace.layers,
            y=values,
            name=_label(trace.token_text(token)),
            mode="lines+markers",
            connectgaps=False,
            hovertemplate=f"{_quoted(trace.token_text(token))}<br>state %{{x}}: %{{y:.3f}}<extra></extra>",
            **_style(index),
        )
    figure.update_yaxes(title="probability", range=[-0.02, 1.02])
    return _layer_axis(figure, trace.layers)


def _paths_of_tokens(trace: Trace, column: int) -> list[tuple[int, list[float | None]]]:
    """Tokens with their probability in each state: those asked for, or the best of the last state.

    Of the latter, None where a state does not have the token among its best: it is not known there.
    """
    if trace.chosen_probs is not None:
        return [(token, _numbers(trace.chosen_probs[:, column, index])) for index, token in enumerate(trace.chosen)]
    if trace.top_ids is None or trace.top_probs is None:
        raise UserInputError("this trace has not kept the lens: model.trace(…, keep=('lens', …))")
    paths = []
    for token in trace.top_ids[-1, column].tolist():
        found = [ids.tolist() for ids in trace.top_ids[:, column]]
        paths.append(
            (
                token,
                [
                    float(trace.top_probs[row, column, ids.index(token)]) if token in ids else None
                    for row, ids in enumerate(found)
                ],
            )
        )
    return paths


def _pca(trace: Trace, dark: bool) -> Any:
    go = _plotly()
    hidden = trace.hidden
    if hidden is None:
        if trace.model is None:
            raise UserInputError("this trace has neither kept the states nor a model to ask: keep=('hidden', …)")
        found = trace.model.trace(
            trace.ids,
            layers=trace.layers,
            positions=trace.positions,
            keep=("hidden",),
            edits=trace.edits,
            tokenizer=trace.tokenizer,
        )
        hidden = found.hidden
    if hidden is None:
        raise RuntimeError("a trace that keeps hidden states has none")
    points, shares = plane(hidden)
    figure = go.Figure(layout=_layout("Directions of the states, in the plane where they differ most", dark))
    for index, place in enumerate(trace.positions):
        figure.add_scatter(
            x=_numbers(points[:, index, 0]),
            y=_numbers(points[:, index, 1]),
            name=f"{place} {_label(trace.tokens[place])}",
            mode="lines+markers",
            text=[f"{_quoted(trace.tokens[place])}, state {layer}" for layer in trace.layers],
            hovertemplate="%{text}<extra></extra>",
            # a path grows towards its last state, so that its direction is seen
            marker={"size": np.linspace(4, 11, len(trace.layers)).round(1).tolist()},
            **_style(index),
        )
    figure.update_xaxes(title=f"first component ({shares[0]:.0%} of the variance)", showgrid=True)
    figure.update_yaxes(title=f"second component ({shares[1]:.0%})")
    return figure


def plane(hidden: torch.Tensor) -> tuple[np.ndarray[Any, np.dtype[np.float32]], tuple[float, float]]:
    """Where states lie in the plane of their first two principal components.

    Each state is first scaled to length 1: otherwise the plane is that of the few longest states, such as those of
    the first token. Components by subspace iteration (Halko, Martinsson and Tropp 2011, algorithm 4.4), in float32.

    Parameters
    ----------
    hidden
        [L, P, ...].

    Returns
    -------
    points
        [L, P, 2] float32, unitless. The sign of a component is such that the farthest point is on its right side.
    shares
        Of the variance, 0 to 1.
    """
    count = hidden.shape[0] * hidden.shape[1]
    rows = torch.nn.functional.normalize(hidden.detach().float().reshape(count, -1), dim=-1)
    rows = rows - rows.mean(0)
    width = min(10, *rows.shape)
    start = torch.randn(rows.shape[1], width, generator=torch.Generator().manual_seed(0))
    basis = torch.linalg.qr(start.to(rows)).Q
    for _ in range(8):
        basis = torch.linalg.qr(rows.T @ (rows @ basis)).Q
    left, singular, _ = torch.linalg.svd(rows @ basis, full_matrices=False)
    points = torch.zeros(count, 2)
    found = (left * singular)[:, :2]
    points[:, : found.shape[1]] = found
    farthest = points.gather(0, points.abs().argmax(0, keepdim=True))
    points = points * torch.where(farthest < 0, -1.0, 1.0)
    total = float(rows.square().sum()) or 1.0
    first, second = (float(one) for one in (points.square().sum(0) / total))
    return points.reshape(*hidden.shape[:2], 2).numpy(), (first, second)


# -- pieces -----------------------------------------------------------------------------------------------------


def _plotly() -> Any:
    import plotly.graph_objects as go

    return go


def _layout(title: str, dark: bool) -> dict[str, Any]:
    """Without plotly's default template, which is 7 kB in every figure."""
    back, ink, line = _INK[dark]
    axis = {"gridcolor": line, "zeroline": False, "linecolor": line, "tickcolor": line}
    return {
        "template": "none",
        "title": {"text": title, "font": {"size": 15}, "x": 0.02, "xanchor": "left"},
        "paper_bgcolor": back,
        "plot_bgcolor": back,
        "font": {"color": ink, "family": "system-ui, sans-serif"},
        "margin": {"l": 60, "r": 20, "t": 50, "b": 60},
        "height": 420,
        "xaxis": dict(axis),
        "yaxis": dict(axis),
        "hoverlabel": {"align": "left"},
    }


def _grid_axes(figure: Any, tokens: Sequence[str], layers: Sequence[int]) -> Any:
    """Columns and rows by number, since a token may come twice; the last layer above."""
    rows = list(range(len(layers)))
    step = -(-len(layers) // 30)
    kept = [row for row in rows if (row % step == 0 and row + step <= rows[-1]) or row == rows[-1]]
    figure.update_xaxes(
        tickvals=list(range(len(tokens))), ticktext=list(tokens), title="token", showgrid=False, tickangle=-45
    )
    figure.update_yaxes(tickvals=kept, ticktext=[str(layers[row]) for row in kept], title="state", showgrid=False)
    figure.update_xaxes(automargin=True)
    return figure.update_layout(height=min(900, 170 + 26 * len(layers)))


def _layer_axis(figure: Any, layers: Sequence[int]) -> Any:
    ticks = {"tickvals": list(layers)} if len(layers) <= 20 else {}
    return figure.update_xaxes(title="state (0: embeddings)", showgrid=True, **ticks).update_layout(showlegend=True)


def _in_cells(template: str, columns: int) -> dict[str, Any]:
    return {"texttemplate": template} if columns <= _WIDE_ENOUGH else {}


def _style(index: int) -> dict[str, Any]:
    return {"line": {"color": _COLOURS[index % len(_COLOURS)], "dash": _DASHES[index % len(_DASHES)]}}


def _numbers(values: Any) -> list[Any]:
    """As lists: plotly writes arrays as base64 of all their digits, and these need four."""
    found: list[Any] = np.round(np.asarray(values, np.float64), 5).tolist()
    return found


def _safe(text: str) -> str:
    """A text that plotly shows as it is. ``$`` as an entity: two of them would make LaTeX of what is between."""
    return html.escape(tidy(text.replace("\n", "↵").replace("\t", "⇥"))).replace("$", "&#36;")


def _quoted(text: str) -> str:
    return f"‘{_safe(text)}’"


def _label(text: str) -> str:
    """Short, for a cell, an axis or a legend."""
    shown = text.strip(" ") or "␣"
    return _safe(shown if len(shown) <= 12 else shown[:11] + "…")
