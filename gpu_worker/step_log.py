"""One JSON line a step, for people who ask what a batch looked like and where its time went."""

import json
from pathlib import Path

from google.protobuf.json_format import MessageToDict

from loraplex.v1 import engine_pb2


class StepLog:
    """Writes to a file, or nowhere."""

    def __init__(self, path: Path | None) -> None:
        # Line buffered: the last step before a crash is on disk.
        self._file = path.open("a", buffering=1, encoding="utf-8") if path else None

    def write(self, step_number: int, stats: engine_pb2.StepStats) -> None:
        if self._file:
            fields = MessageToDict(stats, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)
            # protobuf writes 64-bit integers as strings
            fields["context_tokens"] = stats.context_tokens
            fields["adapter_loads"] = stats.adapter_loads
            fields["adapter_evictions"] = stats.adapter_evictions
            self._file.write(json.dumps({"step": step_number, **fields}) + "\n")

    def close(self) -> None:
        if self._file:
            self._file.close()
