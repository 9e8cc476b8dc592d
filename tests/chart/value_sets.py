"""Six ways to install the chart."""

from typing import Any

_CLAIM = {"accessMode": "ReadWriteMany"}

MINIMAL: dict[str, Any] = {}

GPU: dict[str, Any] = {
    "pools": [
        {
            "name": "big",
            "replicas": 4,
            "image": {"tag": "0.1.0-cuda"},
            "model": {"existingClaim": "llama", "name": "llama-3.1-8b"},
            "device": "cuda",
            "gpu": {"count": 1, "runtimeClassName": "nvidia"},
            "memory": "40GiB",
            "scheduling": {
                "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists"}],
                "nodeSelector": {"accelerator": "h100"},
            },
        }
    ]
}

HA: dict[str, Any] = {
    "gateway": {"replicas": 3, "pdb": {"minAvailable": 2}, "quota": {"requestsPerMinute": 600}},
    "scheduler": {"replicas": 2},
    "adapterStore": {"replicas": 2, "persistence": _CLAIM},
    "redis": {"bundled": {"enabled": True}},
    "pools": [{"name": "default", "replicas": 2}],
}

TLS: dict[str, Any] = {
    "tls": {"secret": "inner-tls"},
    "gateway": {
        "tls": {"secret": "gateway-tls"},
        "quota": {"tokensPerMinute": 100000},
        "ingress": {"enabled": True, "host": "lora.example", "tlsSecret": "lora-tls", "className": "nginx"},
    },
    "redis": {
        "external": {
            "url": "rediss://redis.example:6380/0",
            "username": "store",
            "passwordSecret": "redis",
            "tlsSecret": "redis-tls",
            "port": 6380,
        }
    },
}

EXTERNAL_REDIS: dict[str, Any] = {
    "adapterStore": {"replicas": 2, "persistence": _CLAIM},
    "redis": {"external": {"url": "redis://redis.example:6379/0", "passwordSecret": "redis", "cidr": "10.1.2.3/32"}},
}

EVERYTHING: dict[str, Any] = {
    "tls": {"issuer": {"name": "inner", "kind": "ClusterIssuer"}, "roles": True},
    "imagePullSecrets": [{"name": "pull"}],
    "images": {"control": {"digest": "sha256:" + "0" * 64}},
    "podAnnotations": {"team": "ml"},
    "podLabels": {"cost-center": "ml"},
    "gateway": {
        "replicas": 3,
        "tls": {"issuer": {"name": "public"}, "dnsNames": ["lora.example"], "ca": ""},
        "options": {"LORAPLEX_MAX_INFLIGHT_REQUESTS": "8192"},
        "service": {"type": "LoadBalancer", "annotations": {"a": "b"}},
        "ingress": {"enabled": True, "host": "lora.example", "tlsSecret": "lora-tls"},
        "route": {"enabled": True, "parentRefs": [{"name": "edge"}], "hostnames": ["lora.example"]},
        "autoscaling": {"enabled": True},
        "scheduling": {"priorityClassName": "high"},
    },
    "scheduler": {"replicas": 2, "scheduling": {"priorityClassName": "high"}},
    "adapterStore": {"replicas": 2, "persistence": {**_CLAIM, "storageClass": "nfs"}},
    "redis": {"bundled": {"enabled": True, "storageClass": "fast"}},
    "pools": [
        {
            "name": "scaled",
            "model": {"download": {"url": "https://models.example/m.tar", "sha256": "0" * 64}},
            "autoscaling": {"enabled": True, "prometheus": "http://prometheus.monitoring:9090"},
        },
        {"name": "plain", "replicas": 2, "options": {"LORAPLEX_MAX_SEQUENCES": "128"}},
    ],
    "networkPolicy": {
        "clients": [{"namespaceSelector": {"matchLabels": {"team": "apps"}}}],
        "scrapers": [{"namespaceSelector": {"matchLabels": {"name": "monitoring"}}}],
        "workerEgress": [{"to": [{"ipBlock": {"cidr": "10.9.0.0/16"}}], "ports": [{"protocol": "TCP", "port": 443}]}],
    },
    "metrics": {
        "monitor": "service",
        "labels": {"release": "prometheus"},
        "rules": True,
        "dashboards": True,
        "vllmNames": True,
    },
    "extraObjects": [{"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "extra"}, "data": {"a": "b"}}],
}

VALUE_SETS = {
    "minimal": MINIMAL,
    "gpu": GPU,
    "ha": HA,
    "tls": TLS,
    "external-redis": EXTERNAL_REDIS,
    "everything": EVERYTHING,
}
