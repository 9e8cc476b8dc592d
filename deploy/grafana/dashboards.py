"""The dashboards: `python -m deploy.grafana.dashboards` writes one JSON file beside this one for each.

A panel is a title, a unit, and expressions with their legends.
"""

from deploy.grafana.panels import Dashboard, Panel, mean, path_of, quantile, quantiles, rate, to_json

GATEWAY, SCHEDULER, WORKER = "loraplex_gateway", "loraplex_scheduler", "loraplex_worker"
ADAPTER, STORE = "loraplex_adapter", "loraplex_store"

OVERVIEW = Dashboard(
    "overview",
    "loraplex: overview",
    [
        Panel("Calls by outcome", "reqps", {"{{outcome}}": rate(f"{GATEWAY}_requests_total", "outcome")}),
        Panel(
            "Share of calls that failed by our fault", "percentunit", {"5 min": "loraplex:request_error_ratio:rate5m"}
        ),
        Panel(
            "Generate calls turned away, by why", "reqps", {"{{reason}}": rate(f"{GATEWAY}_rejections_total", "reason")}
        ),
        Panel("Quotas that one gateway checked alone", "reqps", {"requests": rate(f"{GATEWAY}_quota_fallbacks_total")}),
        Panel("Time to first token", "s", quantiles(f"{GATEWAY}_time_to_first_token_seconds")),
        Panel(
            "Time to first token, p99, by where the adapter was",
            "s",
            {"{{residency}}": quantile(0.99, f"{GATEWAY}_time_to_first_token_seconds", "residency")},
        ),
        Panel("Seconds between tokens", "s", quantiles(f"{GATEWAY}_inter_token_seconds")),
        Panel("Duration of generate calls", "s", quantiles(f"{GATEWAY}_request_duration_seconds")),
        Panel(
            "Tokens per second",
            "short",
            {
                "prompt": rate(f"{GATEWAY}_prompt_tokens_total"),
                "generated": rate(f"{GATEWAY}_generated_tokens_total"),
                "from the prefix cache": rate(f"{GATEWAY}_cached_tokens_total"),
            },
        ),
        Panel("Calls in flight", "short", {"{{method}}": f"sum by (method) ({GATEWAY}_inflight_requests)"}),
        Panel(
            "Busiest tenants",
            "reqps",
            {"{{tenant}}": f"topk(10, {rate(f'{GATEWAY}_requests_by_tenant_total', 'tenant')})"},
        ),
        Panel("Ready processes", "short", {"{{job}}": "sum by (job) (loraplex_ready)"}),
        Panel(
            "Until a certificate ends",
            "s",
            {"{{instance}}": "loraplex_tls_certificate_expiry_timestamp_seconds - time()"},
        ),
        Panel("Draining processes", "short", {"{{job}}": "sum by (job) (loraplex_draining)"}),
        Panel(
            "Streams: what must stay at zero",
            "short",
            {
                "gaps": rate(f"{GATEWAY}_token_gaps_total"),
                "duplicates dropped": rate(f"{GATEWAY}_duplicate_tokens_dropped_total"),
                "slow clients ended": rate(f"{GATEWAY}_slow_client_aborts_total"),
            },
        ),
        Panel(
            "Bytes that wait for clients",
            "bytes",
            {"{{instance}}": f"sum by (instance) ({GATEWAY}_stream_buffer_bytes)"},
        ),
        Panel(
            "Event loop lag, p99", "s", {"{{instance}}": quantile(0.99, "loraplex_event_loop_lag_seconds", "instance")}
        ),
        Panel(
            "Calls of all services, by code",
            "reqps",
            {
                "{{rpc_method}} {{rpc_response_status_code}}": rate(
                    "rpc_server_call_duration_seconds_count", "rpc_method, rpc_response_status_code"
                )
            },
        ),
        Panel("Series exposed", "short", {"{{instance}}": "sum by (instance) (loraplex_metrics_series)"}),
        Panel("Events under _other", "short", {"{{label}}": rate("loraplex_label_overflow_total", "label")}),
    ],
)

