"""What nbrunner shows in a notebook: streaming text, a Stop button, tables and chains that survive saving."""

from __future__ import annotations

if __name__ != "nbrunner.widgets":  # from the repository's root, `import widgets` would make a second copy of it
    raise ImportError("import nbrunner.widgets")
