"""The proof of the token, on both sides and against anything that a stranger may send."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.serving import TOKEN
from transfer_queue import messages
from transfer_queue.errors import DecodeError, NotAuthorized, ProtocolMismatch
from transfer_queue.wire import security
from transfer_queue.wire.security import Gate, Introduction, Kind, new_token, signal

OTHER = bytes(32)


def introduce(client: Introduction, gate: Gate, identity: bytes = b"1") -> list[bytes]:
    """Exchange frames until neither side has more to say; return all of them."""
    said = [client.hello()]
    answer: bytes | None = said[0]
    while answer is not None:
        said.append(gate.receive(identity, [answer]))
        answer = client.receive(said[-1])
        if answer is not None:
            said.append(answer)
    return said


def test_tokens_are_long_and_never_the_same() -> None:
    """Every session has a secret of its own."""
    assert len(new_token()) == 32
    assert new_token() != new_token()


def test_both_sides_prove_the_token() -> None:
    """After four frames the client is welcome and the server knows whom it talks to."""
    client, gate = Introduction(TOKEN, "reward-1/ab"), Gate(TOKEN)
    said = introduce(client, gate)
    assert [Kind(frame[0]) for frame in said] == [Kind.HELLO, Kind.CHALLENGE, Kind.PROOF, Kind.WELCOME]
    assert client.welcomed
    assert gate.client_of(b"1") == "reward-1/ab"
    assert gate.auth_failures == 0
    assert not any(TOKEN in frame for frame in said)


def test_a_wrong_token_is_refused_and_counted() -> None:
    """The client raises, the server counts and still knows nobody."""
    client, gate = Introduction(OTHER, "c"), Gate(TOKEN)
    with pytest.raises(NotAuthorized, match="token"):
        introduce(client, gate)
    assert gate.auth_failures == 1
    assert gate.client_of(b"1") is None


def test_a_server_that_cannot_prove_the_token_is_not_trusted() -> None:
    """A welcome from somebody else's server raises."""
    client, gate = Introduction(TOKEN, "c"), Gate(OTHER)
    challenge = gate.receive(b"1", [client.hello()])
    client.receive(challenge)
    with pytest.raises(NotAuthorized):
        client.receive(signal(Kind.WELCOME) + challenge[1:33])
    assert not client.welcomed


def test_another_version_is_named_on_both_sides(monkeypatch: pytest.MonkeyPatch) -> None:
    """The refusal names the version of the server and of the client."""
    gate = Gate(TOKEN)
    monkeypatch.setattr(security, "PROTOCOL_VERSION", messages.PROTOCOL_VERSION + 41)
    client = Introduction(TOKEN, "c")
    hello = client.hello()
    monkeypatch.undo()
    mismatch = gate.receive(b"1", [hello])
    monkeypatch.setattr(security, "PROTOCOL_VERSION", messages.PROTOCOL_VERSION + 41)
    with pytest.raises(ProtocolMismatch) as refused:
        client.receive(mismatch)
    assert str(messages.PROTOCOL_VERSION) in str(refused.value)
    assert str(messages.PROTOCOL_VERSION + 41) in str(refused.value)


def test_what_a_stranger_sends_is_not_looked_at() -> None:
    """Anything but an introduction is answered by the question who it is."""
    gate = Gate(TOKEN)
    for frames in ([b"M whatever", b"body"], [b""], [b"\xff" * 1000], [signal(Kind.PROBE)], [signal(Kind.PROOF)]):
        assert gate.receive(b"9", frames) == signal(Kind.WHO)
    assert gate.client_of(b"9") is None


def test_a_recorded_introduction_opens_nothing() -> None:
    """Frames of an earlier connection, played back, do not prove anything."""
    gate = Gate(TOKEN)
    hello, _, proof, _ = introduce(Introduction(TOKEN, "c"), gate, b"1")
    gate.receive(b"2", [hello])
    assert gate.receive(b"2", [proof])[0] == Kind.REFUSED
    assert gate.receive(b"2", [proof]) == signal(Kind.WHO)
    assert gate.auth_failures == 1
    assert gate.client_of(b"2") is None


def test_a_proof_of_the_server_is_no_proof_of_a_client() -> None:
    """The labels differ, so a challenge cannot be reflected."""
    gate = Gate(TOKEN)
    challenge = gate.receive(b"1", [Introduction(TOKEN, "c").hello()])
    assert gate.receive(b"1", [signal(Kind.PROOF) + challenge[-32:]])[0] == Kind.REFUSED


def test_answers_to_an_earlier_hello_are_dropped() -> None:
    """A client that started over is not confused by what comes late."""
    client, gate = Introduction(TOKEN, "c"), Gate(TOKEN)
    late = gate.receive(b"1", [client.hello()])
    current = gate.receive(b"1", [client.hello()])
    assert client.receive(late) is None
    proof = client.receive(current)
    assert proof is not None
    welcome = gate.receive(b"1", [proof])
    assert client.receive(welcome) is None
    assert client.welcomed


def test_many_questions_lead_to_one_hello() -> None:
    """A server asks once per frame it does not look at; the client starts over once."""
    client, gate = Introduction(TOKEN, "c"), Gate(TOKEN)
    introduce(client, gate)
    answers = [client.receive(signal(Kind.WHO)) for _ in range(5)]
    assert [answer is not None for answer in answers] == [True, False, False, False, False]
    assert not client.welcomed


def test_tables_are_bounded_and_the_forgotten_may_return() -> None:
    """The least recently used identity makes room, is asked again, and gets in again."""
    gate = Gate(TOKEN, known=2, strangers=2)
    clients = [Introduction(TOKEN, f"c{number}") for number in range(3)]
    for number, client in enumerate(clients):
        introduce(client, gate, bytes([number]))
    assert [gate.client_of(bytes([number])) for number in range(3)] == [None, "c1", "c2"]
    assert gate.receive(b"\0", [b"M", b"body"]) == signal(Kind.WHO)
    introduce(clients[0], gate, b"\0")
    assert gate.client_of(b"\0") == "c0"


def test_strangers_do_not_push_out_the_known() -> None:
    """A flood of introductions that never prove anything costs bounded memory and hurts nobody."""
    gate = Gate(TOKEN, known=10, strangers=4)
    introduce(Introduction(TOKEN, "c"), gate, b"good")
    for number in range(100):
        gate.receive(str(number).encode(), [Introduction(OTHER, "x").hello()])
    assert gate.client_of(b"good") == "c"


@given(st.lists(st.binary(max_size=120), min_size=1, max_size=3))
def test_a_gate_answers_anything_and_opens_for_nothing(frames: list[bytes]) -> None:
    """Random frames never raise and never get in."""
    gate = Gate(TOKEN)
    assert gate.receive(b"1", frames)
    hello = Introduction(TOKEN, "c").hello()
    assert gate.receive(b"1", [hello + frames[0]])
    assert gate.client_of(b"1") is None


@given(st.binary(min_size=1, max_size=120))
def test_a_client_survives_any_frame(frame: bytes) -> None:
    """Random frames from a server end in nothing or in a typed error."""
    client = Introduction(TOKEN, "c")
    client.hello()
    with contextlib.suppress(DecodeError, ProtocolMismatch):
        client.receive(frame)
    assert not client.welcomed