ADAPTERS = Dashboard(
    "adapters",
    "loraplex: adapters",
    [
        Panel(
            "Busiest adapters",
            "reqps",
            {"{{adapter}}": f"topk(10, {rate(f'{GATEWAY}_requests_by_adapter_total', 'adapter')})"},
        ),
        Panel(
            "Adapters by tier",
            "short",
            {"{{instance}} {{tier}}": f"sum by (instance, tier) ({ADAPTER}_resident_count)"},
        ),
        Panel("Adapters that operators pinned", "short", {"{{instance}}": f"{ADAPTER}_pinned_count"}),
        Panel(
            "Bytes of adapters by tier",
            "bytes",
            {
                "{{tier}}": f"sum by (tier) ({ADAPTER}_resident_bytes)",
                "{{tier}} at most": f"sum by (tier) ({ADAPTER}_capacity_bytes)",
            },
        ),
        Panel(
            "Loads",
            "ops",
            {"{{from_tier}} to {{to_tier}}": rate(f"{ADAPTER}_loads_total", "from_tier, to_tier")},
        ),
        Panel("Fetch seconds: store to host", "s", quantiles(f"{ADAPTER}_fetch_seconds")),
        Panel("Load seconds: host to pages", "s", {"{{rank_bucket}}": mean(f"{ADAPTER}_load_seconds", "rank_bucket")}),
        Panel(
            "Evictions, and loads within a minute of one",
            "ops",
            {"evictions": rate(f"{ADAPTER}_evictions_total"), "came back": rate(f"{ADAPTER}_reloads_within_60s_total")},
        ),
        Panel("Loads that failed, by reason", "ops", {"{{reason}}": rate(f"{ADAPTER}_load_failures_total", "reason")}),
        Panel("Adapters in the store", "short", {"adapters": f"max({STORE}_adapters)"}),
        Panel(
            "The store's disk",
            "bytes",
            {
                "adapters": f"max({STORE}_bytes)",
                "free": f"min({STORE}_disk_free_bytes)",
                "size": f"max({STORE}_disk_size_bytes)",
            },
        ),
        Panel("Uploads", "ops", {"{{result}} {{reason}}": rate(f"{STORE}_uploads_total", "result, reason")}),
        Panel("Fetches served by the store", "s", {"p99": quantile(0.99, f"{STORE}_fetch_seconds")}),
        Panel("Bytes sent to workers", "Bps", {"{{result}}": rate(f"{STORE}_fetch_bytes_total", "result")}),
        Panel(
            "Stored bytes that failed their sha256",
            "ops",
            {"{{stage}}": rate(f"{STORE}_verify_failures_total", "stage")},
        ),
        Panel("Redis", "short", {"up": "min(loraplex_redis_up)", "errors": rate("loraplex_redis_errors_total")}),
        Panel("Seconds of a command of Redis", "s", quantiles("loraplex_redis_command_seconds")),
        Panel("Age of the store's index", "s", {"{{instance}}": f"max by (instance) ({STORE}_index_age_seconds)"}),
    ],
)

MEMORY = Dashboard(
    "memory",
    "loraplex: memory",
    [
        Panel("Pages by kind", "short", {"{{kind}}": f"sum by (kind) ({WORKER}_pages)"}),
        Panel("Share of the pool that holds KV", "percentunit", {"{{instance}}": f"{WORKER}_kv_cache_usage_ratio"}),
        Panel(
            "Free or evictable",
            "percentunit",
            {
                "{{instance}}": f'(sum by (instance) ({WORKER}_pages{{kind="free"}}) '
                f"+ sum by (instance) ({WORKER}_evictable_pages)) / sum by (instance) ({WORKER}_pages)"
            },
        ),
        Panel(
            "Size of the pool",
            "bytes",
            {"{{instance}}": f"sum by (instance) ({WORKER}_pages) * on (instance) {WORKER}_page_bytes"},
        ),
        Panel("Preemptions", "ops", {"{{instance}}": rate(f"{WORKER}_preemptions_total", "instance")}),
        Panel(
            "Prefix cache: tokens",
            "short",
            {
                "looked up": rate(f"{WORKER}_prefix_cache_query_tokens_total"),
                "found": rate(f"{WORKER}_prefix_cache_hit_tokens_total"),
            },
        ),
        Panel("Resident memory of the processes", "bytes", {"{{instance}}": "process_resident_memory_bytes"}),
    ],
)

