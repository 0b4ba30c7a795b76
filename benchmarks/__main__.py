"""``python -m benchmarks NAME [--json]``; ``python -m benchmarks`` lists the names."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import pkgutil
import sys
from pathlib import Path

from benchmarks.report import NotHereError

HELPERS = {"children", "gpu_models", "links", "models", "page", "report", "timing", "__main__"}

EXIT_NOT_HERE = 1


def names() -> list[str]:
    folder = str(Path(__file__).parent)
    return sorted(module.name for module in pkgutil.iter_modules([folder]) if module.name not in HELPERS)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"one or more of: {', '.join(names())}; or all")
    parser.add_argument("--json", action="store_true", help="one JSON object a benchmark, and nothing else")
    parser.add_argument(
        "--processes", action="store_true", help="concurrent: only its part with several client processes"
    )
    arguments = parser.parse_args()
    chosen = names() if arguments.names == ["all"] else arguments.names
    unknown = [name for name in chosen if name not in names()]
    if unknown:
        parser.error(f"no benchmark called {', '.join(unknown)}; there are {', '.join(names())}")
    if arguments.processes and chosen != ["concurrent"]:
        parser.error("--processes is an option of concurrent alone")
    options = {"processes": True} if arguments.processes else {}
    if not chosen:
        parser.print_help()
        return 0
    code = 0
    for name in chosen:
        try:
            with contextlib.redirect_stdout(sys.stderr):  # what libraries have to say is not part of the result
                report = importlib.import_module(f"benchmarks.{name}").run(**options)
        except NotHereError as reason:
            print(f"{name}: {reason}", file=sys.stderr)
            code = code if arguments.names == ["all"] else EXIT_NOT_HERE
            continue
        if arguments.json:
            print(report.to_json(), flush=True)
        else:
            report.print_table()
    return code


if __name__ == "__main__":
    sys.exit(main())
