"""Tokens that let one more PC into the mesh: what they look like, which of them are still good, and who may guess how often.

Law of this file: a token works once, until it ends, and only at the node that made it, which keeps its hash and never the token. A token
is spent on the disk before anything is given for it, so that no crash makes two uses of one.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

from tars.config_schema.listen_address import ListenAddress
from tars.core.types import NodeId
from tars.errors import InvalidParams, JoinRefused, LimitExceeded, Overloaded
from tars.state_folder import StateFolder

TOKENS_FILE = "join_tokens.json"
SECRET_BYTES = 16
"""128 random bits: beyond guessing, also without the bound on failures below."""
CA_BYTES = 16
"""Of the CA's sha256: nobody makes another CA with the same first half (128 bits, second preimage)."""
TOKEN_LENGTH = 43
"""Characters of base64url without padding for the 32 bytes."""

DEFAULT_TTL_SECONDS = 3600
"""An hour: the walk to the next PC. A token that lies in a chat's history tomorrow opens nothing."""
MOST_TTL_SECONDS = 30 * 86_400
MOST_TOKENS = 256
"""Unspent ones at a time; nobody adds more PCs than that at once."""
REMEMBERED_SECONDS = 7 * 86_400
"""How long a token that can no longer be used is remembered, so that whoever tries it hears why."""

FAILURES_PER_SOURCE = 10
"""A minute and address: a person who pastes wrongly needs three."""
FAILURES_IN_ALL = 60
"""A minute; more is somebody who guesses from many addresses."""
FAILURE_SECONDS = 60.0

TokenState = Literal["open", "used", "expired", "revoked"]


@dataclass(frozen=True, slots=True)
class Token:
    """What a person carries from one PC to the other."""

    secret: bytes
    ca_hash: bytes
    """The first `CA_BYTES` of the sha256 of the CA's certificate."""

    @classmethod
    def parse(cls, text: str) -> Token:
        """Raises `JoinRefused` that says how a token looks; never repeats what was given, which may be nearly a secret."""
        given = text.strip()
        if len(given) != TOKEN_LENGTH:
            how = "cut off" if len(given) < TOKEN_LENGTH else "too long"
            raise JoinRefused(
                f"The join token is {how}: it has {len(given):,} characters instead of {TOKEN_LENGTH}. Copy it whole, as `tars token new` "
                "printed it.",
                details={"reason": "malformed"},
            )
        try:
            raw = base64.b64decode(given.encode("ascii") + b"=", altchars=b"-_", validate=True)
            if encode(raw) != given:
                raise ValueError("bits beyond the last byte")
        except (ValueError, binascii.Error):
            raise JoinRefused(
                "The join token has a character that no token has, or one is wrong: it is made of letters, digits, - and _ only. Copy it "
                "again, as `tars token new` printed it.",
                details={"reason": "malformed"},
            ) from None
        return cls(raw[:SECRET_BYTES], raw[SECRET_BYTES:])

    def __str__(self) -> str:
        return encode(self.secret + self.ca_hash)

    def __repr__(self) -> str:
        return "Token(...)"

    def names(self, ca_hash: bytes) -> bool:
        """Whether it was made in the mesh of that CA."""
        return hmac.compare_digest(self.ca_hash, ca_hash[:CA_BYTES])


@dataclass(frozen=True, slots=True)
class Invitation:
    """`TOKEN@HOST:PORT`."""

    token: Token
    address: ListenAddress

    @classmethod
    def parse(cls, text: str) -> Invitation:
        """Raises `JoinRefused`."""
        token, separator, address = text.strip().rpartition("@")
        if not separator:
            raise JoinRefused(
                "--join takes TOKEN@HOST:PORT, and there is no @ in what was given. Copy the whole line that `tars token new` printed.",
                details={"reason": "malformed"},
            )
        try:
            parsed = ListenAddress.parse(address)
        except ValueError as error:
            raise JoinRefused(f"--join TOKEN@HOST:PORT: {error}.", details={"reason": "malformed"}) from None
        if parsed.port == 0:
            raise JoinRefused(
                "--join TOKEN@HOST:PORT: nobody answers at port 0. Copy the whole line that `tars token new` printed.",
                details={"reason": "malformed"},
            )
        return cls(Token.parse(token), parsed)


