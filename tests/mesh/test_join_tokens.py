"""Join tokens: once, for a time, at their own node, and not to be guessed."""

from __future__ import annotations

import string
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tars.core.types import NodeId
from tars.errors import DiskFull, InvalidParams, JoinRefused, LimitExceeded, Overloaded
from tars.mesh import join_tokens
from tars.mesh.join_tokens import (
    FAILURES_IN_ALL,
    FAILURES_PER_SOURCE,
    MOST_TOKENS,
    MOST_TTL_SECONDS,
    REMEMBERED_SECONDS,
    TOKEN_LENGTH,
    TOKENS_FILE,
    FailureBound,
    Invitation,
    JoinTokens,
    Token,
    decode_secret,
    encode,
)
from tars.state_folder import StateFolder

CA_HASH = bytes(range(32))
NODE = NodeId("00000000-0000-4000-8000-000000000001")
HERE = "192.0.2.7"


class Clock:
    def __init__(self) -> None:
        self.at = 1_700_000_000.0

    def __call__(self) -> float:
        return self.at


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def tokens(tmp_path: Path, clock: Clock) -> JoinTokens:
    return JoinTokens(StateFolder(tmp_path), CA_HASH, wall_clock=clock, now=clock)


def reason(tokens: JoinTokens, secret: bytes, source: str = HERE) -> object:
    with pytest.raises(JoinRefused) as refused:
        tokens.spend(secret, source, NODE)
    return refused.value.details["reason"]


def test_a_token_works_once(tokens: JoinTokens) -> None:
    token, entry = tokens.new()
    spent = tokens.spend(token.secret, HERE, NODE)
    assert (spent.id, spent.used_by) == (entry.id, NODE)
    assert reason(tokens, token.secret) == "used"


def test_a_restart_forgets_neither_a_token_nor_that_it_was_used(
    tokens: JoinTokens, tmp_path: Path, clock: Clock
) -> None:
    used, kept = tokens.new()[0], tokens.new()[0]
    tokens.spend(used.secret, HERE, NODE)
    again = JoinTokens(StateFolder(tmp_path), CA_HASH, wall_clock=clock, now=clock)
    assert reason(again, used.secret) == "used"
    again.spend(kept.secret, HERE, NODE)


def test_a_token_ends_when_its_time_is_over(tokens: JoinTokens, clock: Clock) -> None:
    token, _ = tokens.new(60)
    clock.at += 59.9
    assert [tokens.state(entry) for entry in tokens.entries()] == ["open"]
    clock.at += 0.1
    assert reason(tokens, token.secret) == "expired"


def test_a_revoked_token_opens_nothing_and_is_revoked_once(tokens: JoinTokens) -> None:
    token, entry = tokens.new()
    assert tokens.revoke(entry.id.upper())
    assert reason(tokens, token.secret) == "revoked"
    assert not tokens.revoke(entry.id)


def test_a_used_token_cannot_be_revoked_and_stays_used(tokens: JoinTokens) -> None:
    token, entry = tokens.new()
    tokens.spend(token.secret, HERE, NODE)
    assert not tokens.revoke(entry.id)
    assert [tokens.state(each) for each in tokens.entries()] == ["used"]


@pytest.mark.parametrize("token_id", ["", "0", "zzzzzzzz", "0a1b2c3d", "../../etc", "*"])
def test_revoking_what_is_not_there_says_where_to_look(tokens: JoinTokens, token_id: str) -> None:
    tokens.new()
    with pytest.raises(InvalidParams, match="tars token list"):
        tokens.revoke(token_id)


def test_a_wrong_secret_is_unknown_and_every_reason_has_its_own_words(tokens: JoinTokens) -> None:
    token, _ = tokens.new()
    assert reason(tokens, bytes(16)) == "unknown"
    tokens.spend(token.secret, HERE, NODE)
    assert len(set(join_tokens._WHY_NOT.values())) == 4
    assert all("tars token new" in words for words in join_tokens._WHY_NOT.values())


