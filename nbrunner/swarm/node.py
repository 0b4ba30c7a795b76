"""A process's presence in a swarm: its identity, its p2p daemon, its DHT node, and streams to and from peers."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import weakref
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nbrunner.errors import (
    BadPeerDataError,
    BootstrapError,
    InviteError,
    NBRunnerError,
    PeerError,
    PeerRefusedError,
    PeerUnreachableError,
    SessionError,
    UserInputError,
)
from nbrunner.protocol.credentials import Invite, SwarmKey, Terms, check_credential
from nbrunner.protocol.greeting import FEATURES, STREAM, VERSION, Hello, Shortcut, Welcome
from nbrunner.protocol.identity import Identity, short_peer
from nbrunner.protocol.limits import MAX_RECORD_LIFETIME, Limits
from nbrunner.protocol.records import ServerRecord, sign_record
from nbrunner.protocol.refusals import Refused
from nbrunner.protocol.together import TeachingRecord, sign_teaching
from nbrunner.swarm import control, shortcut
from nbrunner.swarm.daemon import Daemon, join, split_address, start_p2p
from nbrunner.swarm.greeting import introduce, other_version, refuse, software
from nbrunner.swarm.shortcut import Doorkeeper
from nbrunner.swarm.streams import SCRATCH_BYTES, FrameProtocol, Stream

if TYPE_CHECKING:
    from nbrunner.swarm.records import Held, RecordStore

logger = logging.getLogger(__name__)

StreamHandler = Callable[[Stream], Awaitable[None]]

_HELLO_SECONDS = 10.0
_REJOIN_PERIOD = 3.0
_MAX_UNGREETED = 128  # streams of one peer that have not said Hello yet
_MAX_STREAMS_PER_PEER = 512
_REACH_SECONDS = 3.0


class Node:
    """One peer of a swarm. Make one with `Node.create`.

    Attributes
    ----------
    peer_id : str
    identity : Identity
    swarm : bytes
        Public key of the swarm.
    terms : Terms
        What our invite allows.
    credential : bytes
        What we show to other peers.
    addresses : list of str
        Multiaddresses where others reach us, each ending in ``/p2p/PEERID``; empty for clients.
    """

    def __init__(
        self,
        daemon: Daemon,
        identity: Identity,
        swarm: bytes,
        terms: Terms,
        credential: bytes,
        bootstrap: list[str],
        *,
        offer_shortcut: bool = False,
    ) -> None:
        self.identity = identity
        self.peer_id = identity.peer_id
        self.swarm = swarm
        self.terms = terms
        self.credential = credential
        self.addresses: list[str] = []
        self._daemon = daemon
        self._bootstrap = bootstrap
        self._offer_shortcut = offer_shortcut
        self._records: RecordStore[ServerRecord] | None = None
        self._teachers: RecordStore[TeachingRecord] | None = None
        self._scratch = memoryview(bytearray(SCRATCH_BYTES))
        self._protocols: weakref.WeakSet[FrameProtocol] = weakref.WeakSet()
        self._tasks: set[asyncio.Task[None]] = set()
        self._ungreeted: Counter[str] = Counter()
        self._rejoined_at = float("-inf")
        self._streams_of: Counter[str] = Counter()
        self._servers: list[asyncio.Server] = []
        self._doorkeeper: Doorkeeper | None = None
        self._shortcuts: dict[str, Shortcut] = {}
        self._last_expiry = 0.0
        self._closed = False
        self._closing: asyncio.Task[None] | None = None

    @classmethod
    async def create(
        cls,
        *,
        invite: Invite | None = None,
        identity: Identity | None = None,
        swarm_key: SwarmKey | None = None,
        listen: Sequence[str] = ("/ip4/127.0.0.1/tcp/0",),
        announce: Sequence[str] | None = None,
        client_mode: bool = False,
    ) -> Node:
        """Start a p2p daemon and join a swarm, or begin one.

        Parameters
        ----------
        invite
            Of the swarm to join.
        identity
            Who to be; a new identity if None.
        swarm_key
            Begin a swarm (or come back to it as its creator): the node makes its own credential. Addresses of an
            invite given too are used to find the others.
        listen, announce
            Multiaddresses to listen on, and those to tell to others if they differ (nobody then comes another way).
        client_mode
            Use the swarm only: nobody can open streams to this node, and it stores nothing for others.

        Raises
        ------
        UserInputError, InviteError
            Nothing to join, or an address that makes no sense.
        ServerStartError
            The daemon did not start, for example because the port is in use.
        BootstrapError
            None of the invite's addresses answered.
        """
        identity = identity or Identity.generate()
        if swarm_key is not None:
            invite_used = swarm_key.invite([], role="host")
            if invite is not None and invite.swarm != swarm_key.public:
                raise UserInputError("the invite is of another swarm than the swarm key")
        elif invite is not None:
            invite_used = invite
        else:
            raise UserInputError("no swarm to join: pass an invite, or a swarm key to begin a swarm")
        bootstrap = list(invite.addresses) if invite is not None else []
        if swarm_key is None and not bootstrap:
            raise InviteError("this invite names no address of a peer; ask for a new one.")
        for address in bootstrap:
            try:
                split_address(address)
            except UserInputError as error:
                raise InviteError(f"this invite names an address that makes no sense: {error}") from None
        credential = invite_used.credential(identity.peer_id).encode()
        daemon = await start_p2p(identity, listen=listen, announce=announce, client_mode=client_mode)
        node = cls(
            daemon,
            identity,
            invite_used.swarm,
            invite_used.terms,
            credential,
            bootstrap,
            offer_shortcut=announce is None and shortcut.allowed(),
        )
        node._start(node._end_with_daemon(), "daemon")
        try:
            reached = await join(daemon, bootstrap)
            if not client_mode:
                node.addresses = [str(address) for address in await daemon.p2p.get_visible_maddrs(latest=True)]
            await node._join_dht(reached, client_mode=client_mode)
        except BaseException:
            await node.close()
            raise
        return node

    async def _join_dht(self, reached: list[str], *, client_mode: bool) -> None:
        from nbrunner.swarm.membership import MembershipAuthorizer
        from nbrunner.swarm.records import RecordStore
        from nbrunner.swarm.validator import RecordValidator, TeachingValidator

        teaching = TeachingValidator(self.swarm)
        self._records = await RecordStore.create(
            self._daemon.p2p,
            [RecordValidator(self.swarm), teaching],
            MembershipAuthorizer(self.identity, self.credential, self.swarm),
            reached,
            self._reach,
            # Others believe only hosts; as a node nobody believes we would cost everyone a request in vain.
            client_mode=client_mode or self.terms.role != "host",
        )
        self._teachers = self._records.beside(teaching)
        if reached and self._records.alone:
            await self._tell_why_refused([split_address(address)[1] for address in reached])

    async def _tell_why_refused(self, peers: list[str]) -> None:
        """No node took us in, though they are up: a stream gets an answer with a reason."""
        for peer in peers:
            try:
                (await self.open_stream(peer)).close()
            except PeerRefusedError:
                raise
            except PeerError as error:
                logger.debug("no reason from %s: %s", short_peer(peer), error)
        raise BootstrapError(
            "peers of this swarm can be reached, but their directory does not answer us. Are both sides' clocks "
            "right, and is the same version of nbrunner installed?",
            addresses=peers,
        )

    @property
    def closed(self) -> bool:
        """Whether it was closed, or its daemon died: nothing goes through it any more."""
        return self._closed or self._daemon.exited.is_set()

    def _start(self, job: Coroutine[Any, Any, None], name: str) -> None:
        task = asyncio.get_running_loop().create_task(job, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _end_with_daemon(self) -> None:
        """Without a daemon we are out of the swarm: streams that go past it end as well."""
        await self._daemon.exited.wait()
        for protocol in list(self._protocols):
            protocol.close()

    async def wait_lost(self) -> str:
        """Wait until the daemon ends without being asked to, and return the end of its log."""
        await self._daemon.exited.wait()
        return self._daemon.log

    # -- streams --------------------------------------------------------------------------------------------------

    async def open_stream(self, peer: str, *, timeout: float = 5.0) -> Stream:
        """Open a stream and be welcomed on it.

        Parameters
        ----------
        peer
            PeerID.
        timeout
            Seconds for all of it.

        Raises
        ------
        PeerUnreachableError
            No connection, or no answer in time.
        PeerRefusedError
            It does not take us, and why; or it speaks another version.
        BadPeerDataError
            It answered with something else.
        """
        self._check_open()
        try:
            async with asyncio.timeout(timeout):
                try:
                    return await self._open(peer)
                except control.NoRouteError:
                    # libp2p's routing does not find a third to a half of the peers that joined after us, where they
                    # listen on more than loopback (measured; an explicit connection always works), and knows old
                    # addresses of those that moved: go by the addresses in the peer's own record.
                    await self._connect_by_record(peer)
                    return await self._open(peer)
        except TimeoutError:
            raise PeerUnreachableError(
                f"peer {short_peer(peer)} did not answer within {timeout:.1f} s", peer=peer
            ) from None
        except (ConnectionError, FileNotFoundError) as error:
            raise PeerUnreachableError(f"our own p2p daemon does not answer: {error}", peer=peer) from None

    async def connect(self, peer: str, addresses: Sequence[str], *, timeout: float = 5.0) -> None:
        """Connect to a peer at multiaddresses without their ``/p2p/PEERID`` part.

        Raises
        ------
        PeerUnreachableError
        """
        self._check_open()
        try:
            async with asyncio.timeout(timeout):
                await control.connect(self._daemon.socket, peer, list(addresses))
        except (control.ControlError, TimeoutError, OSError) as error:
            raise PeerUnreachableError(
                f"peer {short_peer(peer)} cannot be reached: {error or 'no answer'}", peer=peer
            ) from None

    @property
    def folder(self) -> Path:
        """A private directory that goes when this node does."""
        return self._daemon.folder

    @property
    def p2p(self) -> Any:
        """Hivemind's client of our daemon, for what of hivemind runs over it."""
        self._check_open()
        return self._daemon.p2p

    async def _connect_by_record(self, peer: str) -> None:
        if not self._store().addresses.get(peer):
            await self.fetch_held()
        try:
            await control.connect(self._daemon.socket, peer, self._store().addresses.get(peer, []))
        except control.ControlError as error:
            raise PeerUnreachableError(f"peer {short_peer(peer)} cannot be reached: {error}", peer=peer) from None

    async def _reach(self, peer: str) -> bool:
        """Connect to a DHT node by the addresses in its record, if it has one."""
        addresses = self._records.addresses.get(peer) if self._records is not None else None
        if not addresses:
            return False
        try:
            async with asyncio.timeout(_REACH_SECONDS):
                await control.connect(self._daemon.socket, peer, addresses)
        except (control.ControlError, TimeoutError, OSError):
            return False
        return True

    async def _open(self, peer: str) -> Stream:
        known = self._shortcuts.get(peer)
        if known is not None:
            stream = await self._open_near(peer, known)
            if stream is not None:
                return stream
        protocol = FrameProtocol(self._scratch)
        stream = await self._begin(peer, protocol, self._daemon.socket, control.open_stream_request(peer, STREAM))
        try:
            control.read_open_reply(await protocol.started(), peer)
            await introduce(stream, self.swarm, self.credential)
            offered = stream.welcome.shortcut
            near = await self._open_near(peer, offered) if offered is not None else None
        except BaseException:
            stream.close()
            raise
        if near is None:
            return stream
        stream.close()
        return near

    async def _open_near(self, peer: str, offered: Shortcut) -> Stream | None:
        """A stream to a process of this machine, past the daemons; None if that is not possible (any more)."""
        self._shortcuts.pop(peer, None)
        path = shortcut.find(offered) if shortcut.allowed() else None
        if path is None:
            return None
        stream = None
        try:
            protocol = FrameProtocol(self._scratch, begun=True)
            stream = await self._begin(peer, protocol, str(path), shortcut.knock(offered, self.peer_id))
            await introduce(stream, self.swarm, self.credential)
        except (OSError, PeerUnreachableError) as error:
            logger.debug("no shortcut to %s: %s", short_peer(peer), error)
            if stream is not None:
                stream.close()
            return None
        except BaseException:
            if stream is not None:
                stream.close()
            raise
        self._shortcuts[peer] = offered
        return stream

    async def _begin(self, peer: str, protocol: FrameProtocol, path: str, first: bytes) -> Stream:
        loop = asyncio.get_running_loop()
        await loop.create_unix_connection(lambda: protocol, path)
        self._protocols.add(protocol)
        protocol.write([first])
        return Stream(protocol, peer)

    async def serve(self, handler: StreamHandler, limits: Limits) -> None:
        """Take streams from peers of the swarm from now on.

        Parameters
        ----------
        handler
            Called with each stream, after its opener showed a good credential. `PeerRefusedError` and
            `BadPeerDataError` that it raises are sent to the peer; the stream is closed when it returns.
        limits
            Announced, and enforced on frames.
        """
        self._check_open()
        if self._servers:
            raise SessionError("this node serves already")
        path = self._daemon.folder / "streams.sock"
        await self._listen(path, control.read_incoming, handler, limits)
        if self._offer_shortcut:
            self._doorkeeper = Doorkeeper(self.peer_id, self._daemon.folder)
            await self._listen(self._doorkeeper.path, self._doorkeeper.recognise, handler, limits)
        await control.register_handler(self._daemon.socket, STREAM, str(path))

    async def _listen(
        self, path: Path, recognise: Callable[[bytes], str], handler: StreamHandler, limits: Limits
    ) -> None:
        """Take streams at a socket; the first message on each says whose it is."""
        loop = asyncio.get_running_loop()

        def make() -> FrameProtocol:
            protocol = FrameProtocol(self._scratch)
            protocol.first_only = True  # nothing else is read before the Hello is accepted
            protocol.max_body = 0
            self._protocols.add(protocol)
            self._start(self._accept(protocol, recognise, handler, limits), "stream")
            return protocol

        self._servers.append(await loop.create_unix_server(make, str(path)))

    async def _accept(
        self, protocol: FrameProtocol, recognise: Callable[[bytes], str], handler: StreamHandler, limits: Limits
    ) -> None:
        try:
            async with asyncio.timeout(_HELLO_SECONDS):
                peer = recognise(await protocol.started())
        except (TimeoutError, ConnectionError, control.ControlError):
            protocol.close()
            return
        stream = Stream(protocol, peer)
        self._streams_of[peer] += 1
        try:
            if await self._greet(stream, protocol, limits):
                await self._handle(stream, handler)
        except PeerError as error:
            logger.debug("stream of %s ended: %s", short_peer(peer), error)
        finally:
            self._streams_of[peer] -= 1
            if self._streams_of[peer] <= 0:
                del self._streams_of[peer]
            stream.close()

    async def _greet(self, stream: Stream, protocol: FrameProtocol, limits: Limits) -> bool:
        """Check who opened a stream; False if it was refused."""
        peer = stream.peer
        if self._ungreeted[peer] >= _MAX_UNGREETED or self._streams_of[peer] > _MAX_STREAMS_PER_PEER:
            return await refuse(stream, Refused("limit", "too many streams are open", 5.0))
        self._ungreeted[peer] += 1
        try:
            async with asyncio.timeout(_HELLO_SECONDS):
                hello, _ = await stream.receive()
        except TimeoutError:
            return False
        except BadPeerDataError as error:
            return await refuse(stream, Refused("schema", str(error)))
        finally:
            self._ungreeted[peer] -= 1
            if self._ungreeted[peer] <= 0:
                del self._ungreeted[peer]
        if not isinstance(hello, Hello):
            return await refuse(stream, Refused("schema", "the first frame must be Hello"))
        if hello.version != VERSION:
            return await refuse(stream, Refused("version", other_version(hello.version, hello.software)))
        try:
            if hello.swarm != self.swarm:
                raise InviteError("this peer belongs to another swarm than your invite.")
            stream.terms = check_credential(hello.credential, swarm=self.swarm, peer_id=stream.peer)
        except InviteError as error:
            return await refuse(stream, Refused("credential", str(error)))
        protocol.max_body = limits.frame_bytes
        offer = self._doorkeeper.offer(peer, hello.machine) if self._doorkeeper is not None else None
        await stream.send(Welcome(VERSION, limits, software(), list(FEATURES), offer))
        protocol.accept_all()
        return True

    async def _handle(self, stream: Stream, handler: StreamHandler) -> None:
        try:
            await handler(stream)
        except PeerRefusedError as error:
            await refuse(stream, Refused(error.code or "internal", str(error)[:2000], error.retry_after))  # type: ignore[arg-type]
        except BadPeerDataError as error:
            await refuse(stream, Refused("schema", str(error)[:2000]))
        except (NBRunnerError, asyncio.CancelledError):
            raise
        except Exception:
            logger.exception("a handler failed on a stream of %s", short_peer(stream.peer))
            await refuse(stream, Refused("internal", "this server has made a mistake; its log says more"))

    # -- records --------------------------------------------------------------------------------------------------

    async def publish(self, record: ServerRecord, *, lifetime: float = 60.0) -> bool:
        """File our record in the DHT for ``lifetime`` seconds; False if no node took it.

        Raises
        ------
        InviteError
            Our invite does not allow hosting, or ends before the record would.
        """
        self._check_open()
        if self.terms.role != "host":
            raise InviteError("this invite lets you use the swarm, not host blocks; ask for one with role 'host'.")
        if self.terms.expired():
            raise InviteError("the invite has expired; ask the swarm's creator for a new one.")
        now = time.time()
        # The latest expiration wins in a DHT, so a record must outlive the one it replaces, if only by a little.
        expires = max(now + min(lifetime, MAX_RECORD_LIFETIME), self._last_expiry + 0.001)
        self._last_expiry = expires
        data = sign_record(
            record, identity=self.identity, credential=self.credential, swarm=self.swarm, expires=expires
        )
        return await self._store().publish(data, expires) > 0

    async def fetch_records(self) -> dict[str, ServerRecord]:
        """The records of all servers, by PeerID, as the nodes hold them now."""
        return {peer: held.record for peer, held in (await self.fetch_held())[0].items()}

    async def fetch_held(self) -> tuple[dict[str, Held[ServerRecord]], int]:
        """The records with their expirations, and how many other nodes were heard."""
        self._check_open()
        held, heard = await self._store().fetch()
        if not heard and self._bootstrap and time.monotonic() - self._rejoined_at > _REJOIN_PERIOD:
            self._rejoined_at = time.monotonic()
            held, heard = await self._rejoin(held)
        return held, heard

    async def _rejoin(self, held: dict[str, Held[ServerRecord]]) -> tuple[dict[str, Held[ServerRecord]], int]:
        """Nobody was heard: after sleep or a change of network the first addresses may work again."""
        with contextlib.suppress(NBRunnerError):
            for address in await join(self._daemon, self._bootstrap):
                await self._store().ping(split_address(address)[1])
            return await self._store().fetch()
        return held, 0

    async def publish_teaching(self, record: TeachingRecord, *, lifetime: float = 60.0) -> bool:
        """File in the DHT that we teach, for ``lifetime`` seconds; False if no node took it."""
        self._check_open()
        if self.terms.expired():
            raise InviteError("the invite has expired; ask the swarm's creator for a new one.")
        now = time.time()
        expires = max(now + min(lifetime, MAX_RECORD_LIFETIME), self._last_expiry + 0.001)
        self._last_expiry = expires
        data = sign_teaching(
            record, identity=self.identity, credential=self.credential, swarm=self.swarm, expires=expires
        )
        return self._teachers is not None and await self._teachers.publish(data, expires) > 0

    async def fetch_teaching(self) -> dict[str, TeachingRecord]:
        """Who teaches in this swarm, by PeerID."""
        self._check_open()
        if self._teachers is None:
            raise SessionError("the node has not joined the swarm yet")
        held, _ = await self._teachers.fetch()
        return {peer: one.record for peer, one in held.items()}

    def _store(self) -> RecordStore[ServerRecord]:
        if self._records is None:
            raise SessionError("the node has not joined the swarm yet")
        return self._records

    def _check_open(self) -> None:
        if self._closed:
            raise SessionError("this node is closed")
        if self._daemon.exited.is_set():
            raise PeerUnreachableError(
                "our own p2p daemon has ended; connect to the swarm again", peer=self.peer_id
            )

    # -- end ------------------------------------------------------------------------------------------------------

    async def close(self) -> None:
        """Close all streams and end the daemon. May be called more than once."""
        if self._closing is None:
            self._closed = True
            self._closing = asyncio.create_task(self._close(), name="node-close")
        # Shielded: a caller that is cancelled must not leave a daemon behind.
        await asyncio.shield(self._closing)

    async def _close(self) -> None:
        for server in self._servers:
            server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for protocol in list(self._protocols):
            protocol.close()
        if self._records is not None and not self._daemon.exited.is_set():
            try:
                async with asyncio.timeout(1.0):
                    await self._records.close()
            except Exception as error:  # noqa: BLE001 - hivemind's own errors; the daemon ends next in any case
                logger.debug("the DHT node did not close: %r", error)
        await self._daemon.close()

    def __repr__(self) -> str:
        return f"<Node {short_peer(self.peer_id)}{', closed' if self.closed else ''}>"
