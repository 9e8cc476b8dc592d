"""`loraplex explain`."""

import argparse
import os

from loraplex.calls import DEFAULT_TIMEOUT_SECONDS, calling
from loraplex.commands.memory import DEFAULT_SCHEDULER, SCHEDULER_VARIABLE
from loraplex.commands.terminal import tls_of, tls_options
from loraplex.v1 import scheduler_pb2, scheduler_pb2_grpc

_EPILOG = """\
examples:
  loraplex explain 5f1c0d2e                                  why is this request where it is, or how did it go?
  loraplex explain 5f1c0d2e --scheduler 10.0.0.7:50052       ask another scheduler
The id is the `request_id` of the answer, or the `x-request-id` that the client sent.
"""


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "explain",
        parents=[tls_options()],
        help="say why a request waits, or how it went",
        description="Asks the scheduler where a request is and why. Of requests that have ended lately it says\n"
        "how long each part took.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("request_id", metavar="REQUEST_ID")
    parser.add_argument(
        "--scheduler",
        metavar="HOST:PORT",
        default=os.environ.get(SCHEDULER_VARIABLE, DEFAULT_SCHEDULER),
        help=f"whom to ask [%(default)s; set by {SCHEDULER_VARIABLE}]",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    address = arguments.scheduler
    with tls_of(arguments).channel(address) as channel, calling(address) as metadata:
        answer = scheduler_pb2_grpc.SchedulerServiceStub(channel).Explain(
            scheduler_pb2.ExplainRequest(request_id=arguments.request_id),
            timeout=DEFAULT_TIMEOUT_SECONDS,
            metadata=metadata,
        )
    print("\n".join(answer.sentences))
    return 0