def test_neither_token_nor_secret_is_kept(tokens: JoinTokens, tmp_path: Path) -> None:
    token, _ = tokens.new()
    content = (tmp_path / TOKENS_FILE).read_text()
    for shown in (str(token), encode(token.secret), token.secret.hex()):
        assert shown not in content
        assert shown not in repr(token)
        assert shown not in repr(tokens.entries())


def test_a_full_disk_spends_nothing(tokens: JoinTokens, monkeypatch: pytest.MonkeyPatch) -> None:
    token, _ = tokens.new()

    def full(*_: object) -> None:
        raise DiskFull("full")

    with monkeypatch.context() as patched:
        patched.setattr(StateFolder, "write_json", full)
        with pytest.raises(DiskFull):
            tokens.spend(token.secret, HERE, NODE)
        with pytest.raises(DiskFull):
            tokens.new()
    assert [tokens.state(entry) for entry in tokens.entries()] == ["open"]
    tokens.spend(token.secret, HERE, NODE)


def test_what_ended_long_ago_is_forgotten(tokens: JoinTokens, clock: Clock) -> None:
    for _ in range(3):
        tokens.new(10)
    clock.at += REMEMBERED_SECONDS
    tokens.new()
    assert len(tokens.entries()) == 4
    clock.at += 11
    assert [tokens.state(entry) for entry in tokens.entries()] == ["open"]


def test_there_is_a_bound_of_unused_tokens_which_used_ones_do_not_count_for(
    tokens: JoinTokens, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(join_tokens, "MOST_TOKENS", 3)
    token, _ = tokens.new()
    tokens.spend(token.secret, HERE, NODE)
    for _ in range(3):
        tokens.new()
    with pytest.raises(LimitExceeded, match="tars token revoke"):
        tokens.new()
    assert MOST_TOKENS >= 100


@pytest.mark.parametrize("seconds", [0, -1, MOST_TTL_SECONDS + 1])
def test_a_life_of_nothing_or_for_ever_is_refused(tokens: JoinTokens, seconds: int) -> None:
    with pytest.raises(InvalidParams):
        tokens.new(seconds)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        '{"tokens": 5}',
        '{"tokens": [5, {}, {"id": "x"}, null]}',
        '{"tokens": [{"id": 1, "digest": 2, "created_ms": "3", "expires_ms": 4}]}',
        '{"tokens": [{"id": "a", "digest": "\\u00e4", "created_ms": 1, "expires_ms": 99999999999999}]}',
    ],
)
def test_a_damaged_file_loses_tokens_and_nothing_else(tmp_path: Path, content: str) -> None:
    (tmp_path / TOKENS_FILE).write_text(content)
    tokens = JoinTokens(StateFolder(tmp_path), CA_HASH)
    assert tokens.entries() == []
    assert reason(tokens, bytes(16)) == "unknown"
    token, _ = tokens.new()
    tokens.spend(token.secret, HERE, NODE)


def test_guessing_is_bounded_per_address_and_others_are_not_locked_out(tokens: JoinTokens, clock: Clock) -> None:
    token, _ = tokens.new()
    for _ in range(FAILURES_PER_SOURCE):
        assert reason(tokens, bytes(16), "192.0.2.66") == "unknown"
    with pytest.raises(Overloaded, match="wrong join tokens") as refused:
        tokens.spend(token.secret, "192.0.2.66", NODE)
    assert 0 < (refused.value.retry_after_ms or 0) <= 60_001
    tokens.spend(token.secret, HERE, NODE)
    clock.at += 60
    assert reason(tokens, bytes(16), "192.0.2.66") == "unknown"


