"""Only members of a swarm take part in its DHT: each request and answer is signed and carries a credential.

Without this a stranger could not forge records (they are signed), but could list the servers, fill routing tables,
and be asked in place of honest nodes. hivemind has a hook for it, `AuthorizerBase`, with RSA tokens in mind; the
fields of its `AccessToken` here hold our PeerID and credential.
"""

from __future__ import annotations

import logging
import os
import time
from typing import Any

from hivemind.proto.auth_pb2 import AccessToken
from hivemind.utils.auth import AuthorizerBase

from nbrunner.errors import InviteError, UserInputError
from nbrunner.protocol.credentials import Role, check_credential
from nbrunner.protocol.identity import Identity, public_key_of, short_peer, signature_is_valid

logger = logging.getLogger(__name__)

_MAX_AGE = 600.0  # seconds, and so much that clocks may differ
_MAX_CHECKED = 4096
_CHECKED_SECONDS = 60.0
_REQUEST = b"nbrunner dht request 1\0"
_RESPONSE = b"nbrunner dht response 1\0"


class MembershipAuthorizer(AuthorizerBase):  # type: ignore[misc]
    """Signs what we send to DHT nodes, and refuses what is not from members.

    Parameters
    ----------
    identity, credential
        Ours.
    swarm
        Public key of the swarm.
    """

    def __init__(self, identity: Identity, credential: bytes, swarm: bytes) -> None:
        self._identity = identity
        self._swarm = swarm
        self._token = AccessToken(username=identity.peer_id, public_key=credential)
        self._checked: dict[tuple[str, bytes, Role], float] = {}

    async def sign_request(self, request: Any, service_public_key: object) -> None:
        request.auth.client_access_token.CopyFrom(self._token)
        request.auth.time = time.time()
        request.auth.nonce = os.urandom(8)
        request.auth.signature = b""
        request.auth.signature = self._identity.sign(_REQUEST + request.SerializeToString(deterministic=True))

    async def validate_request(self, request: Any) -> bool:
        if abs(request.auth.time - time.time()) > _MAX_AGE:
            return False
        return self._signed_by_member(request, request.auth.client_access_token, _REQUEST, "use")

    async def sign_response(self, response: Any, request: Any) -> None:
        response.auth.service_access_token.CopyFrom(self._token)
        response.auth.nonce = request.auth.nonce
        response.auth.signature = b""
        response.auth.signature = self._identity.sign(_RESPONSE + response.SerializeToString(deterministic=True))

    async def validate_response(self, response: Any, request: Any) -> bool:
        if response.auth.nonce != request.auth.nonce:
            return False
        return self._signed_by_member(response, response.auth.service_access_token, _RESPONSE, "host")

    def _signed_by_member(self, message: Any, token: Any, purpose: bytes, role: Role) -> bool:
        signature = message.auth.signature
        message.auth.signature = b""
        try:
            self._check(token.username, token.public_key, role)
            key = public_key_of(token.username)
        except (InviteError, UserInputError) as error:
            logger.debug("DHT message of %s refused: %s", short_peer(token.username), error)
            return False
        return signature_is_valid(key, purpose + message.SerializeToString(deterministic=True), signature)

    def _check(self, peer: str, credential: bytes, role: Role) -> None:
        """`check_credential`, remembered for a minute: it verifies two more signatures."""
        now = time.monotonic()
        key = (peer, credential, role)
        if self._checked.get(key, 0.0) > now:
            return
        check_credential(credential, swarm=self._swarm, peer_id=peer, role=role)
        if len(self._checked) >= _MAX_CHECKED:
            self._checked.clear()
        self._checked[key] = now + _CHECKED_SECONDS
