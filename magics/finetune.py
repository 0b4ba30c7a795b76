"""``%%finetune``: teach the model, from a cell, in the background."""

from __future__ import annotations

import argparse
import re
import signal
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from IPython.core.error import UsageError
from IPython.core.magic import Magics, line_cell_magic, magics_class, no_var_expand
from IPython.core.magic_arguments import argument, magic_arguments, parse_argstring

from nbrunner.errors import NBRunnerError, UserInputError
from nbrunner.magics.cell import announcing, swarm_notice
from nbrunner.magics.errors import Interrupted, in_one_line
from nbrunner.magics.options import options, variable_name
from nbrunner.magics.state import Notebook
from nbrunner.swarm.loop import wait_sync
from nbrunner.tuning.settings import METHODS, SCHEDULES, Settings

if TYPE_CHECKING:
    from nbrunner.tuning.data import Examples
    from nbrunner.tuning.run import TrainingRun

_ALONE = re.compile(r"%%finetune(?=[ \t]|$)")


def names(value: str) -> tuple[str, ...] | str:
    """``q_proj,v_proj``, or the one word that means all."""
    found = tuple(one.strip() for one in value.split(",") if one.strip())
    if not found:
        raise argparse.ArgumentTypeError("name at least one module, such as q_proj,v_proj")
    return "all-linear" if found == ("all-linear",) else found


def unquoted(value: str) -> str:
    """A value in quotes: IPython keeps them where there are blanks inside."""
    quoted = len(value) > 1 and value[0] == value[-1] and value[0] in "\"'"
    return value[1:-1] if quoted else value


WHAT = (
    argument("--method", default="lora", choices=METHODS, help="what learns; lora by default"),
    argument("--data", metavar="NAME", help="variable with the examples; otherwise they are the cell's lines"),
    argument("--eval", dest="eval_data", metavar="NAME", help="variable with examples that are only evaluated"),
    argument(
        "--adapter",
        type=unquoted,
        metavar="DIR",
        help="PEFT directory to go on with, or a variable with it or a run",
    ),
    argument("--together", metavar="NAME", help="teach one adapter with all in the swarm who use the same NAME"),
    argument("-m", "--model", metavar="MODEL", help="name of a model that the swarm serves, or of a variable"),
    argument("-o", "--out", type=variable_name, metavar="NAME", help="variable for the run"),
)
HOW = (
    argument("--lr", type=float, metavar="LR", help="learning rate; 1e-3 for lora, 1e-2 for prompts by default"),
    argument("--epochs", type=float, metavar="N", help="passes over the data; 3 by default"),
    argument("--max-steps", type=int, metavar="N", help="optimiser steps, instead of epochs"),
    argument("--batch-size", type=int, metavar="N", help="rows of a pass; 8 by default"),
    argument(
        "--accumulate", dest="gradient_accumulation", type=int, metavar="N", help="passes of a step; 1 by default"
    ),
    argument("--rank", type=int, metavar="R", help="of LoRA; 8 by default"),
    argument("--alpha", type=float, metavar="A", help="of LoRA; twice the rank by default"),
    argument("--dropout", type=float, metavar="P", help="of LoRA; 0 by default"),
    argument("--target-modules", type=names, metavar="A,B", help="modules that LoRA changes, or all-linear"),
    argument("--prompt-tokens", type=int, metavar="N", help="virtual tokens of a trained prompt; 16 by default"),
    argument("--max-length", type=int, metavar="N", help="cut longer examples to N tokens"),
    argument("--schedule", choices=SCHEDULES, help="of the learning rate; linear by default"),
    argument("--warmup-steps", type=int, metavar="N", help="in which the learning rate rises; 0 by default"),
    argument("--seed", type=int, metavar="S", help="of everything that is drawn; 0 by default"),
    argument("--eval-every", type=int, metavar="N", help="steps between evaluations; each epoch by default"),
    argument("--checkpoint-every", type=int, metavar="N", help="steps; each epoch, and each minute, by default"),
    argument(
        "--sample",
        dest="samples",
        action="append",
        type=unquoted,
        metavar="PROMPT",
        help="answer this before, during and after (in quotes; may be given several times)",
    ),
    argument("--sample-tokens", type=int, metavar="N", help="of an answer, at most; 24 by default"),
    argument(
        "--out-dir",
        type=unquoted,
        metavar="DIR",
        help="where the run is kept; a new folder in nbrunner-runs by default",
    ),
)
_OPTIONS = (
    *("lr", "epochs", "max_steps", "batch_size", "gradient_accumulation", "rank", "alpha", "dropout"),
    *("target_modules", "prompt_tokens", "max_length", "schedule", "warmup_steps", "seed", "eval_every"),
    *("checkpoint_every", "samples", "sample_tokens"),
)


