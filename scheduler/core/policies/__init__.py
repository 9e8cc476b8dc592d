"""Who goes first: one small protocol, and a class for each name of the setting `policy`."""

from scheduler.core.clock import Clock
from scheduler.core.costs import CostModel
from scheduler.core.ledger import Ledger
from scheduler.core.policies.arrival import Cluster, EarlyAbort, FirstCome, LastCome
from scheduler.core.policies.fair import Fair
from scheduler.core.policies.protocol import Policy
from scheduler.core.policies.vtc import VirtualTokenCounter
from scheduler.core.settings import Settings


def make_policy(settings: Settings, costs: CostModel, clock: Clock) -> Policy:
    """The policy that the settings name; `costs` is the model of a step that prices service."""
    match settings.policy:
        case "fcfs":
            return FirstCome()
        case "lcfs":
            return LastCome()
        case "abort":
            return EarlyAbort()
        case "cluster":
            return Cluster()
        case "vtc":
            return VirtualTokenCounter(Ledger(settings.tenant_weights))
        case _:
            return Fair(Ledger(settings.tenant_weights, clock, settings.session_grace_seconds), costs)
