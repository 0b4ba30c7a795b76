"""A training run whose adapter several people teach: what `nbrunner.finetune(together=NAME)` adds to it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nbrunner.client.receipt import model_facts
from nbrunner.errors import UserInputError
from nbrunner.protocol.credentials import Invite
from nbrunner.protocol.identity import short_peer
from nbrunner.tuning.hooks import NamedParameters, Participant
from nbrunner.tuning.settings import Settings
from nbrunner.tuning.together import Participant as Teacher
from nbrunner.tuning.together import Together


class TogetherHook:
    """Averages with the others after steps of a run, and meets them at its end.

    Attributes
    ----------
    together : Together
        Joined already: from now on the parameters are those of the others, if there are any.
    """

    def __init__(self, together: Together) -> None:
        self.together = together

    @classmethod
    def join(
        cls,
        name: str,
        model: Any,
        parameters: NamedParameters,
        settings: Settings,
        options: Mapping[str, Any] | None = None,
    ) -> TogetherHook:
        """Join those who teach under a name, in the swarm that a model is in.

        Raises
        ------
        UserInputError
            No swarm, an option that does not exist, or others who teach something else under this name.
        SwarmError, ServerStartError
            The swarm cannot be joined.
        """
        chosen = dict(options or {})
        invite = chosen.pop("invite", None) or invite_of(model)
        if invite is None:
            raise UserInputError(
                "this model is in no swarm in which others could be found: pass "
                "together_options={'invite': …}, or teach a model from AutoDistributedModelForCausalLM."
            )
        try:
            together = Together(invite, name, dict(parameters), method=method_of(model, settings), **chosen)
        except TypeError as error:
            raise UserInputError(f"together_options: {error}") from None
        return cls(together.start())

    # -- as StepHook ----------------------------------------------------------------------------------------------

    def begin(self, parameters: NamedParameters, step: int) -> None:
        self.together.resume()

    def before_step(self, parameters: NamedParameters, step: int, samples: int) -> None:
        pass

    def after_step(self, parameters: NamedParameters, step: int, samples: int) -> None:
        self.together.after_step(samples)

    def complete(self, parameters: NamedParameters) -> None:
        self.together.finish()

    def waits(self, paused: bool) -> None:
        (self.together.pause if paused else self.together.resume)()

    def stops(self) -> None:
        self.together.hurry()

    def end(self, parameters: NamedParameters) -> None:
        self.together.close()

    def participants(self) -> Sequence[Participant]:
        return [_shown(one) for one in self.together.participants()]


def invite_of(model: Any) -> Invite | None:
    """The invite by which a distributed model is in its swarm, with the servers' addresses of now."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    swarm = getattr(getattr(base, "runner", None), "swarm", None)
    if swarm is None:
        return None
    invite: Invite = swarm.invite
    servers = swarm.directory.view.servers.items()
    now = [f"{address}/p2p/{peer}" for peer, entry in servers for address in entry.record.addresses]
    return invite.with_addresses([*dict.fromkeys([*invite.addresses, *now])][:16])


def method_of(model: Any, settings: Settings) -> str:
    """What must be the same beside names and shapes: the method, LoRA's scale, the model and its revision."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    scale = f", rank {settings.lora_rank}, alpha {settings.lora_alpha:g}" if settings.lora_rank else ""
    facts = model_facts(base)
    return f"{settings.method}{scale} on {facts['uid'] or facts['type']}"[:200]


def _shown(one: Teacher) -> Participant:
    words = [one.state]
    if one.round:
        words.append(f"round {one.round}")
    if one.behind:
        words.append(f"{one.behind} behind")
    if one.share:
        words.append(f"{one.share:.0%} of the last average")
    if one.clipped:
        words.append(f"{one.clipped} parts shortened")
    if one.refused:
        words.append(f"left out: {one.refused}")
    name = one.name or short_peer(one.peer)
    state = "offline" if one.state in ("left", "lost") else "online"
    return Participant(f"{name} (you)" if one.you else name, state, one.steps, one.samples, ", ".join(words))
