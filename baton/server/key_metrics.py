"""Key metrics: how the cluster is shared among API keys, for /metrics.

Keys are numbered in the order in which the server was given them, from 1: their names are secret, and
addresses, the tenants of a server without keys, are too many to be labels. The router divides the cluster
by tokens (router/fairness.py): among keys whose requests always wait, `key_tokens_total` grows alike.
"""

from collections.abc import Iterator, Sequence

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from baton.server.admission import Admission
from baton.server.quotas import Quotas


class KeyMetrics:
    """A collector. `tenants`: of the keys, in their order."""

    def __init__(
        self, model: str, prefix: str, tenants: Sequence[str], quotas: Quotas, admission: Admission
    ) -> None:
        self._model, self._prefix, self._tenants = model, prefix, tenants
        self._quotas, self._admission = quotas, admission

    def collect(self) -> Iterator[Metric]:
        """For the registry."""
        labels = ("model_name", "key")
        tokens = CounterMetricFamily(
            f"{self._prefix}key_tokens", "Tokens of prompts and answers.", labels=labels
        )
        under_way = GaugeMetricFamily(
            f"{self._prefix}key_requests", "HTTP requests that are not over.", labels=labels
        )
        waiting = GaugeMetricFamily(
            f"{self._prefix}key_answers_waiting", "Answers without a token yet.", labels=labels
        )
        for number, tenant in enumerate(self._tenants, start=1):
            own = (self._model, str(number))
            tokens.add_metric(own, self._quotas.used[tenant])
            under_way.add_metric(own, self._quotas.under_way(tenant))
            waiting.add_metric(own, self._admission.waits(tenant))
        yield from (tokens, under_way, waiting)
