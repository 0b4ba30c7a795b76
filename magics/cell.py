"""One generating cell: prepare, stream, show, stop, leave the result."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, Any, TypeVar

from nbrunner.errors import NBRunnerError
from nbrunner.magics.async_cells import wants_coroutine
from nbrunner.magics.errors import Interrupted, in_one_line
from nbrunner.magics.state import Notebook
from nbrunner.swarm.loop import Handle, wait_async
from nbrunner.widgets.live import KernelView, LiveView, Notice, TerminalView

if TYPE_CHECKING:
    from nbrunner.client.generation import GenerationRun
    from nbrunner.client.reroute import Reroute
    from nbrunner.client.result import Finish, Generation, Token

T = TypeVar("T")

_ENOUGH_TOKENS = 8
"""From which the speed of a generation says something; the first steps are slower."""


class CellHandle(Handle[Any]):
    """What ``-b -o NAME`` leaves in NAME: ``.result()``, ``await``, ``for token in …``, ``.cancel()``.

    It runs on when the cell is done. `partial` is what there is so far, None before the first token.
    """

    def __init__(self, prepare: Callable[[], GenerationRun], notebook: Notebook) -> None:
        self._prepare, self._notebook = prepare, notebook
        self._run: GenerationRun | None = None
        self.advice = ""
        super().__init__(lambda _: self._produce(), lambda _: self._result())

    async def _produce(self) -> AsyncIterator[Token]:
        self._run = await asyncio.wrap_future(self._notebook.worker.submit(self._prepare))
        async for token in self._run.stream():
            yield token
        with contextlib.suppress(NBRunnerError):  # the notebook may be leaving its swarm
            self.advice = await asyncio.wrap_future(self._notebook.worker.submit(self._advise))

    def _advise(self) -> str:
        """Whether the model would run faster in this process; said once for each model."""
        uid = self._run.uid if self._run is not None else ""
        if self._run is None or not uid:
            return ""
        self._notebook.learn_fits()
        speed = self._run.progress().tokens_per_second if len(self.items) >= _ENOUGH_TOKENS else None
        return self._notebook.fits.once(uid, 1 / speed if speed else None)

    @property
    def reroutes(self) -> tuple[Reroute, ...]:
        """Who failed so far, and who took over."""
        return self._run.reroutes if self._run is not None else ()

    def _result(self) -> Generation | None:
        return self.partial

    @property
    def partial(self) -> Generation | None:
        """What there is now."""
        return self._run.snapshot() if self._run is not None else None

    def ended_as(self, finish: Finish) -> Generation | None:
        """What there is, with the reason for its end."""
        return self._run.snapshot(finish) if self._run is not None else None

    @property
    def text(self) -> str:
        """The text so far."""
        return "".join([str(token) for token in self.items])

    @property
    def note(self) -> str:
        """One line about the progress."""
        if self._run is None:
            return "preparing"
        if not self.items:
            lines = [self._run.queued or "waiting for the first token", *map(str, self.reroutes[-1:])]
            return " · ".join(lines)
        timings = self._run.progress()
        speed = f" · {timings.tokens_per_second:.0f} tok/s" if timings.tokens_per_second else ""
        lost = self.reroutes
        queued = [self._run.queued] if self._run.queued else []
        return " · ".join([f"{len(self.items)} tokens{speed}", *queued, *map(str, lost[-1:])])

    def __repr__(self) -> str:
        state = "stopped" if self.future.cancelled() else "done" if self.done else "running"
        return f"<Generation in the background, {state}, {len(self.items)} tokens>"


def run_cell(
    notebook: Notebook,
    where: str,
    prepare: Callable[[], GenerationRun],
    *,
    model: str | None,
    out: str | None,
    background: bool,
    on_end: Callable[[Generation], Generation] = lambda generation: generation,
    waterfall: bool = False,
) -> Any:
    """Run a generation in the current cell.

    Parameters
    ----------
    where
        ``"%%generate"``, for messages.
    prepare
        Makes the run; in the worker's thread, because it may start a swarm and load a model.
    model
        The model asked for, to tell whether a swarm will be started.
    out
        Variable for the result.
    background
        Return at once.
    on_end
        Called once with what was generated, also when it was stopped; gives what is stored and shown.
    waterfall
        Show where the time of a typical token went. Not in the background: it has no cell to show it in.

    Returns
    -------
    coroutine or None
        A coroutine in an awaited cell (see `async_cells`); otherwise it has run, or runs in the background.
    """
    in_kernel = hasattr(notebook.shell, "kernel")
    notice = swarm_notice(notebook, model, in_kernel)
    handle = CellHandle(announcing(prepare, notice), notebook)
    view = _view(notebook, handle, in_kernel=in_kernel, quiet=background)
    end = _End(notebook, handle, view, out, on_end, waterfall=waterfall and not background)
    if background:
        notebook.store(out, handle)
        handle.future.add_done_callback(end.in_background)
        return None
    if wants_coroutine.get():
        return _wait_in_loop(handle, end, where)
    return _wait_here(handle, end, where)


class _End:
    """What happens once when a cell's generation is over."""

    def __init__(
        self,
        notebook: Notebook,
        handle: CellHandle,
        view: LiveView,
        out: str | None,
        on_end: Callable[[Generation], Generation],
        *,
        waterfall: bool = False,
    ) -> None:
        self._waterfall = waterfall
        self._notebook, self._handle, self._view, self._out, self._on_end = notebook, handle, view, out, on_end

    def show(self, finish: Finish | None = None, error: BaseException | None = None) -> Generation | None:
        """Store and show what there is; ``finish`` says why it ended, if not by itself."""
        generation = self._handle.partial if finish is None else self._handle.ended_as(finish)
        trouble = f"{type(error).__name__}: {error}" if error is not None else ""
        if generation is None:
            self._view.finish("", trouble or ("" if finish == "failed" else "stopped before it began"))
            return None
        generation = self._on_end(generation)
        summary = " · ".join(part for part in (generation.summary(), trouble) if part)
        lines = [summary, *map(str, generation.reroutes), generation.costs_most(), self._handle.advice]
        footer = "\n".join(line for line in lines if line)
        self._view.finish(generation.text, footer, {"nbrunner": dict(generation.receipt)})
        self._notebook.store(self._out, generation)
        if self._waterfall and generation.times:
            from IPython.display import display

            display(generation.waterfall())
        return generation

    def in_background(self, future: concurrent.futures.Future[Any]) -> None:
        """The same without anybody waiting."""
        self._out = None  # the variable holds the handle, and keeps it
        if future.cancelled():
            self.show("cancelled")
        elif (error := future.exception()) is not None:
            self.show("failed", error)
        else:
            self.show()