QUEUES = Dashboard(
    "scheduler",
    "loraplex: scheduler",
    [
        Panel("Queued requests", "short", {"requests": f"sum({SCHEDULER}_queued_requests)"}),
        Panel("Queued tokens", "short", {"tokens": f"sum({SCHEDULER}_queued_tokens)"}),
        Panel("Age of the oldest queued request", "s", {"age": f"max({SCHEDULER}_oldest_request_age_seconds)"}),
        Panel(
            "Queue wait, p99, by where the adapter was",
            "s",
            {"{{residency}}": quantile(0.99, f"{SCHEDULER}_queue_wait_seconds", "residency")},
        ),
        Panel(
            "Offers, by why the worker was chosen", "ops", {"{{reason}}": rate(f"{SCHEDULER}_dispatch_total", "reason")}
        ),
        Panel("Requests refused, by code", "ops", {"{{code}}": rate(f"{SCHEDULER}_refusals_total", "code")}),
        Panel(
            "Deficit of waiting tenants (s; vtc: tokens)",
            "short",
            {
                "{{tenant}}": f"max by (tenant) ({SCHEDULER}_fairness_deficit_seconds "
                f"or {SCHEDULER}_fairness_deficit_tokens)"
            },
        ),
        Panel("Seconds of a decision", "s", quantiles(f"{SCHEDULER}_decision_seconds")),
        Panel("Workers", "short", {"{{state}}": f"sum by (state) ({SCHEDULER}_workers)"}),
        Panel("Workers lost", "ops", {"{{reason}}": rate(f"{SCHEDULER}_worker_lost_total", "reason")}),
        Panel("Workers kept out", "ops", {"{{reason}}": rate(f"{SCHEDULER}_workers_fenced_total", "reason")}),
        Panel("Active scheduler", "short", {"{{instance}}": f"sum by (instance) ({SCHEDULER}_active)"}),
        Panel("Gateways", "short", {"connected": f"sum({SCHEDULER}_gateways)"}),
        Panel("Workers asked to register again", "ops", {"gaps": rate(f"{SCHEDULER}_residency_sync_gap_total")}),
    ],
)

WORKERS = Dashboard(
    "workers",
    "loraplex: workers",
    [
        Panel("Running sequences", "short", {"{{instance}}": f"sum by (instance) ({WORKER}_running_requests)"}),
        Panel("Waiting sequences", "short", {"{{instance}}": f"sum by (instance) ({WORKER}_waiting_requests)"}),
        Panel("Tokens per second", "short", {"{{phase}}": rate(f"{WORKER}_step_tokens_total", "phase")}),
        Panel("Seconds of a step, p50", "s", {"{{phase}}": quantile(0.5, f"{WORKER}_step_seconds", "phase")}),
        Panel("Seconds of a step, p99", "s", {"{{phase}}": quantile(0.99, f"{WORKER}_step_seconds", "phase")}),
        Panel(
            "Where the time of the steps goes",
            "percentunit",
            {"{{part}}": rate(f"{WORKER}_step_part_seconds_total", "part")},
        ),
        Panel("Calls of kernels", "ops", {"{{backend}}": rate(f"{WORKER}_kernel_calls_total", "backend")}),
        Panel("Sequences in a batch", "short", quantiles(f"{WORKER}_batch_size")),
        Panel("Distinct adapters in a batch", "short", quantiles(f"{WORKER}_batch_distinct_adapters")),
        Panel("Outputs by why they ended", "ops", {"{{reason}}": rate(f"{WORKER}_finish_total", "reason")}),
        Panel("Seconds since the last step", "s", {"{{instance}}": f"time() - {WORKER}_last_step_timestamp_seconds"}),
        Panel("Engines started again", "ops", {"{{instance}}": rate(f"{WORKER}_engine_restarts_total", "instance")}),
        Panel("Cores in use", "short", {"{{instance}}": "rate(process_cpu_seconds_total[$__rate_interval])"}),
        Panel("Workers by model", "short", {"{{model}} {{dtype}}": f"count by (model, dtype) ({WORKER}_info)"}),
        Panel("Versions", "short", {"{{version}}": "count by (version) (loraplex_build_info)"}),
        Panel(
            "Processes by their options", "short", {"{{job}} {{hash}}": "count by (job, hash) (loraplex_config_info)"}
        ),
    ],
)

DASHBOARDS = [OVERVIEW, ADAPTERS, MEMORY, QUEUES, WORKERS]

if __name__ == "__main__":
    for dashboard in DASHBOARDS:
        path_of(dashboard).write_text(to_json(dashboard), encoding="utf-8")