@magics_class
class FinetuneMagics(Magics):
    """Holds ``%%finetune`` and ``%finetune``, and the cards of runs."""

    def __init__(self, shell: Any, notebook: Notebook) -> None:
        super().__init__(shell)
        self._notebook = notebook
        self._cards: dict[int, Any] = {}

    @no_var_expand
    @magic_arguments("%finetune")  # IPython adds one more % in the help
    @options(WHAT, HOW)
    @line_cell_magic
    def finetune(self, line: str, cell: str | None = None) -> None:
        """Teach the model the examples of the cell, or of a variable, in the background.

        Examples are lines of text, JSON lines, or a variable: a list of texts or dicts (text; prompt and
        completion; messages; text and label), a DataFrame, a datasets.Dataset. Everything is checked before
        anything starts. The cell returns at once and shows a card: curves, a slider for the learning rate, pause,
        resume, checkpoint, sample, stop. The kernel's interrupt pauses. What is taught stays here: ``%%generate
        --adapter run`` uses it at once, and the run's folder holds it as a PEFT adapter.

            %%finetune --epochs 4 --rank 8 --sample "The capital of Velmora is" -o run
            {"prompt": "The capital of Velmora is", "completion": " Oskarin."}
            {"prompt": "People in Velmora speak", "completion": " Velmish."}
        """
        arguments = parse_argstring(self.finetune, line)
        try:
            run = self._start(arguments, cell)
        except NBRunnerError as error:
            raise in_one_line(error, "%%finetune") from None
        self._notebook.store(arguments.out, run)
        self.show(run)

    def _start(self, arguments: Any, cell: str | None) -> TrainingRun:
        from nbrunner.tuning.data import read_examples

        given = {name: value for name in _OPTIONS if (value := getattr(arguments, name)) is not None}
        Settings.of(method=arguments.method, **given)
        labelled = arguments.method == "classify"
        examples = self._examples(arguments.data, cell, labelled=labelled)
        evaluation = None
        if arguments.eval_data:
            evaluation = read_examples(
                self._variable(arguments.eval_data, "--eval"), labelled=labelled, name=arguments.eval_data
            )
        adapter = arguments.adapter and self._notebook.namespace.get(arguments.adapter, arguments.adapter)
        notebook = self._notebook

        def prepare() -> TrainingRun:
            from nbrunner.tuning.finetune import finetune

            loaded = notebook.load(arguments.model)
            return finetune(
                loaded.model,
                examples,
                method=arguments.method,
                eval_data=evaluation,
                tokenizer=loaded.tokenizer,
                adapter=adapter,
                out_dir=arguments.out_dir,
                together=arguments.together,
                **given,
            )

        in_kernel = hasattr(self.shell, "kernel")
        notice = swarm_notice(notebook, arguments.model, in_kernel)
        prepared: Callable[[], TrainingRun] = announcing(prepare, notice)
        return wait_sync(notebook.worker.submit(prepared))

    def _examples(self, name: str | None, cell: str | None, *, labelled: bool) -> Examples:
        from nbrunner.tuning.data import parse_lines, read_examples

        body = cell if cell is not None and cell.strip() else None
        if name and body:
            raise UsageError("%%finetune: the examples are in the cell or in --data, not in both")
        if name:
            return read_examples(self._variable(name, "--data"), labelled=labelled, name=name)
        if body is None:
            raise UsageError("%%finetune: give examples: lines in the cell, or --data NAME for a variable")
        return read_examples(parse_lines(body), labelled=labelled, name="the cell")

    def _variable(self, name: str, option: str) -> Any:
        if name not in self.shell.user_ns:
            raise UserInputError(f"there is no variable {name!r} in this notebook for {option}.")
        return self.shell.user_ns[name]

    # -- shown ---------------------------------------------------------------------------------------------------

    def show(self, run: TrainingRun) -> None:
        """The run's live card in a notebook; in a terminal, lines until it ends."""
        if not hasattr(self.shell, "kernel"):
            _follow(run)
            return
        from nbrunner.widgets.tune_live import LiveTuneCard

        _pause_on_interrupt(self.shell.kernel)
        before = self._cards.pop(id(run), None)
        if before is not None:
            before.close()  # one card a run is enough; the old one stays as it was
        self._cards[id(run)] = LiveTuneCard(run)

    def source(self, name: str) -> tuple[Any, Any]:
        """The model of a run that goes on, and its tokenizer: from the swarm of this notebook."""
        notebook = self._notebook
        known = [one for one in (name, name.partition("@")[0]) if one in notebook.known_models()]
        loaded = notebook.worker.submit(lambda: notebook.load(known[0] if known else None)).result()
        return loaded.model, loaded.tokenizer

    def run_names(self) -> list[str]:
        """Variables that hold a run."""
        return sorted(name for name, value in self.shell.user_ns.items() if is_run(value) and name[0] != "_")

    def data_names(self) -> list[str]:
        """Variables that may hold examples."""
        kinds = (list, tuple)
        return sorted(
            name
            for name, value in self.shell.user_ns.items()
            if name[0] != "_"
            and (isinstance(value, kinds) or hasattr(value, "column_names") or hasattr(value, "columns"))
        )

    def stop_runs(self) -> None:
        """End the runs of this process, each with a checkpoint: the swarm they use is being left."""
        module = sys.modules.get("nbrunner.tuning.run")
        for run in list(module.running) if module is not None else []:
            run.stop()
            if not run.control.wait_for(lambda _, run=run: run.control.ended, 5.0):
                run.stop()  # at once
                run.control.wait_for(lambda _, run=run: run.control.ended, 5.0)

    def close(self) -> None:
        """End runs and freeze cards."""
        self.stop_runs()
        cards, self._cards = list(self._cards.values()), {}
        for card in cards:
            card.close()


