"""What the DHT nodes of a swarm agree to store: signed records of its servers, and nothing else."""

from __future__ import annotations

import logging
import time

import msgspec
from hivemind.dht.routing import DHTID
from hivemind.dht.validation import DHTRecord, RecordValidatorBase

from nbrunner.errors import BadPeerDataError
from nbrunner.protocol.limits import MAX_RECORD_LIFETIME
from nbrunner.protocol.records import ServerRecord, open_record, servers_key

logger = logging.getLogger(__name__)

STORING_SKEW = 5.0  # seconds by which a writer's clock may be ahead of a storing node's
READING_SKEW = 120.0  # and of a reader's: wider, or a record that is good for one node would be bad for the next


class RecordValidator(RecordValidatorBase):  # type: ignore[misc]
    """Refuses what is not a signed record under the swarm's one key.

    hivemind asks with the key's hash, the subkey in msgpack, the value's bytes and the expiration. A plain value
    (subkey None) under our key is refused, or it would take the place of the whole dictionary.
    """

    def __init__(self, swarm: bytes) -> None:
        self._swarm = swarm
        self.key_id = DHTID.generate(servers_key(swarm))
        self._key = self.key_id.to_bytes()

    def validate(self, record: DHTRecord) -> bool:
        if record.key != self._key:
            return False
        try:
            peer = msgspec.msgpack.decode(record.subkey, type=str)
            self.open(peer, record.value, record.expiration_time, skew=STORING_SKEW)
        except (msgspec.DecodeError, UnicodeDecodeError, BadPeerDataError) as error:
            logger.debug("record refused: %s", error)
            return False
        return True

    def open(self, peer: str, value: bytes, expires: float, *, skew: float = READING_SKEW) -> ServerRecord:
        """The record, or `BadPeerDataError`.

        Whether a record is good must not change while it is stored: one that turned bad would make nodes refuse
        every dictionary it is in. So the credential has to be good until the record expires, and an expired
        record passes; whoever uses records looks at the time.
        """
        if not expires <= time.time() + MAX_RECORD_LIFETIME + skew:
            raise BadPeerDataError(f"record expires {expires - time.time():.0f} s from now", peer=peer)
        return open_record(value, peer_id=peer, swarm=self._swarm, expires=expires, now=expires)

    def merge_with(self, other: RecordValidatorBase) -> bool:
        return False
