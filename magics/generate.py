"""``%%generate``: the cell is a prompt, its output the text that follows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from IPython.core.error import UsageError
from IPython.core.magic import Magics, cell_magic, magics_class, no_var_expand
from IPython.core.magic_arguments import magic_arguments, parse_argstring

from nbrunner.errors import UserInputError
from nbrunner.magics.cell import run_cell
from nbrunner.magics.finetune import is_run
from nbrunner.magics.options import ADAPTER, SAMPLING, SESSION, SPECULATION, TARGET, WATERFALL, options
from nbrunner.magics.prompts import render
from nbrunner.magics.state import Notebook

if TYPE_CHECKING:
    from nbrunner.client.generation import GenerationRun


@magics_class
class GenerateMagics(Magics):
    """Holds ``%%generate``."""

    def __init__(self, shell: Any, notebook: Notebook) -> None:
        super().__init__(shell)
        self._notebook = notebook

    @no_var_expand
    @magic_arguments("%generate")  # IPython adds one more % in the help
    @options(SAMPLING, TARGET, ADAPTER, SESSION, SPECULATION, WATERFALL)
    @cell_magic
    def generate(self, line: str, cell: str) -> Any:
        """Continue the text of the cell, over the swarm this notebook is connected to.

        The text streams into the output and is stored in the notebook. Below it: tokens per second, time to the
        first token, the chain of servers with the blocks each of them computed, and what cost most. Stop, or the
        kernel's interrupt, ends it; what came until then stays. --waterfall shows where the time of a token went.
        --adapter NAME uses what the run of ``%%finetune`` in that variable has taught so far.

        ``{{ name }}`` in the cell is filled in from the notebook's variables (Jinja; --raw switches it off).
        With nothing configured, a swarm of two servers with the bundled model is started on this machine.

            %%generate -n 20 -o answer
            The capital of {{ country }} is
        """
        arguments = parse_argstring(self.generate, line)
        prompt = prompt_of(self._notebook, cell, raw=arguments.raw, where="%%generate")
        sampling = sampling_of(self._notebook, arguments)
        check_sampling(sampling, "%%generate")
        if arguments.new and not arguments.session:
            raise UsageError("%%generate: --new begins a session again; name it with -s NAME")
        notebook = self._notebook
        run = self._run(arguments)

        def prepare() -> GenerationRun:
            from nbrunner.client.generation import GenerationRun
            from nbrunner.client.sampling import Sampling

            if run is not None:
                from nbrunner.tuning.taught import TaughtModel

                return GenerationRun(TaughtModel(run), run.tokenizer, prompt, Sampling(**sampling))
            loaded = notebook.load(arguments.model)
            session = None
            if arguments.session:
                session = notebook.session(loaded, arguments.session, new=arguments.new)
            return GenerationRun(
                loaded.model,
                loaded.tokenizer,
                prompt,
                Sampling(**sampling),
                session=session,
                speculate=arguments.speculate,
                draft=notebook.draft(arguments.draft) if arguments.draft else None,
                adapter=arguments.adapter,
            )

        return run_cell(
            notebook,
            "%%generate",
            prepare,
            model=arguments.adapter if run is not None else arguments.model,
            out=arguments.out,
            background=arguments.background,
            waterfall=arguments.waterfall,
        )

    def _run(self, arguments: Any) -> Any:
        """The run whose adapter is asked for, None without one."""
        name = arguments.adapter
        if not name:
            return None
        if arguments.session:
            raise UsageError("%%generate: --adapter and --session do not go together: a session keeps what it has")
        if name not in self.shell.user_ns:
            return None  # one that servers serve by this name
        run = self.shell.user_ns[name]
        if not is_run(run):
            raise UsageError(f"%%generate: the variable {name!r} holds no run of %%finetune")
        if arguments.draft or arguments.speculate not in ("auto", "off"):
            raise UsageError("%%generate: --speculate and --draft do not go with what a run has taught")
        if arguments.model:
            raise UsageError("%%generate: --adapter with a run's name goes without --model: the run has its own")
        return run


def prompt_of(notebook: Notebook, cell: str, *, raw: bool, where: str) -> str:
    """The cell's text with its names filled in, without the line break that ends every cell."""
    try:
        prompt = cell if raw else render(cell, notebook.namespace)
    except UserInputError as error:
        raise UsageError(f"{where}: {error}") from None
    prompt = prompt.rstrip("\n")
    if not prompt.strip():
        raise UsageError(f"{where}: the cell is empty; write a text below the first line")
    return prompt


def sampling_of(notebook: Notebook, arguments: Any) -> dict[str, Any]:
    """The sampling options of a cell, with ``%config NBRunner`` where it says nothing."""
    from nbrunner.client.sampling import temperature_unless_given

    config = notebook.config
    given, temperature = arguments.max_new_tokens, arguments.temperature
    if temperature is None:
        temperature = temperature_unless_given(
            config.temperature, top_p=arguments.top_p, top_k=arguments.top_k, beams=arguments.beams
        )
    return {
        "max_new_tokens": max(config.max_new_tokens, arguments.min_new_tokens) if given is None else given,
        "temperature": temperature,
        "top_p": arguments.top_p,
        "top_k": arguments.top_k,
        "seed": arguments.seed,
        "beams": arguments.beams,
        "min_new_tokens": arguments.min_new_tokens,
    }


def check_sampling(sampling: dict[str, Any], where: str) -> None:
    """Refuse values that cannot be used before a swarm is started for them."""
    from nbrunner.client.sampling import Sampling

    try:
        Sampling(**sampling)
    except UserInputError as error:
        raise UsageError(f"{where}: {error}") from None
