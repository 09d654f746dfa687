"""Quotas: what one tenant (an API key, else a client's address) may ask for: requests at once, tokens a
minute. Pure: times in, a Place or a refusal out.

    quotas.check(tenant, now)             raises ApiError: 429
    place = quotas.take(tenant, now)      the same, and takes a place
    place.charge(tokens, now)             about so many tokens it will take
    place.close(used, now)                it is over, and took so many
    quotas.headers(tenant, now)           what is left, for the headers x-ratelimit-*

Tokens are a bucket that fills at the rate and holds a minute's worth. A request starts while something is
in it, and may overdraw it: so one of any size is possible, and the next waits the longer. It is charged
an estimate first, or many that start together would all find the bucket full.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

from baton.server.api_error import ApiError

MINUTE_S = 60.0
RETRY_S = 1
"""After a request that would be one too many at once: nobody knows when the first of them ends."""
SWEEP = 1024
"""Tenants that are remembered in any case."""


@dataclass(slots=True)
class _Account:
    """Of one tenant."""

    tokens: float  # in the bucket at `then`; negative: overdrawn
    then: float
    requests: int = 0  # not over yet


class Quotas:
    """`requests`: at once; `tokens`: a minute. 0: no limit."""

    def __init__(self, *, requests: int = 0, tokens: int = 0, known: Sequence[str] = ()) -> None:
        """`known`: tenants whose tokens are counted for good."""
        self._requests, self._tokens = requests, tokens
        self.used = dict.fromkeys(known, 0)  # tokens, by tenant
        self._accounts: dict[str, _Account] = {}
        self._sweep_at = SWEEP

    def check(self, tenant: str, now: float) -> None:
        """Is there a place for a request? Raises ApiError. Remembers nothing."""
        account = self._accounts.get(tenant)
        if account is None:
            return
        self._fill(account, now)
        if self._requests and account.requests >= self._requests:
            why = f"{account.requests} requests of this client are under way, its limit"
            raise self._refused(tenant, why, RETRY_S, now)
        if self._tokens and account.tokens <= 0:
            wait = (1 - account.tokens) * MINUTE_S / self._tokens
            why = f"this client's {self._tokens:,} tokens a minute are used up"
            raise self._refused(tenant, why, ceil(wait), now)

    def _refused(self, tenant: str, why: str, retry_s: int, now: float) -> ApiError:
        error = ApiError.rate_limited(why, retry_s)
        error.headers |= self.headers(tenant, now)
        return error

    def take(self, tenant: str, now: float) -> "Place":
        """A place for a request. Raises ApiError."""
        self.check(tenant, now)
        self._account(tenant, now).requests += 1
        return Place(self, tenant)

    def headers(self, tenant: str, now: float) -> dict[str, str]:
        """What a tenant may still ask for, as OpenAI names it. Nobody knows when one under way ends, so
        their reset is the time after which to try again; that of tokens is when the bucket is full."""
        found: dict[str, str] = {}
        account = self._accounts.get(tenant) or _Account(self._tokens, now)
        self._fill(account, now)
        if self._requests:
            left = max(self._requests - account.requests, 0)
            found |= _headers("requests", self._requests, left, 0.0 if left else RETRY_S)
        if self._tokens:
            full_s = (self._tokens - account.tokens) * MINUTE_S / self._tokens
            found |= _headers("tokens", self._tokens, max(int(account.tokens), 0), full_s)
        return found

    def under_way(self, tenant: str) -> int:
        """Its requests that are not over."""
        account = self._accounts.get(tenant)
        return account.requests if account else 0

    def change(self, tenant: str, now: float, *, tokens: int = 0, ended: bool = False) -> None:
        """For places: so many more tokens are taken; fewer if negative."""
        account = self._account(tenant, now)
        if self._tokens:  # without a limit nothing comes back in: what is taken would stay taken
            account.tokens = min(account.tokens - tokens, self._tokens)
        account.requests -= ended
        if self._like_new(account):
            del self._accounts[tenant]

    def __len__(self) -> int:
        return len(self._accounts)

    def _account(self, tenant: str, now: float) -> _Account:
        """With what has come into the bucket until now."""
        found = self._accounts.get(tenant)
        if found is None:
            self._sweep(now)
            found = self._accounts[tenant] = _Account(self._tokens, now)
        self._fill(found, now)
        return found

    def _fill(self, account: _Account, now: float) -> None:
        came = max(now - account.then, 0.0) * self._tokens / MINUTE_S
        account.tokens, account.then = min(account.tokens + came, self._tokens), now

    def _like_new(self, account: _Account) -> bool:
        """Nothing is lost if it is forgotten."""
        return not account.requests and account.tokens >= self._tokens

    def _sweep(self, now: float) -> None:
        """Forget those that are like new ones, before there are too many."""
        if len(self._accounts) < self._sweep_at:
            return
        for account in self._accounts.values():
            self._fill(account, now)
        self._accounts = {
            name: each for name, each in self._accounts.items() if not self._like_new(each)
        }
        self._sweep_at = 2 * len(self._accounts) + SWEEP


def _headers(of: str, limit: int, left: int, reset_s: float) -> dict[str, str]:
    found = {"limit": str(limit), "remaining": str(left), "reset": duration(reset_s)}
    return {f"X-RateLimit-{name}-{of}".lower(): value for name, value in found.items()}


def duration(seconds: float) -> str:
    """As OpenAI writes it: 6m0s, 1.5s, 20ms. Not shorter than it is."""
    ms = ceil(seconds * 1000)
    minutes, rest = divmod(ms, 60_000)
    if minutes:
        return f"{minutes}m{ceil(rest / 1000)}s"
    return f"{rest / 1000:g}s" if rest >= 1000 else f"{rest}ms"


class Place:
    """One request of a tenant."""

    def __init__(self, quotas: Quotas, tenant: str) -> None:
        self._quotas, self._tenant = quotas, tenant
        self._charged, self._open = 0, True

    def charge(self, tokens: int, now: float) -> None:
        """It will take about so many."""
        self._quotas.change(self._tenant, now, tokens=tokens)
        self._charged += tokens

    def close(self, used: int, now: float) -> None:
        """It is over. Does nothing the second time."""
        if self._open:
            self._open = False
            if self._tenant in self._quotas.used:
                self._quotas.used[self._tenant] += used
            self._quotas.change(self._tenant, now, tokens=used - self._charged, ended=True)
