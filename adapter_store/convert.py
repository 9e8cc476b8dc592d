"""From the store's records to the messages of the wire."""

from collections.abc import Iterable, Iterator

from adapter_store.blobs import CHAT_TEMPLATE, CONFIG, WEIGHTS
from adapter_store.registry import Alias, Change, Changes
from common.wire import dtype_to_proto, module_to_proto
from loraplex.v1 import adapter_store_pb2 as pb

# A receiver takes 4 MiB; a chat template may make one adapter 64 KiB large.
MAX_RESPONSE_BYTES = 1024 * 1024
MAX_CHUNK_BYTES = 1024 * 1024

# In the order in which they are given back.
FILES = {
    pb.ADAPTER_FILE_CONFIG: CONFIG,
    pb.ADAPTER_FILE_WEIGHTS: WEIGHTS,
    pb.ADAPTER_FILE_CHAT_TEMPLATE: CHAT_TEMPLATE,
}


def adapter_to_proto(alias: Alias) -> pb.Adapter:
    version = alias.version
    modules = [
        pb.ModuleEffect(
            module=module_to_proto(effect.module),
            num_layers=effect.num_layers,
            min_lora_rank=effect.min_lora_rank,
            max_lora_rank=effect.max_lora_rank,
            parameter_bytes=effect.parameter_bytes,
            delta_norm=effect.delta_norm,
        )
        for effect in version.modules
    ]
    return pb.Adapter(
        tenant=alias.tenant,
        adapter_id=alias.adapter_id,
        adapter_version=version.digest,
        base_model=version.base_model,
        dtype=dtype_to_proto(version.dtype),
        packed_bytes=version.packed_bytes,
        max_lora_rank=version.max_lora_rank,
        modules=modules,
        created_at_seconds=alias.created_at,
        sequence=alias.sequence,
        chat_template=version.chat_template,
    )


def change_to_proto(change: Change) -> pb.AdapterChange:
    if change.alias is None:
        removal = pb.AdapterRemoval(tenant=change.tenant, adapter_id=change.adapter_id)
        return pb.AdapterChange(sequence=change.sequence, removal=removal)
    return pb.AdapterChange(sequence=change.sequence, put=adapter_to_proto(change.alias))


def page_to_proto(aliases: Iterable[Alias], page_size: int) -> pb.ListAdaptersResponse:
    """As many aliases as fit a page; the token is the last id of a page that is not the last."""
    response, size_bytes = pb.ListAdaptersResponse(), 0
    for alias in aliases:
        adapter = adapter_to_proto(alias)
        size_bytes += adapter.ByteSize()
        if len(response.adapters) == page_size or (response.adapters and size_bytes > MAX_RESPONSE_BYTES):
            response.next_page_token = response.adapters[-1].adapter_id
            break
        response.adapters.append(adapter)
    return response


def changes_to_proto(changes: Changes) -> Iterator[pb.WatchAdaptersResponse]:
    """Batches of a size that a receiver takes. The first tells of a resync, even with nothing in it."""
    response = pb.WatchAdaptersResponse(resync=changes.resync)
    size_bytes = 0
    for change in changes.changes:
        message = change_to_proto(change)
        size_bytes += message.ByteSize()
        if response.changes and size_bytes > MAX_RESPONSE_BYTES:
            yield response
            response, size_bytes = pb.WatchAdaptersResponse(), message.ByteSize()
        response.changes.append(message)
    if response.changes or response.resync:
        yield response
