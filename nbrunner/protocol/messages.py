"""All the messages that peers send each other. ``docs/protocol.md`` tells who sends which, and when."""

from __future__ import annotations

from nbrunner.protocol.adapters import (
    AdapterInfo,
    AdapterOffered,
    AdapterStored,
    GetAdapter,
    OfferAdapter,
    PutAdapter,
    WithdrawAdapter,
)
from nbrunner.protocol.greeting import Hello, Welcome
from nbrunner.protocol.refusals import Refused
from nbrunner.protocol.requests import Backward, BackwardResult, Forward, ForwardResult, SummedGradients, TakeSum
from nbrunner.protocol.sessions import (
    Attached,
    AttachSession,
    CloseSession,
    Draining,
    OpenSession,
    Queued,
    Relink,
    Relinked,
    SessionOpened,
)
from nbrunner.protocol.status import GetInfo, Info, Ping, Pong
from nbrunner.protocol.steps import Captured, Step, StepFailed, StepResult
from nbrunner.protocol.together import (
    BeginRound,
    GetTeaching,
    GetTeachingState,
    JoinTeaching,
    TeachingManifest,
    TeachingProgress,
    TeachingState,
)

AnyMessage = (
    Hello
    | Welcome
    | Refused
    | OpenSession
    | Queued
    | SessionOpened
    | Relink
    | Relinked
    | AttachSession
    | Attached
    | Step
    | StepResult
    | Captured
    | StepFailed
    | Draining
    | CloseSession
    | Ping
    | Pong
    | GetInfo
    | Info
    | PutAdapter
    | AdapterStored
    | GetAdapter
    | AdapterInfo
    | OfferAdapter
    | WithdrawAdapter
    | AdapterOffered
    | Forward
    | ForwardResult
    | Backward
    | BackwardResult
    | TakeSum
    | SummedGradients
    | JoinTeaching
    | GetTeaching
    | TeachingManifest
    | TeachingProgress
    | BeginRound
    | GetTeachingState
    | TeachingState
)