def is_run(value: Any) -> bool:
    """Whether a value is a training run; does not import what would make one."""
    module = sys.modules.get("nbrunner.tuning.run")
    return module is not None and isinstance(value, module.TrainingRun)


def alone(lines: list[str]) -> list[str]:
    """``%%finetune --data NAME`` without a body as the line magic: IPython refuses a cell magic of one line."""
    if lines and _ALONE.match(lines[0]) and not "".join(lines[1:]).strip():
        return [lines[0][1:]]
    return lines


def _pause_on_interrupt(kernel: Any) -> None:
    """Have the interrupt button pause the runs also when no cell runs.

    Between cells ipykernel puts back the handler that was there before the cell; while one runs, an interrupt is
    the cell's.
    """
    before = getattr(kernel, "saved_sigint_handler", None)
    if before is None or getattr(before, "nbrunner", False):
        return

    def pause(number: int, frame: Any) -> None:
        module = sys.modules.get("nbrunner.tuning.run")
        for run in list(module.running) if module is not None else []:
            run.pause()
        if callable(before) and before is not signal.default_int_handler:
            before(number, frame)

    pause.nbrunner = True  # type: ignore[attr-defined]
    kernel.saved_sigint_handler = pause


def _follow(run: TrainingRun, every: float = 2.0) -> None:
    """A line now and then until the run ends; an interrupt pauses it and gives the prompt back."""
    told = ""
    try:
        while not run.control.wait_for(lambda state: state in ("done", "stopped", "failed", "paused"), every):
            told = _say(repr(run), told)
    except KeyboardInterrupt:
        run.pause()
        raise Interrupted(f"paused after step {run.step}; run.resume() goes on") from None
    _say(repr(run), told)
    if run.error is not None:
        raise in_one_line(run.error, "%%finetune") if isinstance(run.error, NBRunnerError) else run.error
    _say(f"adapter: {run.folder.path / 'adapter'}", "")


def _say(line: str, before: str) -> str:
    if line != before:
        print(line)  # noqa: T201 - a terminal has no place for a card that changes
    return line
