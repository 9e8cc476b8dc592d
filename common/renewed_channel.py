"""A channel whose certificate may be replaced on disk: later calls show the new one, those under way go on."""

import asyncio
from collections import Counter
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

import grpc

from common.tls import Pem, RenewedPem


class RenewedChannel(grpc.aio.Channel):
    """gRPC has no channel whose own certificate changes, so each certificate has a channel of its own."""

    def __init__(self, renewed: RenewedPem, dial: Callable[[Pem], grpc.aio.Channel]) -> None:
        self._renewed = renewed
        self._dial = dial
        self._channel = dial(renewed.pem)
        # Channel -> calls under way; those of earlier certificates go with their last call.
        self._calls: Counter[grpc.aio.Channel] = Counter()
        self._closing: set[asyncio.Task[None]] = set()

    def unary_unary(self, *method: Any, **options: Any) -> Any:
        return self._calling("unary_unary", method, options)

    def unary_stream(self, *method: Any, **options: Any) -> Any:
        return self._calling("unary_stream", method, options)

    def stream_unary(self, *method: Any, **options: Any) -> Any:
        return self._calling("stream_unary", method, options)

    def stream_stream(self, *method: Any, **options: Any) -> Any:
        return self._calling("stream_stream", method, options)

    def _calling(self, kind: str, method: tuple[Any, ...], options: dict[str, Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            channel = self._current()
            made = getattr(channel, kind)(*method, **options)(*arguments, **keywords)
            self._calls[channel] += 1
            made.add_done_callback(lambda _: self._ended(channel))
            return made

        return call

    def _current(self) -> grpc.aio.Channel:
        if self._renewed.renew():
            earlier, self._channel = self._channel, self._dial(self._renewed.pem)
            self._let_go(earlier)
        return self._channel

    def _ended(self, channel: grpc.aio.Channel) -> None:
        self._calls[channel] -= 1
        if channel is not self._channel:
            self._let_go(channel)

    def _let_go(self, channel: grpc.aio.Channel) -> None:
        if not self._calls[channel]:
            del self._calls[channel]
            closing = asyncio.ensure_future(channel.close())
            self._closing.add(closing)
            closing.add_done_callback(self._closing.discard)

    def get_state(self, try_to_connect: bool = False) -> grpc.ChannelConnectivity:
        return self._channel.get_state(try_to_connect)

    async def wait_for_state_change(self, last_observed_state: grpc.ChannelConnectivity) -> None:
        await self._channel.wait_for_state_change(last_observed_state)

    async def channel_ready(self) -> None:
        await self._channel.channel_ready()

    async def close(self, grace: float | None = None) -> None:
        """Cancels what is under way, on earlier channels too."""
        for channel in {*self._calls, self._channel}:
            await channel.close(grace)
        await asyncio.gather(*self._closing)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()
