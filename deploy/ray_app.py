"""visavis on Ray Serve: as many replicas of the server as the load needs, on many machines.

    pip install 'visavis[serve]' 'ray[serve]'
    VISAVIS_CONFIG=deploy/serve.yaml serve run deploy.ray_app:app

Each replica is a whole server with its own models; Ray's proxies spread the requests. The replicas
keep no state, so any of them answers any request, and an index is read by all of them (add to it
with one writer, `visavis index add`). Requests that a dying replica had not answered get status
500 or a broken connection, never a wrong or half answer with status 200 and its end; clients that
retry (OpenAI's do, twice) see nothing of it.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ray import serve

MAX_ONGOING = 64  # requests of one replica; more wait at the proxies


def build() -> Any:
    """Return the server's ASGI application, in the process of a replica."""
    from visavis.serve.app import create_app
    from visavis.serve.config import hash_key, make_config, read_config

    settings = read_config(Path(os.environ["VISAVIS_CONFIG"]))
    if key := os.environ.get("VISAVIS_API_KEY"):
        settings["api_keys"] = [*settings.get("api_keys", []), hash_key(key)]
    return create_app(make_config(settings))


deployment: Any = serve.deployment(
    serve.ingress(build)(),
    name="visavis",
    max_ongoing_requests=MAX_ONGOING,
    graceful_shutdown_timeout_s=30,
    health_check_period_s=5,
    health_check_timeout_s=30,
    autoscaling_config={
        "min_replicas": int(os.environ.get("VISAVIS_MIN_REPLICAS", "1")),
        "max_replicas": int(os.environ.get("VISAVIS_MAX_REPLICAS", "8")),
        "target_ongoing_requests": MAX_ONGOING // 4,
    },
    ray_actor_options={
        "num_cpus": float(os.environ.get("VISAVIS_REPLICA_CPUS", "4")),
        "num_gpus": float(os.environ.get("VISAVIS_REPLICA_GPUS", "0")),
    },
)
app = deployment.bind()
