"""For each alert: series under which it fires, and a time at which it has resolved again.

A series is written in promtool's notation: `0+10x60` starts at 0, grows by 10 each minute, 60 times.
"""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Case:
    """`series` maps a selector to its samples, one a minute."""

    alert: str
    series: dict[str, str]
    fires_at: str
    resolved_at: str
    labels: dict[str, str] = field(default_factory=dict)


_OK = 'loraplex_gateway_requests_total{outcome="ok"}'
_ERROR = 'loraplex_gateway_requests_total{outcome="server_error"}'
_FIRST = "loraplex_gateway_time_to_first_token_seconds"
WORKER = {"instance": "w:9160"}

CASES = [
    Case(
        "LoraplexAvailabilityFastBurn",
        {_OK: "0+100x180", _ERROR: "0+5x60 300+0x120"},
        "30m",
        "90m",
    ),
    Case("LoraplexAvailabilityBurn", {_OK: "0+100x900", _ERROR: "0+2x400 800+0x500"}, "6h", "8h"),
    Case("LoraplexAvailabilitySlowBurn", {_OK: "0+100x9000", _ERROR: "0+1x600 600+0x8400"}, "9h", "20h"),
    Case(
        "LoraplexWarmFirstTokenSlow",
        {
            f'{_FIRST}_bucket{{residency="pages",le="1.0"}}': "0+5x60 300+10x120",
            f'{_FIRST}_count{{residency="pages"}}': "0+10x180",
        },
        "50m",
        "150m",
    ),
    Case(
        "LoraplexColdFirstTokenSlow",
        {
            f'{_FIRST}_bucket{{residency="store",le="5.0"}}': "0+5x60 300+10x120",
            f'{_FIRST}_count{{residency="store"}}': "0+10x180",
        },
        "55m",
        "150m",
    ),
    Case("LoraplexNoWorker", {'loraplex_scheduler_workers{state="ready"}': "0x10 1x10"}, "5m", "15m"),
    Case("LoraplexNoActiveScheduler", {'loraplex_scheduler_active{instance="s:9152"}': "0x10 1x10"}, "5m", "15m"),
    Case(
        "LoraplexNotReady",
        {'loraplex_ready{instance="w:9160"}': "0x20 1x10", 'loraplex_draining{instance="w:9160"}': "0x30"},
        "10m",
        "25m",
        WORKER,
    ),
    Case("LoraplexQueueOld", {'loraplex_scheduler_oldest_request_age_seconds{model="m"}': "20x10 0x10"}, "5m", "15m"),
    Case(
        "LoraplexWorkerStalled",
        {
            'loraplex_worker_last_step_timestamp_seconds{instance="w:9160"}': "0x10 660+60x10",
            'loraplex_worker_running_requests{instance="w:9160"}': "1x30",
        },
        "5m",
        "15m",
        WORKER,
    ),
    Case(
        "LoraplexWorkerLost",
        {'loraplex_scheduler_worker_lost_total{reason="exit"}': "0x5 1x30"},
        "8m",
        "30m",
        {"reason": "exit"},
    ),
    Case(
        "LoraplexEngineRestarts",
        {'loraplex_worker_engine_restarts_total{instance="w:9160"}': "0x5 1x30"},
        "8m",
        "30m",
        WORKER,
    ),
    Case(
        "LoraplexPagesShort",
        {
            'loraplex_worker_pages{instance="w:9160",kind="free"}': "1x60 60x30",
            'loraplex_worker_pages{instance="w:9160",kind="kv"}': "99x60 40x30",
            'loraplex_worker_evictable_pages{instance="w:9160"}': "2x90",
            'loraplex_worker_preemptions_total{instance="w:9160"}': "0+30x90",
        },
        "40m",
        "75m",
        WORKER,
    ),
    Case("LoraplexAdapterDamaged", {'loraplex_store_verify_failures_total{stage="read"}': "0x5 1x40"}, "8m", "40m"),
    Case(
        "LoraplexAdapterThrash",
        {
            "loraplex_adapter_reloads_within_60s_total": "0+5x60 300+0x60",
            'loraplex_adapter_loads_total{to_tier="pages"}': "0+10x120",
        },
        "40m",
        "100m",
    ),
    Case("LoraplexTokenGap", {"loraplex_gateway_token_gaps_total": "0x5 1x30"}, "8m", "30m"),
    Case("LoraplexRedisDown", {"loraplex_redis_up": "0x20 1x10"}, "10m", "25m"),
    Case("LoraplexServingStaleMetadata", {"loraplex_store_index_age_seconds": "400x10 1x10"}, "5m", "15m"),
    Case(
        "LoraplexEventLoopLag",
        {
            'loraplex_event_loop_lag_seconds_bucket{instance="w:9160",le="0.1"}': "0+5x30 150+10x60",
            'loraplex_event_loop_lag_seconds_bucket{instance="w:9160",le="1.0"}': "0+10x90",
            'loraplex_event_loop_lag_seconds_bucket{instance="w:9160",le="+Inf"}': "0+10x90",
        },
        "20m",
        "60m",
        WORKER,
    ),
    Case(
        "LoraplexDiskFilling",
        {"loraplex_store_disk_free_bytes": "10x30 50x30", "loraplex_store_disk_size_bytes": "100x60"},
        "20m",
        "45m",
    ),
    Case(
        "LoraplexCertificateEnds",
        {'loraplex_tls_certificate_expiry_timestamp_seconds{instance="w:9160"}': "1000000x120 9000000x120"},
        "90m",
        "150m",
        WORKER,
    ),
    Case("LoraplexSeriesCap", {'loraplex_metrics_series{instance="w:9160"}': "4600x20 100x20"}, "10m", "30m", WORKER),
]
