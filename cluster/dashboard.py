"""The way to a Ray cluster's jobs: its address, and a client for it that is known to work.

Whatever is wrong (no cluster, another server, a token, a version) is one ConfigError within seconds. Ray's own client
sends requests without a time limit, so the address is tried here first.
"""

from __future__ import annotations

import http.client
import json
import logging
import os
import socket
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from talk_dist.errors import ConfigError

VARIABLES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
CONNECT_SECONDS, ANSWER_SECONDS = 3.0, 10.0
CHATTY = (
    "dashboard.modules.dashboard_sdk",
    "dashboard.modules.job.sdk",
    "_private.runtime_env.working_dir",
    "_private.runtime_env.packaging",
)
"""Ray's loggers that tell every step of an upload, each ignore file, and when a log is closed."""
TOKEN = "RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH to a file that holds it"


def address_of(given: str | None) -> str:
    """The dashboard's URL: what was given, or what the environment names. Raises ConfigError if that is none."""
    named = given or next((os.environ[v] for v in VARIABLES if os.environ.get(v, "").startswith("http")), "")
    if not named:
        raise ConfigError("give the cluster's dashboard: --address http://HEAD:8265, or RAY_API_SERVER_ADDRESS")
    if "://" not in named and ":" in named:
        named = f"http://{named}"
    parts = urlsplit(named)
    try:
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is no number
        usable = False
    if not usable:
        raise ConfigError(f"--address {named}: give the dashboard as http://HEAD:8265 (8265 is its usual port)")
    return named.rstrip("/")


def reach(address: str) -> None:
    """Raises ConfigError unless something accepts connections at ``address`` within three seconds."""
    parts = urlsplit(address)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    try:
        socket.create_connection((str(parts.hostname), port), timeout=CONNECT_SECONDS).close()
    except OSError as error:
        raise ConfigError(
            f"no cluster answers at {address} ({error.strerror or error}); is it running, and is its dashboard "
            f"reachable from here (ssh -L 8265:localhost:8265 HEAD, kubectl port-forward)?"
        ) from error


def asks_for_token(address: str) -> bool:
    """Whether the dashboard at ``address`` wants a token. Raises ConfigError if there is no dashboard."""
    other = f"{address} is not a Ray dashboard"
    try:
        with urllib.request.urlopen(f"{address}/api/version", timeout=ANSWER_SECONDS) as answer:
            if "ray_version" in json.load(answer):
                return False
    except urllib.error.HTTPError as error:
        if error.code in (401, 403) and b"authentication token" in error.read(1000):
            return True
        raise ConfigError(f"{other} (HTTP {error.code} for /api/version); its usual port is 8265") from error
    except (OSError, ValueError, http.client.HTTPException) as error:  # no answer in time, not JSON, not HTTP
        raise ConfigError(f"{other} ({type(error).__name__} for /api/version); its usual port is 8265") from error
    raise ConfigError(f"{other} (it tells no version of Ray); its usual port is 8265")


def probe(address: str) -> None:
    """Raises ConfigError unless a Ray dashboard is at ``address``, and a token here if it asks for one.

    Before Ray is imported, which settles then whether it sends tokens: the cluster decides that, not RAY_AUTH_MODE.
    """
    reach(address)
    if asks_for_token(address):
        if not _token():
            raise ConfigError(f"the cluster at {address} asks for a token, and there is none here; set {TOKEN}")
        os.environ["RAY_AUTH_MODE"] = "token"


def _token() -> str:
    """The token that Ray will find. Looked for here too: Ray ends the process if RAY_AUTH_TOKEN_PATH has none."""
    if token := os.environ.get("RAY_AUTH_TOKEN", "").strip():
        return token
    try:
        path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token").expanduser()
        return path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return ""


def connect(address: str) -> Any:
    """A JobSubmissionClient of the probed cluster at ``address``, which runs our version of Ray. Raises ConfigError."""
    os.environ["RAY_API_SERVER_ADDRESS"] = address  # Ray prefers this, and RAY_ADDRESS, to what its client is given
    try:
        import ray
        from ray.job_submission import JobSubmissionClient
    except ImportError as error:
        raise ConfigError("Ray is not installed here: pip install 'talk-dist[ray]'") from error
    for name in CHATTY:
        logging.getLogger(f"ray.{name}").setLevel(logging.ERROR)
    with plainly(address):
        client = JobSubmissionClient(address)
    theirs = getattr(client, "_server_ray_version", None) or ray.__version__
    if theirs != ray.__version__:
        raise ConfigError(
            f"the cluster at {address} runs Ray {theirs}, this machine Ray {ray.__version__}; use the same on both "
            f"(here: pip install 'ray[default]=={theirs}')"
        )
    return client


@contextmanager
def plainly(address: str) -> Iterator[None]:
    """What Ray's client and its HTTP library raise, as one ConfigError of one line."""
    from ray.exceptions import AuthenticationError

    try:
        yield
    except AuthenticationError as error:
        source = "RAY_AUTH_TOKEN" if os.environ.get("RAY_AUTH_TOKEN") else "the token file"
        raise ConfigError(f"the cluster at {address} refuses the token of {source}; set {TOKEN}") from error
    except (RuntimeError, OSError) as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        words = lines[0] if lines else type(error).__name__
        last = f" … {lines[-1].strip()}" if len(lines) > 1 else ""  # of a traceback that the server sent
        raise ConfigError(f"the cluster at {address} did not do it: {words}{last}") from error
