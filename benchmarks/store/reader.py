"""One reader of packed weights: `python -m benchmarks.store.reader ADDRESS VERSION TIMES`; prints the bytes it got."""

import asyncio
import sys

from benchmarks.store.volume import TENANT
from common.channel import connect
from loraplex.v1 import adapter_store_pb2 as pb
from loraplex.v1 import adapter_store_pb2_grpc


async def read(address: str, version: str, times: int) -> int:
    received = 0
    async with connect(address) as channel:
        stub = adapter_store_pb2_grpc.AdapterStoreServiceStub(channel)
        for _ in range(times):
            request = pb.FetchWeightsRequest(tenant=TENANT, adapter_version=version)
            async for response in stub.FetchWeights(request):
                received += len(response.chunk.data)
    return received


if __name__ == "__main__":
    print("go", flush=True)
    sys.stdin.readline()
    print(asyncio.run(read(sys.argv[1], sys.argv[2], int(sys.argv[3]))))
