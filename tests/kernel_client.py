"""A real Jupyter kernel: run code, collect what it says with times, interrupt it, click its buttons."""

from __future__ import annotations

import queue
import time
from dataclasses import dataclass, field
from typing import Any

from jupyter_client.manager import start_new_kernel


@dataclass
class Output:
    """One message of a cell: seconds since the cell was sent, its type, its content."""

    seconds: float
    kind: str
    content: dict[str, Any]

    @property
    def plain(self) -> str:
        """Its text/plain, or what it printed."""
        if self.kind == "stream":
            return self.content["text"]
        return self.content.get("data", {}).get("text/plain", "")

    @property
    def display_id(self) -> str | None:
        return self.content.get("transient", {}).get("display_id")


@dataclass
class Ran:
    """A cell that has ended."""

    outputs: list[Output] = field(default_factory=list)
    status: str = ""
    seconds: float = 0.0

    @property
    def text(self) -> str:
        return "\n".join(one.plain for one in self.outputs)

    @property
    def printed(self) -> str:
        """What it printed, without what it or a cell in the background displayed."""
        return "".join(one.plain for one in self.outputs if one.kind == "stream")

    @property
    def final(self) -> list[str]:
        """The displays as a notebook would store them: the last state of each, in order of appearance."""
        states: dict[str, str] = {}
        for index, one in enumerate(self.outputs):
            if one.kind in ("display_data", "update_display_data", "execute_result", "stream"):
                states[one.display_id or str(index)] = one.plain
        return list(states.values())

    @property
    def traceback(self) -> list[str]:
        return [line for one in self.outputs if one.kind == "error" for line in one.content["traceback"]]


class Kernel:
    """A kernel of this interpreter's environment."""

    def __init__(self) -> None:
        self.manager, self.client = start_new_kernel(kernel_name="python3")
        self._sent = 0.0
        self._message = ""

    def start(self, code: str) -> str:
        """Send a cell and return at once."""
        self._sent = time.monotonic()
        self._message = self.client.execute(code)
        return self._message

    def next_output(self, message: str, timeout: float) -> Output | None:
        """The next output of a cell; None when it is idle again."""
        deadline = time.monotonic() + timeout
        while True:
            try:
                got = self.client.get_iopub_msg(timeout=max(0.01, deadline - time.monotonic()))
            except queue.Empty:
                raise AssertionError(f"the cell said nothing for {timeout} s") from None
            if got["parent_header"].get("msg_id") != message:
                continue
            kind, content = got["msg_type"], got["content"]
            if kind == "status" and content["execution_state"] == "idle":
                return None
            if kind not in ("status", "execute_input"):
                return Output(time.monotonic() - self._sent, kind, content)

    def finish(self, timeout: float = 60.0, message: str | None = None) -> Ran:
        """Collect until the cell is idle."""
        message = message or self._message
        ran = Ran()
        while (output := self.next_output(message, timeout)) is not None:
            ran.outputs.append(output)
        ran.seconds = time.monotonic() - self._sent
        deadline = time.monotonic() + 10
        while True:
            reply = self.client.get_shell_msg(timeout=max(0.01, deadline - time.monotonic()))
            if reply["parent_header"].get("msg_id") == message:
                ran.status = reply["content"]["status"]
                return ran

    def run(self, code: str, timeout: float = 60.0) -> Ran:
        self.start(code)
        return self.finish(timeout)

    def value(self, expression: str) -> Any:
        """The value of an expression of literals, in the kernel."""
        import ast

        ran = self.run(f"print(repr({expression}))")
        assert ran.status == "ok", ran.traceback
        return ast.literal_eval(ran.printed.strip())

    def interrupt(self) -> None:
        self.manager.interrupt_kernel()

    def click(self, comm: str) -> None:
        """What a frontend sends when the button with this comm is pressed."""
        content = {"comm_id": comm, "data": {"method": "custom", "content": {"event": "click"}}}
        self.client.shell_channel.send(self.client.session.msg("comm_msg", content))

    def close(self) -> None:
        """Ask it to end, as Jupyter does: a killed one leaves the folder of its sockets to the next start."""
        self.manager.shutdown_kernel()
        self.client.stop_channels()
