from __future__ import annotations

import math
from typing import Any

import msgspec
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from wire_messages import any_message

from nbrunner.errors import BadPeerDataError
from nbrunner.protocol.finite import all_finite
from nbrunner.protocol.frames import (
    ITEM_BYTES,
    PREFIX,
    RawTensor,
    TensorSpec,
    check_prefix,
    decode_frame,
    encode_frame,
)
from nbrunner.protocol.limits import MAX_FRAME_BYTES, MAX_HEADER_BYTES
from nbrunner.protocol.messages import AnyMessage
from nbrunner.protocol.status import Ping
from nbrunner.protocol.tensors import DTYPES, check_shape, pack, take, unpack

PEER = "12D3KooW" + "x" * 44


def split(buffers: list[Any]) -> tuple[bytes, bytes, bytes]:
    data = b"".join(buffers)
    header, body = check_prefix(data[: PREFIX.size])
    assert len(data) == PREFIX.size + header + body
    return data[: PREFIX.size], data[PREFIX.size : PREFIX.size + header], data[PREFIX.size + header :]


@st.composite
def raw_tensors(draw: st.DrawFn) -> list[RawTensor]:
    names = draw(st.lists(st.sampled_from(["hidden", "mask", "carry.0", "carry.1"]), unique=True, max_size=4))
    made = []
    for name in names:
        spec = TensorSpec(
            name, draw(st.sampled_from(sorted(ITEM_BYTES))), draw(st.lists(st.integers(0, 4), max_size=6))
        )
        made.append(RawTensor(spec, draw(st.binary(min_size=spec.nbytes, max_size=spec.nbytes))))
    return made


messages: st.SearchStrategy[AnyMessage] = any_message()


@given(messages, raw_tensors())
def test_what_is_sent_is_received(message: AnyMessage, tensors: list[RawTensor]) -> None:
    _, header, body = split(encode_frame(message, tensors))
    received, parts = decode_frame(header, body)
    assert received == message
    assert {name: (raw.spec, bytes(raw.data)) for name, raw in parts.items()} == {
        raw.spec.name: (raw.spec, bytes(raw.data)) for raw in tensors
    }


def only_bad_data(header: bytes, body: bytes) -> None:
    try:
        decode_frame(header, body)
    except BadPeerDataError:
        return


@given(st.binary(max_size=200), st.binary(max_size=50))
def test_random_bytes_are_refused_and_nothing_worse(header: bytes, body: bytes) -> None:
    only_bad_data(header, body)


@given(messages, raw_tensors(), st.data())
def test_mangled_frames_are_refused_and_nothing_worse(
    message: AnyMessage, tensors: list[RawTensor], data: st.DataObject
) -> None:
    _, header, body = split(encode_frame(message, tensors))
    mangled = bytearray(header)
    for _ in range(data.draw(st.integers(1, 4))):
        mangled[data.draw(st.integers(0, len(mangled) - 1))] = data.draw(st.integers(0, 255))
    only_bad_data(bytes(mangled), body)
    only_bad_data(header[: data.draw(st.integers(0, len(header)))], body)
    only_bad_data(header, body + b"more")


def frame(message: Any, specs: Any) -> bytes:
    return msgspec.msgpack.encode((message, specs))


@pytest.mark.parametrize(
    ("header", "body"),
    [
        (b"", b""),
        (b"\x91" * 100_000 + b"\x90", b""),  # nested a hundred thousand deep
        (frame({"type": "ping", "nonce": 1}, [["hidden", "float32", [2]]]), b"1234567"),
        (frame({"type": "ping", "nonce": 1}, []), b"1"),
        (frame({"type": "ping", "nonce": 1}, [["a", "uint8", [1]], ["a", "uint8", [1]]]), b"12"),
        (frame({"type": "ping", "nonce": 1}, [["a", "complex64", [1]]]), b"12345678"),
        (frame({"type": "ping", "nonce": 1}, [["a", "uint8", [-1]]]), b""),
        (frame({"type": "ping", "nonce": 1}, [["a", "uint8", [2**31, 2**31, 2**31]]]), b""),
        (frame({"type": "ping", "nonce": 1}, [["a" * 41, "uint8", [1]]]), b"1"),
        (frame({"type": "ping", "nonce": 1}, [["a", "uint8", [1] * 7]]), b"1"),
        (frame({"type": "ping", "nonce": 1}, [[f"t{i}", "uint8", [0]] for i in range(4097)]), b""),
        (frame({"type": "ping", "nonce": -1}, []), b""),
        (frame({"type": "ping", "nonce": 2**60}, []), b""),
        (frame({"type": "ping", "nonce": 1.5}, []), b""),
        (frame({"type": "ping", "nonce": 1, "extra": 1}, []), b""),
        (frame({"type": "ping"}, []), b""),
        (frame({"type": "pingpong", "nonce": 1}, []), b""),
        (frame({"nonce": 1}, []), b""),
        (frame({"type": "refused", "code": "because", "reason": ""}, []), b""),
        (frame({"type": "refused", "code": "limit", "reason": "x" * 2001}, []), b""),
        (frame({"type": "attachsession", "session": "g" * 32}, []), b""),
        (frame({"type": "attachsession", "session": "a" * 31}, []), b""),
        (frame({"type": "refused", "code": "limit", "reason": "text"}, []).replace(b"text", b"te\xff\xff"), b""),
    ],
)
def test_frames_that_must_be_refused(header: bytes, body: bytes) -> None:
    with pytest.raises(BadPeerDataError):
        decode_frame(header, body)


