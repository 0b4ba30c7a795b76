"""Runs a notebook in a real Jupyter kernel and shows it as it goes: `make demo`.

Each cell's source, and what it prints and displays at the moment it does, appear on standard output; the
executed notebook and an HTML page of it, which needs no network to be read, are left behind.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, DeadKernelError

ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
#: What IPython shows of an object in plain text when it has nothing to say about it.
BARE_REPR = re.compile(r"<[\w.]+ object( at 0x[0-9a-f]+)?>")


class Screen:
    """Standard output, on which a display that grows is continued rather than printed again."""

    def __init__(self) -> None:
        self._colours = sys.stdout.isatty() and "NO_COLOR" not in os.environ
        self._shown: dict[str, str] = {}
        self._column = 0

    def write(self, text: str, *, style: str = "") -> None:
        if not text:
            return
        plain = ANSI.sub("", text)
        if not self._colours:
            text = plain
        elif style:
            text = f"\x1b[{style}m{text}\x1b[0m"
        sys.stdout.write(text)
        sys.stdout.flush()
        self._column = len(plain) - plain.rfind("\n") - 1

    def line(self, text: str = "", *, style: str = "") -> None:
        self.write(f"{text}\n" if not self._column else f"\n{text}\n", style=style)

    def display(self, text: str, display_id: str | None) -> None:
        """Show `text`; of a display shown before, only what is new."""
        before = self._shown.get(display_id, "") if display_id else ""
        if display_id:
            self._shown[display_id] = text
        if before and text.startswith(before):
            self.write(text[len(before) :])
            return
        seen = set(before.splitlines())
        fresh = [line for line in text.splitlines() if line not in seen] if before else text.splitlines()
        # A display that replaced its text (a status that changed, a table redrawn) shows its new lines.
        for line in fresh[:-1]:
            self.line(line)
        if fresh:
            self.write(("\n" if self._column else "") + fresh[-1])


class LiveClient(NotebookClient):
    """nbclient, telling a `Screen` about each message as it arrives."""

    screen: Screen

    def process_message(self, msg: dict[str, Any], cell: Any, cell_index: int) -> Any:
        kind, content = msg["msg_type"], msg["content"]
        if kind == "stream":
            self.screen.write(content["text"], style="33" if content["name"] == "stderr" else "")
        elif kind in ("display_data", "update_display_data", "execute_result"):
            text = content["data"].get("text/plain", "")
            if text and not BARE_REPR.fullmatch(text):
                self.screen.display(text, (content.get("transient") or {}).get("display_id"))
        elif kind == "error":
            self.screen.line("\n".join(content["traceback"]))
        return super().process_message(msg, cell, cell_index)


def run(notebook: Path, out: Path, *, timeout: int) -> int:
    """Run `notebook`, leave ``out/NAME.ipynb`` and ``out/NAME.html``; the exit status."""
    screen = Screen()
    nb = nbformat.read(notebook, as_version=4)
    # Lab's widgets draw nothing in a page without a kernel; their static twins, which are outputs, do.
    client = LiveClient(
        nb,
        timeout=timeout,
        kernel_name="python3",
        store_widget_state=False,
        # ipykernel warns of plain TCP on loopback each time; the kernel lives as long as this command.
        extra_arguments=["--log-level=ERROR"],
        resources={"metadata": {"path": str(notebook.parent)}},
    )
    client.screen = screen
    began: dict[int, float] = {}

    def on_start(cell: Any, cell_index: int) -> None:
        began[cell_index] = time.perf_counter()
        if cell.cell_type == "markdown":
            screen.line(f"\n{cell.source}", style="2")
        elif cell.cell_type == "code" and cell.source.strip():
            screen.line()
            for number, line in enumerate(cell.source.rstrip().splitlines()):
                screen.line(("In  │ " if not number else "    │ ") + line, style="1")

    def on_executed(cell: Any, cell_index: int, execute_reply: Any) -> None:
        screen.line(f"    └ {time.perf_counter() - began[cell_index]:.1f} s", style="2")

    client.on_cell_start = on_start
    client.on_cell_executed = on_executed

    start = time.perf_counter()
    failure = ""
    try:
        client.execute()
    except CellExecutionError as error:
        failure = f"A cell failed: {error.ename}: {ANSI.sub('', error.evalue)}"
    except (DeadKernelError, TimeoutError) as error:
        failure = f"{type(error).__name__}: {error}"

    out.mkdir(parents=True, exist_ok=True)
    executed = out / notebook.name
    nbformat.write(nb, executed)
    page = executed.with_suffix(".html")
    page.write_text(as_page(nb, title=notebook.stem), encoding="utf-8")
    screen.line()
    screen.line(f"{time.perf_counter() - start:.1f} s in all. Left behind: {executed} and {page}")
    if failure:
        screen.line(failure, style="31")
    return 1 if failure else 0


def as_page(nb: nbformat.NotebookNode, *, title: str) -> str:
    """The notebook as one HTML page that asks the network for nothing."""
    from nbconvert import HTMLExporter

    exporter = HTMLExporter(require_js_url="", mathjax_url="", widget_renderer_url="", jupyter_widgets_base_url="")
    page, _ = exporter.from_notebook_node(nb, resources={"metadata": {"name": title}})
    return page


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("notebook", type=Path, nargs="?", default=Path(__file__).with_name("quickstart.ipynb"))
    parser.add_argument("--out", type=Path, default=Path("build"), help="folder for the results (default: build)")
    parser.add_argument("--timeout", type=int, default=300, help="seconds that one cell may take (default: 300)")
    options = parser.parse_args()
    if not options.notebook.is_file():
        parser.error(f"no notebook at {options.notebook}")
    return run(options.notebook, options.out, timeout=options.timeout)


if __name__ == "__main__":
    sys.exit(main())
