"""JupyterLab in a real browser: open a notebook, run it, click, look at what is there and what was asked for."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nbformat
from helpers import ROOT, wait_until

SCREENS = ROOT / "build" / "screens"
_TOKEN = "test"
_BROWSER_OPTIONS = [
    "--no-sandbox",  # browsers refuse to start for root without it, and CI runs as root
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


def write_notebook(path: Path, cells: list[str]) -> None:
    """A notebook of code cells; one that begins with ``#md `` is text."""
    nb = nbformat.v4.new_notebook(metadata={"kernelspec": {"name": "python3", "display_name": "Python 3"}})
    for cell in cells:
        new = nbformat.v4.new_markdown_cell if cell.startswith("#md ") else nbformat.v4.new_code_cell
        nb.cells.append(new(cell.removeprefix("#md ")))
    nbformat.write(nb, path)


class LabServer:
    """A JupyterLab of this environment, with configuration and data of its own."""

    def __init__(self, root: Path) -> None:
        self.root = root / "work"
        self.root.mkdir()
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        settings = root / "settings" / "@jupyterlab" / "apputils-extension"
        settings.mkdir(parents=True)
        (settings / "notification.jupyterlab-settings").write_text('{"fetchNews": "false"}')
        places = {f"JUPYTER_{name}_DIR": str(root / name.lower()) for name in ("CONFIG", "RUNTIME", "DATA")}
        self._log = (root / "lab.log").open("wb")
        self._process = subprocess.Popen(
            [
                *(sys.executable, "-m", "jupyterlab", "--allow-root", "--ip=127.0.0.1", f"--port={port}"),
                *("--no-browser", "--expose-app-in-browser", f"--IdentityProvider.token={_TOKEN}"),
                *(f"--ServerApp.root_dir={self.root}", f"--LabApp.user_settings_dir={root / 'settings'}"),
                *("--LabApp.news_url=None", "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate"),
            ],
            env={**os.environ, **places, "IPYTHONDIR": str(root / "ipython")},
            stdout=self._log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        wait_until(self._answers, 60, what="JupyterLab answers", interval=0.2)

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/api?token={_TOKEN}", timeout=2):
                return True
        except OSError:
            return False

    def close(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()


class Lab:
    """A browser looking at a `LabServer`.

    Attributes
    ----------
    external : list of str
        Every address outside the server that a page asked for.
    errors : list of str
        What a page's console called an error, and what its scripts threw.
    """

    def __init__(self, server: LabServer, executable: str) -> None:
        from playwright.sync_api import sync_playwright

        self.server = server
        self.external: list[str] = []
        self.errors: list[str] = []
        self._playwright = sync_playwright().start()
        self._browser = self._playwright.chromium.launch(executable_path=executable, args=_BROWSER_OPTIONS)
        self.page: Any = self._browser.new_page(viewport={"width": 1200, "height": 1000})
        own = (server.url, server.url.replace("http", "ws", 1), "data:", "blob:")
        self.page.on(
            "request",
            lambda request: self.external.append(request.url) if not request.url.startswith(own) else None,
        )
        self.page.on("console", self._said)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))

    def _said(self, message: Any) -> None:
        # Lab asks a kernel's debugger how it is, and a kernel that ends meanwhile does not answer
        if message.type == "error" and not message.text.startswith("Could not restore the debugger state"):
            self.errors.append(message.text)

    def close(self) -> None:
        self._browser.close()
        self._playwright.stop()

    def open(self, name: str) -> None:
        self.page.goto(f"{self.server.url}/lab/tree/{name}?reset&token={_TOKEN}")
        self.page.wait_for_selector(".jp-Notebook .jp-Cell", timeout=60_000)
        self._until(lambda: self.kernel_status() == "idle", 60, "the kernel is idle")
        self.page.evaluate("() => window.jupyterapp.shell.collapseLeft()")  # the notebook has the width then

    def kernel_status(self) -> str:
        return self.page.evaluate(
            "() => window.jupyterapp?.shell?.currentWidget?.sessionContext?.session?.kernel?.status ?? 'none'"
        )

    def command(self, name: str) -> None:
        self.page.evaluate("name => { window.jupyterapp.commands.execute(name, {}); }", name)

    def execute(self, code: str) -> None:
        """Run code in the notebook's kernel, in no cell; it must not fail."""
        script = """async code => {
            const kernel = window.jupyterapp.shell.currentWidget.sessionContext.session.kernel;
            const { content } = await kernel.requestExecute({ code, store_history: false }).done;
            return content.status === "ok" ? "" : `${content.ename}: ${content.evalue}`;
        }"""
        assert self.page.evaluate(script, code) == "", code

    def holds(self, expression: str) -> bool:
        """Whether something is true in the notebook's kernel."""
        script = """async held => {
            const kernel = window.jupyterapp.shell.currentWidget.sessionContext.session.kernel;
            const asked = { code: '', store_history: false, user_expressions: { held } };
            const { content } = await kernel.requestExecute(asked).done;
            return content.user_expressions.held.data?.['text/plain'] === 'True';
        }"""
        return bool(self.page.evaluate(script, f"bool({expression})"))

    def run_cell(self, index: int) -> None:
        """Run one code cell, as a user would; returns at once."""
        script = """index => {
            const notebook = window.jupyterapp.shell.currentWidget.content;
            notebook.deselectAll(); notebook.activeCellIndex = index;
            window.jupyterapp.commands.execute('notebook:run-cell', {});
        }"""
        self.page.evaluate(script, index)

    def run_all(self) -> None:
        self.command("notebook:run-all-cells")
        self._until(lambda: "[*]" in self.prompts() or any(c.isdigit() for c in self.prompts()), 10, "cells run")

    def prompts(self) -> str:
        return " ".join(one.inner_text() for one in self.page.query_selector_all(".jp-InputPrompt"))

    def wait_done(self, timeout: float) -> None:
        """All cells have run and the kernel is idle."""
        done = lambda: "[*]" not in self.prompts() and self.kernel_status() == "idle"  # noqa: E731
        self._until(done, timeout, "all cells have ended")

    def outputs(self) -> list[str]:
        """What each code cell shows."""
        return [one.inner_text() for one in self.page.query_selector_all(".jp-CodeCell .jp-Cell-outputArea")]

    def theme(self, name: str) -> None:
        script = "name => { window.jupyterapp.commands.execute('apputils:change-theme', {theme: name}); }"
        self.page.evaluate(script, name)
        light = "false" if "Dark" in name else "true"
        self.page.wait_for_selector(f"body[data-jp-theme-light='{light}']", state="attached")
        self.page.wait_for_load_state("networkidle")

    def save(self, name: str) -> nbformat.NotebookNode:
        """Save, and read what is on the disk."""
        path = self.server.root / name
        before = path.stat().st_mtime_ns
        self.command("docmanager:save")
        self._until(lambda: path.stat().st_mtime_ns != before and _is_whole(path), 20, "the notebook was saved")
        return nbformat.read(path, as_version=4)

    def shut_kernel_down(self) -> None:
        self.page.evaluate("() => window.jupyterapp.shell.currentWidget.sessionContext.shutdown()")

    def screens(self, name: str, *, cells: Sequence[int] = (), height: int = 1400) -> None:
        """Pictures in ``build/screens``, light and dark, wide and narrow; of cells, or of the whole window."""
        SCREENS.mkdir(parents=True, exist_ok=True)
        for theme in ("light", "dark"):
            self.theme(f"JupyterLab {theme.title()}")
            for width in (1300, 700):
                self.page.set_viewport_size({"width": width, "height": height})
                self.page.wait_for_timeout(150)  # what is drawn for a width is drawn again
                for index in cells:
                    cell = self.page.query_selector_all(".jp-CodeCell")[index]
                    cell.scroll_into_view_if_needed()
                    (SCREENS / f"{name}-{index}-{theme}-{width}.png").write_bytes(cell.screenshot())
                if not cells:
                    (SCREENS / f"{name}-{theme}-{width}.png").write_bytes(self.page.screenshot())
        self.theme("JupyterLab Light")
        self.page.set_viewport_size({"width": 1200, "height": 1000})

    def picture(self, name: str, what: Any) -> None:
        """A picture of the README: in ``build/screens``, and where ``make images`` wants it."""
        self.page.mouse.move(1, 1)
        for folder in filter(None, (SCREENS, os.environ.get("NBRUNNER_IMAGES"))):
            place = ROOT / folder
            place.mkdir(parents=True, exist_ok=True)
            self._take(what, place / f"{name}.png")

    def _take(self, what: Any, place: Path) -> None:
        from playwright.sync_api import Error

        for _ in range(9):
            try:
                what.screenshot(path=place, timeout=5000)
                return
            except Error:
                self.page.wait_for_timeout(200)  # what is live may be replaced while its picture is taken
        what.screenshot(path=place)

    def seen_again(self, name: str, look: Callable[[Any], None]) -> nbformat.NotebookNode:
        """Save, close, and look again: with a fresh kernel, with none, and as a page that nbconvert makes.

        ``look`` is given each page.
        """
        saved = self.save(name)
        assert "vnd.jupyter.widget-view" not in str(saved.cells)
        self.shut_kernel_down()
        self.open(name)
        look(self.page)
        self.shut_kernel_down()
        self._until(lambda: self.kernel_status() != "idle", 20, "the kernel is gone")
        look(self.page)
        assert "model not found" not in self.page.inner_text("body")
        other = self._browser.new_page()
        asked: list[str] = []
        other.on("request", lambda request: asked.append(request.url))
        path = self.server.root / f"{name}.html"
        path.write_text(_converted(saved), "utf-8")
        try:
            other.goto(path.as_uri())
            look(other)
        finally:
            other.close()
        assert all(one.startswith(("file:", "data:", "blob:")) for one in asked), asked
        assert self.external == []
        return saved

    def _until(self, condition: Any, timeout: float, what: str) -> None:
        deadline = time.monotonic() + timeout
        while not condition():
            assert time.monotonic() < deadline, f"not within {timeout} s: {what}; {self.outputs()}"
            self.page.wait_for_timeout(50)  # time.sleep would keep playwright from hearing the page


def _converted(notebook: nbformat.NotebookNode) -> str:
    """What nbconvert makes of the cells, without the style of its page (which it takes from elsewhere)."""
    from nbconvert import HTMLExporter

    return HTMLExporter(template_name="basic").from_notebook_node(notebook)[0]


def _is_whole(path: Path) -> bool:
    """Whether a file is no longer being written: the server empties it first."""
    try:
        json.loads(path.read_text("utf-8"))
    except ValueError:
        return False
    return True


@contextmanager
def open_lab(folder: Path, chromium: str) -> Iterator[Lab]:
    """JupyterLab over a folder, seen in a browser; both end with the block."""
    server = LabServer(folder)
    try:
        lab = Lab(server, chromium)
        try:
            yield lab
        finally:
            lab.close()
    finally:
        server.close()