@dataclass(frozen=True, slots=True)
class TokenEntry:
    """One token as its node keeps it. Times are Unix time in ms."""

    id: str
    """8 hexadecimal digits of its hash, for people."""
    digest: str
    """sha256 of the secret, hex: 128 random bits need no slow hash."""
    created_ms: int
    expires_ms: int
    used_ms: int | None = None
    used_by: str | None = None
    """The NodeId that joined with it."""
    revoked_ms: int | None = None

    def state(self, now_ms: int) -> TokenState:
        """What it is worth now."""
        if self.used_ms is not None:
            return "used"
        if self.revoked_ms is not None:
            return "revoked"
        return "expired" if now_ms >= self.expires_ms else "open"

    def ended_ms(self) -> int:
        """Since when it opens nothing."""
        return self.used_ms or self.revoked_ms or self.expires_ms


class JoinTokens:
    """The tokens that this node made. `wall_clock` is Unix time in seconds, `now` any monotonic clock."""

    def __init__(
        self,
        folder: StateFolder,
        ca_hash: bytes,
        *,
        wall_clock: Callable[[], float] = time.time,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._folder = folder
        self._ca_hash = ca_hash
        self._wall_clock = wall_clock
        self._failures = FailureBound(now)
        self._entries = _entries(folder.read_json(TOKENS_FILE))

    def new(self, ttl_seconds: int = DEFAULT_TTL_SECONDS) -> tuple[Token, TokenEntry]:
        """A token good for `ttl_seconds`. Raises `LimitExceeded`, or `DiskFull`; then there is none."""
        now_ms = self._now_ms()
        if not 1 <= ttl_seconds <= MOST_TTL_SECONDS:
            raise InvalidParams(f"A token is good for 1 to {MOST_TTL_SECONDS:,} s (30 days), not {ttl_seconds:,}.")
        kept = self._kept(now_ms)
        if sum(entry.state(now_ms) == "open" for entry in kept) >= MOST_TOKENS:
            raise LimitExceeded(
                f"This node has {MOST_TOKENS} unused join tokens, its limit. Revoke some (`tars token revoke ID`), or wait until they end.",
                details={"limit": MOST_TOKENS, "actual": MOST_TOKENS},
            )
        token = Token(secrets.token_bytes(SECRET_BYTES), self._ca_hash[:CA_BYTES])
        digest = _digest(token.secret)
        entry = TokenEntry(digest[:8], digest, now_ms, now_ms + ttl_seconds * 1000)
        self._save([*kept, entry])
        return token, entry

    def entries(self) -> list[TokenEntry]:
        """All that are remembered, newest first."""
        return sorted(self._kept(self._now_ms()), key=lambda entry: -entry.created_ms)

    def state(self, entry: TokenEntry) -> TokenState:
        """What it is worth now."""
        return entry.state(self._now_ms())

    def revoke(self, token_id: str) -> bool:
        """End a token early; False where it could no longer be used anyway. Raises `InvalidParams` where there is none such."""
        now_ms = self._now_ms()
        kept = self._kept(now_ms)
        place = next((place for place, entry in enumerate(kept) if entry.id == token_id.lower()), None)
        if place is None:
            raise InvalidParams(
                "This node has made no join token with that id (or it ended more than a week ago). `tars token list` shows them; each "
                "node knows only its own."
            )
        if kept[place].state(now_ms) != "open":
            return False
        kept[place] = replace(kept[place], revoked_ms=now_ms)
        self._save(kept)
        return True

    def spend(self, secret: bytes, source: str, node: NodeId) -> TokenEntry:
        """Take the token for `node`; it is used from now on. `source` is who asks, for the bound on failures.

        Raises `JoinRefused` (unknown, used, expired, revoked), `Overloaded` after too many failures, `DiskFull`.
        """
        self._failures.check(source)
        now_ms = self._now_ms()
        kept = self._kept(now_ms)
        digest, found = _digest(secret), None
        for place, entry in enumerate(kept):
            # Every one is compared, whichever fits: the time tells nothing.
            if hmac.compare_digest(entry.digest, digest):
                found = place
        state = "unknown" if found is None else kept[found].state(now_ms)
        if found is None or state != "open":
            self._failures.note(source)
            raise JoinRefused(_WHY_NOT[state], details={"reason": state})
        spent = replace(kept[found], used_ms=now_ms, used_by=node)
        kept[found] = spent
        self._save(kept)
        return spent

    def _kept(self, now_ms: int) -> list[TokenEntry]:
        ends = now_ms - REMEMBERED_SECONDS * 1000
        return [entry for entry in self._entries if entry.state(now_ms) == "open" or entry.ended_ms() > ends]

    def _save(self, entries: list[TokenEntry]) -> None:
        names = TokenEntry.__dataclass_fields__
        self._folder.write_json(
            TOKENS_FILE, {"tokens": [{name: getattr(entry, name) for name in names} for entry in entries]}
        )
        self._entries = entries

    def _now_ms(self) -> int:
        return int(self._wall_clock() * 1000)


_WHY_NOT = {
    "unknown": (
        "This node has made no such join token, so nothing was done. A token works only at the node that made it: give the address that "
        "`tars token new` printed with it, or make a new one here with `tars token new`."
    ),
    "used": (
        "This join token was used already: each lets one PC in, once. Make a new one with `tars token new`. If no PC of yours has used "
        "it, look at `tars token list` and `tars node list`, and remove what does not belong."
    ),
    "expired": "This join token has expired. Make a new one with `tars token new` (--ttl makes it last longer).",
    "revoked": "This join token was revoked. Make a new one with `tars token new`.",
}


class FailureBound:
    """How often wrong tokens may come: per address and in all, in a window that slides."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._failed: list[tuple[float, str]] = []
        """Never longer than `FAILURES_IN_ALL`: beyond it nothing more is tried."""

    def check(self, source: str) -> None:
        """Raises `Overloaded`, which says when to come back."""
        now = self._now()
        self._failed = [(at, who) for at, who in self._failed if now - at < FAILURE_SECONDS]
        own = [at for at, who in self._failed if who == source]
        every = [at for at, _ in self._failed]
        over = own if len(own) >= FAILURES_PER_SOURCE else every if len(every) >= FAILURES_IN_ALL else []
        if over:
            wait = max(0.0, over[0] + FAILURE_SECONDS - now)
            raise Overloaded(
                f"Too many wrong join tokens within the last minute, so this one was not even looked at. Try again in {wait:.0f} s.",
                retry_after_ms=int(wait * 1000) + 1,
                details={"reason": "too_many_failures"},
            )

    def note(self, source: str) -> None:
        """One more came."""
        self._failed.append((self._now(), source))


def encode(raw: bytes) -> str:
    """base64url without padding."""
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


def decode_secret(text: str) -> bytes:
    """A secret as a join sends it. Raises `JoinRefused` where it is none."""
    try:
        raw = base64.b64decode(text.encode("ascii") + b"==", altchars=b"-_", validate=True)
    except (ValueError, binascii.Error):
        raw = b""
    if len(raw) != SECRET_BYTES:
        raise JoinRefused(
            "What was sent is no join token's secret. Use `tars-node --join` with a token of `tars token new`.",
            details={"reason": "malformed"},
        )
    return raw


def _digest(secret: bytes) -> str:
    return hashlib.sha256(secret).hexdigest()


def _entries(stored: Any) -> list[TokenEntry]:
    """What the file holds. A damaged one is no reason not to start: its tokens are lost, and new ones are made in a second."""
    listed = stored.get("tokens") if isinstance(stored, dict) else None
    entries = []
    for fields in listed if isinstance(listed, list) else []:
        try:
            entry = TokenEntry(**fields)
        except TypeError:
            continue
        whole = all(type(each) is int for each in (entry.created_ms, entry.expires_ms))
        ends = all(each is None or type(each) is int for each in (entry.used_ms, entry.revoked_ms))
        # compare_digest takes ASCII only.
        if whole and ends and isinstance(entry.digest, str) and entry.digest.isascii() and isinstance(entry.id, str):
            entries.append(entry)
    return entries
