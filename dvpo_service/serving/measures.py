"""What a gateway counts and times, for Prometheus."""

from __future__ import annotations

import time

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram


class Measures:
    """The Prometheus metrics of one gateway."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter("dvpo_requests", "Answered requests", ["route", "status"], registry=self.registry)
        self.seconds = Histogram("dvpo_request_seconds", "Time to the last byte", ["route"], registry=self.registry)
        self.under_way = Gauge("dvpo_requests_under_way", "Requests not answered yet", registry=self.registry)
        self.admitted = 0  # requests admitted and not finished yet


class UnderWay:
    """A request from its arrival to its last byte: counts and times it."""

    def __init__(self, measures: Measures, route: str):
        self.measures = measures
        self.route = route
        self.admitted = False
        self.began = time.perf_counter()

    def start(self) -> None:
        """Count the request as under way."""
        self.admitted = True
        self._change(+1)

    def finish(self, status: int) -> None:
        """Record the status and the time; a request that was admitted is no longer under way."""
        if self.admitted:
            self._change(-1)
        self.measures.requests.labels(self.route, status).inc()
        self.measures.seconds.labels(self.route).observe(time.perf_counter() - self.began)

    def _change(self, by: int) -> None:
        self.measures.admitted += by
        self.measures.under_way.inc(by)
