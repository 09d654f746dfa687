"""Expected: how long a tenant's answers are likely to be, judged by its last ones. Pure.

Many requests allow far more tokens than they generate, so max_tokens says little. But the answers of one
tenant resemble each other, and what it is charged when a request is placed decides who is placed next.

Sheng et al.: Fairness in Serving Large Language Models (2024): the virtual token counter with a predicted
length.
"""

from collections import OrderedDict

UNKNOWN = 512
"""Tokens that the first answers of a tenant are expected to have, if they may."""
STEP = 512
"""Tokens beyond what was charged after which a running request is charged again."""
NEW = 0.25
"""Part of the last answer in what is expected of the next."""
REMEMBERED = 4096  # tenants


class Expected:
    """Of all tenants."""

    def __init__(self) -> None:
        self._lengths: OrderedDict[str, float] = OrderedDict()

    def tokens(self, tenant: str, most: int) -> int:
        """Of its next answer, which may have `most`."""
        return min(most, max(1, round(self._lengths.get(tenant, UNKNOWN))))

    def ended(self, tenant: str, tokens: int) -> None:
        """An answer of it had so many tokens."""
        before = self._lengths.pop(tenant, UNKNOWN)
        self._lengths[tenant] = before + NEW * (tokens - before)
        if len(self._lengths) > REMEMBERED:
            self._lengths.popitem(last=False)
