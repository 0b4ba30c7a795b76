"""JupyterLab in a real browser: open a notebook, run it, click, look at what is there and what was asked for."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import nbformat
from helpers import wait_until

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
    """

    def __init__(self, server: LabServer, executable: str) -> None:
        from playwright.sync_api import sync_playwright

        self.server = server
        self.external: list[str] = []
        self._playwright = sync_playwright().start()
        self._browser = self._playwright.chromium.launch(executable_path=executable, args=_BROWSER_OPTIONS)
        self.page: Any = self._browser.new_page(viewport={"width": 1200, "height": 1000})
        own = (server.url, server.url.replace("http", "ws", 1), "data:", "blob:")
        self.page.on(
            "request",
            lambda request: self.external.append(request.url) if not request.url.startswith(own) else None,
        )

    def close(self) -> None:
        self._browser.close()
        self._playwright.stop()

    def open(self, name: str) -> None:
        self.page.goto(f"{self.server.url}/lab/tree/{name}?reset&token={_TOKEN}")
        self.page.wait_for_selector(".jp-Notebook .jp-Cell", timeout=60_000)
        self._until(lambda: self.kernel_status() == "idle", 60, "the kernel is idle")

    def kernel_status(self) -> str:
        return self.page.evaluate(
            "() => window.jupyterapp?.shell?.currentWidget?.sessionContext?.session?.kernel?.status ?? 'none'"
        )

    def command(self, name: str) -> None:
        self.page.evaluate("name => { window.jupyterapp.commands.execute(name, {}); }", name)

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

    def _until(self, condition: Any, timeout: float, what: str) -> None:
        deadline = time.monotonic() + timeout
        while not condition():
            assert time.monotonic() < deadline, f"not within {timeout} s: {what}; {self.outputs()}"
            self.page.wait_for_timeout(50)  # time.sleep would keep playwright from hearing the page


def _is_whole(path: Path) -> bool:
    """Whether a file is no longer being written: the server empties it first."""
    try:
        json.loads(path.read_text("utf-8"))
    except ValueError:
        return False
    return True
