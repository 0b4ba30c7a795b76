"""What of transformers is not promised is imported in one file, so that a release that moves it breaks one file."""

from __future__ import annotations

import ast
from pathlib import Path

import transformers
from helpers import ROOT

ONLY_HERE = ROOT / "nbrunner" / "blocks" / "compat.py"
# A script that was run once to make the bundled weights; nothing imports it.
NOT_THE_PACKAGE = {ROOT / "nbrunner" / "tiny" / "train.py"}
PROMISED_MODULES = {"transformers", "transformers.utils", "transformers.generation"}


def imports(path: Path) -> list[tuple[str, str]]:
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "transformers":
            found += [(node.module or "", alias.name) for alias in node.names]
        elif isinstance(node, ast.Import):
            found += [(alias.name, "") for alias in node.names if alias.name.partition(".")[0] == "transformers"]
    return found


def test_only_one_file_imports_what_transformers_does_not_promise() -> None:
    sources = [path for folder in ("nbrunner", "magics", "widgets") for path in (ROOT / folder).rglob("*.py")]
    wrong = [
        f"{path.relative_to(ROOT)}: {module}.{name}"
        for path in sources
        if path not in {ONLY_HERE, *NOT_THE_PACKAGE}
        for module, name in imports(path)
        if module not in PROMISED_MODULES or (module == "transformers" and name and not hasattr(transformers, name))
    ]
    assert not wrong
    assert imports(ONLY_HERE)