async def _wait_in_loop(handle: CellHandle, end: _End, where: str) -> None:
    try:
        await wait_async(handle.future)
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is None or not task.cancelling():  # the Stop button, not the kernel's interrupt: a normal end
            end.show("cancelled")
            return
        raise _interrupted(end) from None
    except NBRunnerError as error:
        end.show("failed")
        raise in_one_line(error, where) from None
    except BaseException:
        end.show("failed")
        raise
    end.show()


def _wait_here(handle: CellHandle, end: _End, where: str) -> None:
    try:
        handle.result()
    except concurrent.futures.CancelledError:
        end.show("cancelled")
        return
    except KeyboardInterrupt:
        raise _interrupted(end) from None
    except NBRunnerError as error:
        end.show("failed")
        raise in_one_line(error, where) from None
    except BaseException:
        end.show("failed")
        raise
    end.show()


def _interrupted(end: _End) -> Interrupted:
    generation = end.show("interrupted")
    if generation is None:
        return Interrupted("before the first token; what was being started goes on, %swarm stop ends it")
    return Interrupted(f"after {len(generation.tokens)} tokens; the text so far is kept")


def _view(notebook: Notebook, handle: CellHandle, *, in_kernel: bool, quiet: bool) -> LiveView:
    refresh = notebook.config.refresh
    if in_kernel:
        return KernelView(lambda: handle.text, lambda: handle.note, refresh=refresh, on_stop=handle.cancel)
    return TerminalView(lambda: handle.text, refresh=refresh, quiet=quiet)


def swarm_notice(notebook: Notebook, model: str | None, in_kernel: bool) -> Notice | None:
    """A line that says that a swarm is being started first, where it is."""
    if not notebook.will_start_swarm(model):
        return None
    count = notebook.config.servers
    text = f"Nothing is configured: starting a swarm of {count} servers on this machine with the bundled model …"
    return Notice(text, updates=in_kernel)


def announcing(prepare: Callable[[], T], notice: Notice | None) -> Callable[[], T]:
    """Have the notice say when what it announces is there."""
    if notice is None:
        return prepare

    def prepare_and_tell() -> T:
        began = time.monotonic()
        try:
            run = prepare()
        except BaseException:
            notice.add(" it could not be started.")
            raise
        seconds = time.monotonic() - began
        notice.add(f" ready in {seconds:.1f} s. %swarm status shows it, %swarm join INVITE uses another.")
        return run

    return prepare_and_tell
