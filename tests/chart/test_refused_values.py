"""Each value that cannot work is refused while rendering, with a sentence that says why."""

import re
from typing import Any

import helm_python
import pytest

from tests.chart.rendering import CHART, render

pytestmark = pytest.mark.deploy


def pool(**values: Any) -> dict[str, Any]:
    return {"pools": [{"name": "p", **values}]}


def scaled(**values: Any) -> dict[str, Any]:
    return pool(autoscaling={"enabled": True, **values})


_SECRETS = {"adapterStore": {"replicas": 2, "persistence": {"accessMode": "ReadWriteMany"}}}
_BUNDLED = {"redis": {"bundled": {"enabled": True}}}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "grace of the gateway": ({"gateway": {"terminationGracePeriodSeconds": 75}}, "must exceed preStopSeconds"),
    "grace of the scheduler": ({"scheduler": {"drainSeconds": 10}}, "scheduler: terminationGracePeriodSeconds is 20"),
    "grace of the store": ({"adapterStore": {"drainSeconds": 40}}, "adapterStore: terminationGracePeriodSeconds"),
    "grace of a pool": (pool(drainSeconds=140), "pool p: terminationGracePeriodSeconds is 150"),
    "gateway budget": ({"gateway": {"replicas": 2, "pdb": {"minAvailable": 2}}}, "no node could ever be drained"),
    "store budget": (
        {**_SECRETS, **_BUNDLED, "adapterStore": {**_SECRETS["adapterStore"], "pdb": {"minAvailable": 2}}},
        "adapterStore: pdb.minAvailable is 2 of 2",
    ),
    "gateway scaling": ({"gateway": {"autoscaling": {"enabled": True, "minReplicas": 9, "maxReplicas": 8}}}, "exceeds"),
    "ingress without a secret": ({"gateway": {"ingress": {"enabled": True, "host": "h"}}}, "TLS needs tlsSecret"),
    "route without a gateway": ({"gateway": {"route": {"enabled": True}}}, "parentRefs names no Gateway"),
    "stores without Redis": (_SECRETS, "more than one replica needs Redis"),
    "stores on one node's volume": ({"adapterStore": {"replicas": 2}, **_BUNDLED}, "needs a ReadWriteMany volume"),
    "roles of nobody": ({"tls": {"secret": "s", "mutual": False, "roles": True}}, "tls.roles needs tls.mutual"),
    "two Redis": ({"redis": {"bundled": {"enabled": True}, "external": {"url": "redis://r:1/0"}}}, "two sources"),
    "Redis TLS in the clear": ({"redis": {"external": {"url": "redis://r:1/0", "tlsSecret": "s"}}}, "rediss://"),
    "credentials in an address": ({"redis": {"external": {"url": "redis://u:p@r:1/0"}}}, "holds credentials"),
    "two pools of a name": ({"pools": [{"name": "p"}, {"name": "p"}]}, "two pools are called p"),
    "two models": (
        pool(model={"existingClaim": "c", "download": {"url": "https://m", "sha256": "0" * 64}}),
        "two sources of one model",
    ),
    "a model without a checksum": (pool(model={"download": {"url": "https://m"}}), "needs model.download.sha256"),
    "cuda without a GPU": (pool(device="cuda"), "gpu.count"),
    "scaling on nothing": (scaled(), "needs autoscaling.prometheus"),
    "scaling upside down": (scaled(prometheus="http://p", minReplicas=5), "exceeds maxReplicas"),
    "an unknown key": ({"gatway": {}}, "gatway"),
    "an unknown key deep down": (pool(modell={}), "modell"),
    "a standby without Redis": ({"scheduler": {"replicas": 2}}, "a standby needs Redis"),
    "scheduler budget": (
        {"scheduler": {"replicas": 2, "pdb": {"minAvailable": 2}}, **_BUNDLED},
        "scheduler: pdb.minAvailable is 2 of 2",
    ),
    "a third scheduler": ({"scheduler": {"replicas": 3}, **_BUNDLED}, "/scheduler/replicas"),
    "no pool": ({"pools": []}, "/pools"),
    "a pool without a name": ({"pools": [{}]}, "name"),
    "an option that is none": ({"gateway": {"options": {"PATH": "/"}}}, "invalid propertyName 'PATH'"),
    "a digest that is none": ({"images": {"control": {"digest": "sha256:0"}}}, "/images/control/digest"),
}


@pytest.mark.parametrize(("values", "sentence"), REFUSED.values(), ids=REFUSED)
def test_the_value_is_refused(values: dict[str, Any], sentence: str) -> None:
    with pytest.raises(helm_python.HelmError) as refusal:
        render(values)
    assert sentence in str(refusal.value)


def test_every_failure_of_a_template_has_a_case() -> None:
    messages = []
    for values, _ in REFUSED.values():
        with pytest.raises(helm_python.HelmError) as refusal:
            render(values)
        messages.append(str(refusal.value))
    templates = "".join(path.read_text(encoding="utf-8") for path in sorted(CHART.glob("templates/*.*")))
    sentences = re.findall(r'fail (?:\(printf )?"([^"]+)"', templates)
    assert len(sentences) == templates.count("fail ") >= 19
    fixed = [max(re.split("%[ds]", sentence), key=len) for sentence in sentences]
    assert [text for text in fixed if not any(text in message for message in messages)] == []