@given(st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1), st.integers(0, MAX_FRAME_BYTES))
def test_lengths_are_checked_before_anything_is_read(header: int, body: int, limit: int) -> None:
    prefix = PREFIX.pack(header, body)
    if header <= MAX_HEADER_BYTES and body <= limit:
        assert check_prefix(prefix, limit) == (header, body)
    else:
        with pytest.raises(BadPeerDataError):
            check_prefix(prefix, limit)


def test_frames_that_nobody_would_take_are_not_sent() -> None:
    spec = TensorSpec("hidden", "uint8", [MAX_FRAME_BYTES + 1])
    with pytest.raises(ValueError, match="over the limit"):
        encode_frame(Ping(1), [RawTensor(spec, b"")])


# -- tensors -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", sorted(DTYPES))
@pytest.mark.parametrize("shape", [(), (0, 3), (2, 3), (1, 2, 3, 1, 1, 2)])
def test_tensors_there_and_back(dtype: str, shape: tuple[int, ...]) -> None:
    tensor = torch.randint(0, 2, shape).to(DTYPES[dtype])
    raw = pack("hidden", tensor)
    assert raw.spec.nbytes == len(raw.data) == math.prod(shape) * tensor.element_size()
    back = unpack(RawTensor(raw.spec, bytes(raw.data)))
    assert torch.equal(back, tensor)
    assert back.dtype == tensor.dtype


def test_tensors_that_are_not_contiguous_and_those_that_require_gradients() -> None:
    tensor = torch.arange(12.0, requires_grad=True).view(3, 4).t()
    raw = pack("hidden", tensor)
    assert torch.equal(unpack(RawTensor(raw.spec, bytes(raw.data))), tensor.detach())


def test_received_tensors_may_be_written_to() -> None:
    raw = pack("hidden", torch.zeros(3))
    received = unpack(RawTensor(raw.spec, memoryview(bytes(raw.data))))
    received += 1
    assert torch.equal(received, torch.ones(3))


def test_what_take_refuses() -> None:
    tensors = {
        "hidden": pack("hidden", torch.zeros(2, 3, 4)),
        "nan": pack("nan", torch.tensor([float("nan")])),
        "inf": pack("inf", torch.tensor([float("-inf")])),
        "bool": RawTensor(TensorSpec("bool", "bool", [2]), b"\x01\x02"),
    }
    assert take(tensors, "hidden", dtype=torch.float32, shape=(2, None, 4)).shape == (2, 3, 4)
    assert take(tensors, "nan", dtype=torch.float32, shape=(1,), finite=False).isnan().all()
    for name, dtype, shape in [
        ("absent", torch.float32, (2, 3, 4)),
        ("hidden", torch.bfloat16, (2, 3, 4)),
        ("hidden", (torch.int64, torch.bool), (2, 3, 4)),
        ("hidden", torch.float32, (2, 3)),
        ("hidden", torch.float32, (2, 3, 5)),
        ("hidden", torch.float32, (2, 3, 4, 1)),
        ("nan", torch.float32, (1,)),
        ("inf", torch.float32, (1,)),
        ("bool", torch.bool, (2,)),
    ]:
        with pytest.raises(BadPeerDataError):
            take(tensors, name, dtype=dtype, shape=shape)  # type: ignore[arg-type]


@given(st.lists(st.integers(0, 4), max_size=4), st.lists(st.none() | st.integers(0, 4), max_size=4), st.booleans())
def test_shapes(actual: list[int], wanted: list[int | None], open_ended: bool) -> None:
    fits = (len(actual) >= len(wanted) if open_ended else len(actual) == len(wanted)) and all(
        want is None or want == got for want, got in zip(wanted, actual, strict=False)
    )
    pattern = [*wanted, -1] if open_ended else wanted
    if fits:
        check_shape("hidden", actual, pattern)
    else:
        with pytest.raises(BadPeerDataError):
            check_shape("hidden", actual, pattern)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@given(numbers=st.lists(st.sampled_from([0.0, -1.5, 3e4, -3e4, math.inf, -math.inf, math.nan, 1e-7]), max_size=40))
def test_finite_is_what_torch_says(dtype: torch.dtype, numbers: list[float]) -> None:
    tensor = torch.tensor(numbers, dtype=dtype)
    assert all_finite(tensor) == bool(torch.isfinite(tensor).all())


def test_the_largest_numbers_and_whole_numbers_are_finite() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        limits = torch.finfo(dtype)
        assert all_finite(torch.tensor([[limits.max, limits.min]] * 3, dtype=dtype, requires_grad=True))
    assert all_finite(torch.tensor([2**62, -1]))
    assert all_finite(torch.tensor([True, False]))
