"""Slow links on one machine, for `benchmarks.wan`: processes that are milliseconds apart.

With root, each process gets a network namespace of its own with a TUN device, and a switch in user space carries
packets between them, each after its delay: real TCP over a real (slow) network, for kernels without ``netem``.
Without root, servers announce the address of a proxy in this process that delays what goes through it.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import fcntl
import heapq
import itertools
import os
import selectors
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NETWORK = "10.77.0"
_CLONE_NEWNET = 0x40000000
_TUNSETIFF = 0x400454CA
_IFF_TUN_NO_PI = 0x0001 | 0x1000
_MTU = 1500


def namespaces_possible() -> bool:
    """Whether this process may make network namespaces and TUN devices."""
    return sys.platform == "linux" and os.geteuid() == 0 and Path("/dev/net/tun").exists() and _has_ip()


def _has_ip() -> bool:
    try:
        return subprocess.run(["ip", "-V"], capture_output=True, check=False).returncode == 0
    except OSError:
        return False


class Namespaces:
    """Hosts ``10.77.0.1`` to ``10.77.0.N``, each in a namespace, joined by a switch that delays every packet.

    Parameters
    ----------
    hosts
        How many.
    one_way
        Seconds from any host to any other.
    megabits
        A second, that each host can receive; 0 for no limit.
    """

    def __init__(self, hosts: int, one_way: float, megabits: float) -> None:
        self._names = [f"nbrunner{os.getpid()}x{number}" for number in range(hosts)]
        self._one_way, self._seconds_per_byte = one_way, 8e-6 / megabits if megabits else 0.0
        self._tuns: list[int] = []
        self._stop = threading.Event()
        try:
            for number, name in enumerate(self._names):
                subprocess.run(["ip", "netns", "add", name], check=True, capture_output=True)
                self._tuns.append(_tun_in(name, f"{NETWORK}.{number + 1}"))
        except BaseException:
            self.close()
            raise
        self._thread = threading.Thread(target=self._switch, name="switch", daemon=True)
        self._thread.start()

    def command(self, host: int, command: list[str]) -> list[str]:
        """The command that runs another one on a host."""
        return ["ip", "netns", "exec", self._names[host], *command]

    def address(self, host: int) -> str:
        return f"{NETWORK}.{host + 1}"

    def close(self) -> None:
        self._stop.set()
        if hasattr(self, "_thread"):
            self._thread.join(2)
        for tun in self._tuns:
            os.close(tun)
        self._tuns.clear()
        for name in self._names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)

    def _switch(self) -> None:
        waiting: list[tuple[float, int, int, bytes]] = []
        numbers, free_at = itertools.count(), [0.0] * len(self._tuns)
        with selectors.DefaultSelector() as selector:
            for tun in self._tuns:
                selector.register(tun, selectors.EVENT_READ)
            while not self._stop.is_set():
                now = time.perf_counter()
                while waiting and waiting[0][0] <= now:
                    _, _, target, packet = heapq.heappop(waiting)
                    with contextlib.suppress(OSError):  # its queue is full: a packet is lost, as on any network
                        os.write(self._tuns[target], packet)
                pause = min(0.05, waiting[0][0] - time.perf_counter()) if waiting else 0.05
                for key, _ in selector.select(max(0.0, pause)):
                    for packet in _packets(key.fd):
                        target = _target(packet, len(self._tuns))
                        if target is None:
                            continue
                        now = time.perf_counter()
                        free_at[target] = max(free_at[target], now) + len(packet) * self._seconds_per_byte
                        heapq.heappush(waiting, (free_at[target] + self._one_way, next(numbers), target, packet))


def _packets(tun: int) -> Iterator[bytes]:
    for _ in range(256):
        try:
            yield os.read(tun, _MTU + 64)
        except BlockingIOError:
            return


def _target(packet: bytes, hosts: int) -> int | None:
    """Number of the host an IPv4 packet is for."""
    if len(packet) < 20 or packet[0] >> 4 != 4 or packet[16:19] != bytes(map(int, NETWORK.split("."))):
        return None
    return packet[19] - 1 if 1 <= packet[19] <= hosts else None


def _tun_in(namespace: str, address: str) -> int:
    """The file of a TUN device in a namespace, made in a thread of its own: entering one is for good."""
    made: list[Any] = []

    def work() -> None:
        try:
            with Path(f"/var/run/netns/{namespace}").open("rb") as place:
                if ctypes.CDLL(None, use_errno=True).setns(place.fileno(), _CLONE_NEWNET):
                    raise OSError(ctypes.get_errno(), "setns")
            tun = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
            fcntl.ioctl(tun, _TUNSETIFF, struct.pack("16sH22x", b"wan", _IFF_TUN_NO_PI))
            made.append(tun)
        except OSError as error:
            made.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    if isinstance(made[0], OSError):
        raise made[0]
    inside = ["ip", "-n", namespace]
    for command in (
        [*inside, "link", "set", "lo", "up"],
        [*inside, "addr", "add", f"{address}/24", "dev", "wan"],
        [*inside, "link", "set", "wan", "mtu", str(_MTU), "txqueuelen", "5000", "up"],
    ):
        subprocess.run(command, check=True, capture_output=True)
    tun: int = made[0]
    return tun


class Proxies:
    """Ports on loopback that lead to other ports, later: everything is delayed by ``one_way``, both ways."""

    def __init__(self, one_way: float, megabits: float) -> None:
        self._one_way, self._seconds_per_byte = one_way, 8e-6 / megabits if megabits else 0.0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxies", daemon=True)
        self._thread.start()

    def open(self, target: int) -> int:
        """A port that leads to ``target``."""
        return asyncio.run_coroutine_threadsafe(self._open(target), self._loop).result(10)

    def close(self) -> None:
        async def end() -> None:
            tasks = asyncio.all_tasks() - {asyncio.current_task()}
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        asyncio.run_coroutine_threadsafe(end(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5)
        self._loop.close()

    async def _open(self, target: int) -> int:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            try:
                far_reader, far_writer = await asyncio.open_connection("127.0.0.1", target)
            except OSError:
                writer.close()
                return
            await asyncio.gather(self._carry(reader, far_writer), self._carry(far_reader, writer))

        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        port: int = server.sockets[0].getsockname()[1]
        return port

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        queue: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()

        async def deliver() -> None:
            while True:
                due, data = await queue.get()
                await asyncio.sleep(due - self._loop.time())
                if not data:
                    writer.close()
                    return
                writer.write(data)
                await writer.drain()

        delivering, free_at = asyncio.create_task(deliver()), 0.0
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(65536):
                free_at = max(free_at, self._loop.time()) + len(data) * self._seconds_per_byte
                queue.put_nowait((free_at + self._one_way, data))
        queue.put_nowait((self._loop.time() + self._one_way, b""))
        with contextlib.suppress(ConnectionError):
            await delivering
