"""What the DHT nodes of a swarm agree to store: signed records of servers and of who teaches, nothing else."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable
from typing import Any

import msgspec
from hivemind.dht.routing import DHTID
from hivemind.dht.validation import DHTRecord, RecordValidatorBase

from nbrunner.errors import BadPeerDataError
from nbrunner.protocol.limits import MAX_RECORD_LIFETIME
from nbrunner.protocol.records import ServerRecord, open_record, servers_key
from nbrunner.protocol.together import TeachingRecord, open_teaching, teaching_key

logger = logging.getLogger(__name__)

STORING_SKEW = 5.0  # seconds by which a writer's clock may be ahead of a storing node's
READING_SKEW = 120.0  # and of a reader's: wider, or a record that is good for one node would be bad for the next


MAX_TEACHING_RECORDS = 512
"""In all, on one node: whoever may use a swarm may file one, under as many identities as it makes."""


class SignedValidator(RecordValidatorBase):  # type: ignore[misc]
    """Refuses what is not a signed record under one key.

    hivemind asks with the key's hash, the subkey in msgpack, the value's bytes and the expiration. A plain value
    (subkey None) under our key is refused, or it would take the place of the whole dictionary.
    """

    def __init__(self, key: str, swarm: bytes) -> None:
        self._swarm = swarm
        self.key_id = DHTID.generate(key)
        self.key = self.key_id.to_bytes()

    def validate(self, record: DHTRecord) -> bool:
        if record.key != self.key:
            return False
        try:
            peer = msgspec.msgpack.decode(record.subkey, type=str)
            self.open(peer, record.value, record.expiration_time, skew=STORING_SKEW)
        except (msgspec.DecodeError, UnicodeDecodeError, BadPeerDataError) as error:
            logger.debug("record refused: %s", error)
            return False
        return True

    def open(self, peer: str, value: bytes, expires: float, *, skew: float = READING_SKEW) -> Any:
        """The record, or `BadPeerDataError`.

        Whether a record is good must not change while it is stored: one that turned bad would make nodes refuse
        every dictionary it is in. So the credential has to be good until the record expires, and an expired
        record passes; whoever uses records looks at the time.
        """
        if not expires <= time.time() + MAX_RECORD_LIFETIME + skew:
            raise BadPeerDataError(f"record expires {expires - time.time():.0f} s from now", peer=peer)
        return self._open(peer, value, expires)

    def _open(self, peer: str, value: bytes, expires: float) -> Any:
        raise NotImplementedError

    def merge_with(self, other: RecordValidatorBase) -> bool:
        return False


class RecordValidator(SignedValidator):
    """For the servers' records."""

    def __init__(self, swarm: bytes) -> None:
        super().__init__(servers_key(swarm), swarm)

    def _open(self, peer: str, value: bytes, expires: float) -> ServerRecord:
        return open_record(value, peer_id=peer, swarm=self._swarm, expires=expires, now=expires)


class TeachingValidator(SignedValidator):
    """For the records of who teaches; an invite to use the swarm is enough, so their number has a bound."""

    def __init__(self, swarm: bytes) -> None:
        super().__init__(teaching_key(swarm), swarm)
        self._held: dict[str, float] = {}

    def validate(self, record: DHTRecord) -> bool:
        if not super().validate(record):
            return False
        peer = msgspec.msgpack.decode(record.subkey, type=str)
        now = time.time()
        if peer not in self._held and len(self._held) >= MAX_TEACHING_RECORDS:
            self._held = {one: until for one, until in self._held.items() if until > now}
            if len(self._held) >= MAX_TEACHING_RECORDS:
                logger.warning("%d peers teach in this swarm: no more are taken", len(self._held))
                return False
        self._held[peer] = max(record.expiration_time, self._held.get(peer, 0.0))
        return True

    def _open(self, peer: str, value: bytes, expires: float) -> TeachingRecord:
        return open_teaching(value, peer_id=peer, swarm=self._swarm, expires=expires, now=expires)


class DirectoryValidator(RecordValidatorBase):  # type: ignore[misc]
    """One validator for each key; nothing is stored under any other.

    hivemind's own composite asks all of them about every record, and ours each know one key only.
    """

    def __init__(self, validators: Iterable[SignedValidator]) -> None:
        self._validators = {one.key: one for one in validators}

    def validate(self, record: DHTRecord) -> bool:
        validator = self._validators.get(record.key)
        return validator is not None and validator.validate(record)

    def merge_with(self, other: RecordValidatorBase) -> bool:
        return False