def test_guessing_is_bounded_in_all_and_costs_no_memory(clock: Clock) -> None:
    bound = FailureBound(clock)
    tried = 0
    for number in range(1000):
        try:
            bound.check(f"address {number}")
        except Overloaded:
            continue
        bound.note(f"address {number}")
        tried += 1
    assert tried == FAILURES_IN_ALL == len(bound._failed)


# --- what people paste ----------------------------------------------------------------------------------------------------


@given(st.binary(min_size=32, max_size=32))
def test_a_token_is_read_as_it_was_written(raw: bytes) -> None:
    token = Token(raw[:16], raw[16:])
    assert len(str(token)) == TOKEN_LENGTH
    assert Token.parse(f"  {token}\n") == token
    assert token.names(raw[16:] + bytes(16))
    assert not token.names(bytes(byte ^ 1 for byte in raw[16:]) + bytes(16))


GOOD = encode(bytes(range(32)))
ALPHABET = set(string.ascii_letters + string.digits + "-_")


@pytest.mark.parametrize(
    "text",
    [
        "", " ", GOOD[:-1], GOOD[1:], GOOD + "A", GOOD[:20], GOOD + GOOD, "a" * 2**20, GOOD[:-1] + "=", GOOD[:-1] + "+",
        "/" + GOOD[1:], "é" + GOOD[1:], "\x00" + GOOD[1:], GOOD[:10] + " " + GOOD[11:], "\U0001f600" * TOKEN_LENGTH,
    ],
)  # fmt: skip
def test_a_token_that_was_not_copied_whole_says_so_and_is_not_repeated(text: str) -> None:
    with pytest.raises(JoinRefused, match=r"tars token new|port 0") as refused:
        Token.parse(text)
    assert refused.value.details["reason"] == "malformed"
    assert len(refused.value.message) < 300
    assert text.strip() == "" or text.strip() not in refused.value.message


def test_a_last_character_with_bits_that_mean_nothing_is_no_other_spelling_of_a_token() -> None:
    spellings = [GOOD[:-1] + last for last in sorted(ALPHABET)]
    accepted = []
    for text in spellings:
        try:
            accepted.append(str(Token.parse(text)))
        except JoinRefused:
            continue
    assert len(accepted) == len(set(accepted)) == 16


@given(st.text(max_size=80))
def test_whatever_is_pasted_is_a_token_or_one_clear_error(text: str) -> None:
    try:
        token = Token.parse(text)
    except JoinRefused:
        return
    assert str(token) == text.strip()


def test_an_invitation_is_token_at_address() -> None:
    for address, host in (("box.lan:8001", "box.lan"), ("192.0.2.7:8001", "192.0.2.7"), ("[::1]:8001", "::1")):
        invitation = Invitation.parse(f"{GOOD}@{address}")
        assert (str(invitation.token), invitation.address.host, invitation.address.port) == (GOOD, host, 8001)


@pytest.mark.parametrize(
    "text",
    [
        "", GOOD, "@", f"{GOOD}@", f"{GOOD}@box", f"{GOOD}@:8001", f"{GOOD}@box:", f"{GOOD}@box:0", f"{GOOD}@box:99999",
        f"{GOOD}@::1:8001", f"{GOOD}@http://box:8001", f"{GOOD[:-1]}@box:8001", "@box:8001", f"{GOOD}@@box:8001",
    ],
)  # fmt: skip
def test_a_wrong_invitation_says_how_it_looks_and_never_repeats_the_token(text: str) -> None:
    with pytest.raises(JoinRefused, match=r"TOKEN@HOST:PORT|tars token new") as refused:
        Invitation.parse(text)
    assert refused.value.details["reason"] == "malformed"
    assert GOOD[:-1] not in refused.value.message


@pytest.mark.parametrize("text", ["", "é", encode(bytes(15)), encode(bytes(17)), "!" * 22, "A" * 1_000_000])
def test_a_secret_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(JoinRefused):
        decode_secret(text)
    assert decode_secret(encode(bytes(range(16)))) == bytes(range(16))
