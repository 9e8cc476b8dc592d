"""A worker's figures under vLLM's names, for the Kubernetes inference extension, llm-d and boards made for vLLM.

The model server protocol of the Gateway API inference extension asks for requests waiting and running, the usage of the
KV cache, and one live `vllm:lora_requests_info` series whose value is the Unix time. By its words
`running_lora_adapters` are those "loaded in GPU memory and ready to serve": here, the adapters in pages.
"""

from collections import OrderedDict

from prometheus_client import CollectorRegistry, Gauge

from gpu_worker.residency import Residency
from loraplex.v1 import engine_pb2, scheduler_pb2, types_pb2

# Adapters named in one series at most, and reported as the most there can be: pages set no number of their own.
MAX_NAMED_ADAPTERS = 64
# Adapters whose names are remembered.
_KNOWN_ADAPTERS = 4096

_WAITING = (scheduler_pb2.REQUEST_STATE_WAITING, scheduler_pb2.REQUEST_STATE_PREEMPTED)


class VllmMetrics:
    """Fed with offers and step reports; every method is called from the event loop."""

    def __init__(self, registry: CollectorRegistry) -> None:
        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(f"vllm:{name}", text, labels, registry=registry)

        self._model = ""
        self._waiting = gauge("num_requests_waiting", "Sequences in the local queue", "model_name")
        self._running = gauge("num_requests_running", "Sequences that hold pages", "model_name")
        self._usage = gauge("kv_cache_usage_perc", "Share of the pool that holds KV, 0 to 1", "model_name")
        self._cache = gauge("cache_config_info", "1, with the pool's sizes", "block_size", "num_gpu_blocks")
        labels = ("max_lora", "running_lora_adapters", "waiting_lora_adapters")
        self._lora = gauge("lora_requests_info", "Unix time of the last change of the lists", *labels)
        self._shown: tuple[str, ...] | None = None
        # digest -> id, most recently offered last
        self._names: OrderedDict[str, str] = OrderedDict()
        # (tenant, request id, attempt) -> digest of a request in the local queue
        self._queued: dict[tuple[str, str, int], str] = {}

    def serves(self, ready: engine_pb2.EngineReady) -> None:
        """The first engine is ready: the model's name and the pool's sizes are known."""
        self._model = ready.model.name
        self._cache.labels(str(ready.capacity.page_size), str(ready.capacity.num_pages)).set(1)

    def offered(self, request: types_pb2.RequestSpec) -> None:
        """A request was offered to this worker."""
        if request.adapter_version:
            self._names[request.adapter_version] = request.adapter_id
            self._names.move_to_end(request.adapter_version)
            if len(self._names) > _KNOWN_ADAPTERS:
                self._names.popitem(last=False)

    def step(self, report: scheduler_pb2.StepReport, residency: Residency, now: float) -> None:
        """Shows what a step reports; `now` is Unix time in seconds."""
        self._waiting.labels(self._model).set(report.waiting_sequences)
        self._running.labels(self._model).set(report.running_sequences)
        self._usage.labels(self._model).set(report.memory.kv_pages / max(1, report.memory.total_pages))
        for progress in report.progress:
            key = progress.key.tenant, progress.key.request_id, progress.key.attempt
            if progress.state in _WAITING and progress.adapter_version:
                self._queued[key] = progress.adapter_version
            else:
                self._queued.pop(key, None)
        if report.progress or report.residency or self._shown is None:
            self._show(residency, now)

    def _show(self, residency: Residency, now: float) -> None:
        recent = reversed(self._names.items())
        loaded = [name for digest, name in recent if digest in residency][:MAX_NAMED_ADAPTERS]
        queued = dict.fromkeys(self._names[digest] for digest in self._queued.values() if digest in self._names)
        waiting = list(queued)[:MAX_NAMED_ADAPTERS]
        shown = (str(MAX_NAMED_ADAPTERS), ",".join(loaded), ",".join(waiting))
        if shown != self._shown and self._shown is not None:
            self._lora.remove(*self._shown)
        self._shown = shown
        self._lora.labels(*shown).set(now)
