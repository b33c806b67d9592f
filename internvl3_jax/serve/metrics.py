"""Metrics in Prometheus' text format."""

from collections.abc import Iterator

import prometheus_client
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_SECONDS_PER_TOKEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)
CONTENT_TYPE = prometheus_client.CONTENT_TYPE_LATEST


class Metrics:
    """Counts requests and times; reads the engine's counters when it is asked.

    Args:
      engine: with `stats`.
    """

    def __init__(self, engine):
        self._registry = prometheus_client.CollectorRegistry()
        self._registry.register(_EngineCollector(engine))
        own = {"registry": self._registry, "namespace": "internvl3"}
        self.requests = prometheus_client.Counter(
            "requests", "Requests for an answer, by HTTP status.", ["status"], **own
        )
        self.disconnects = prometheus_client.Counter(
            "disconnects", "Requests whose client left before the end.", **own
        )
        self.first_token = prometheus_client.Histogram(
            "first_token_seconds",
            "From a prepared request to its first token.",
            buckets=_SECONDS,
            **own,
        )
        self.per_token = prometheus_client.Histogram(
            "token_seconds",
            "Time per token after the first, of one request.",
            buckets=_SECONDS_PER_TOKEN,
            **own,
        )
        self.preparing = prometheus_client.Histogram(
            "preparing_seconds",
            "Reading and cutting the images of a request.",
            buckets=_SECONDS,
            **own,
        )
        self.total = prometheus_client.Histogram(
            "request_seconds", "From the body to the end.", buckets=_SECONDS, **own
        )

    def text(self) -> bytes:
        """Returns all metrics."""
        return prometheus_client.generate_latest(self._registry)


class _EngineCollector(Collector):
    def __init__(self, engine):
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        stats = self._engine.stats
        gauges = {
            "running": "Requests in the rows of the engine.",
            "waiting": "Requests in its queue.",
        }
        for name, meaning in gauges.items():
            yield GaugeMetricFamily(f"internvl3_{name}", meaning, getattr(stats, name))
        counters = {
            "prompt_tokens": "Tokens of the prompts.",
            "reused_tokens": "Of these, tokens that the cache had already.",
            "new_tokens": "Tokens of the answers.",
            "finished": "Requests that ended, however that was.",
            "image_hits": "Images whose features were kept.",
            "image_misses": "Images that were encoded.",
            "tiles": "Tiles of the prompts.",
            "compressed_tiles": "Of these, tiles that the router compressed.",
            "blocks": "Blocks of tokens that were started.",
        }
        for name, meaning in counters.items():
            yield CounterMetricFamily(f"internvl3_{name}", meaning, getattr(stats, name))
