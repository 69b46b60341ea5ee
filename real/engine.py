"""Who does the tasks of the data stages: processes of this machine, or a Ray cluster with the same tasks.

A task is a function of files that are named by path, and what it leaves are files, so an engine only has to call it somewhere where the
same paths lead to the same files: a cluster's servers share the folders of the corpus and of the run.
"""

import os
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from conf.errors import Refused
from conf.plan import Plan
from real.maintext import LIBRARIES
from real.stage import workers

ATTEMPTS = 3  # after a worker or its server is lost
WAIT = 10  # seconds for a cluster's first word


@contextmanager
def engine(plan: Plan) -> Iterator[Executor]:
    """The pool that the plan asks for.

    Raises Refused where Ray is asked for and not installed.
    """
    cluster = plan.cluster
    if plan.data.dedup == "minhash":
        import scipy.sparse.csgraph  # noqa: F401  the components are found here: imported before the stages are timed
    with _ray() if plan.data.runner == "ray" else workers(min(cluster.gpus_per_node, cluster.cores_per_node), _modules(plan)) as pool:
        yield pool


def _modules(plan: Plan) -> list[str]:
    """What the workers will need: imported while they start, it is in no stage's time."""
    hashes = ["pandas.util"] if plan.data.dedup == "minhash" or plan.data.substrings else []
    library = LIBRARIES.get(plan.data.extractor)
    return ["pyarrow.parquet", "tokenizers", "real.extract", "real.dedup", "real.tokens", *hashes, *([library] if library else [])]


class RayPool(Executor):
    """Ray as an executor: `submit` calls a function on some worker of the cluster, in this process's working folder."""

    def __init__(self) -> None:
        import ray

        quiet = {"include_dashboard": False, "log_to_driver": False, "logging_level": "error"}
        ray.init(**quiet if "RAY_ADDRESS" not in os.environ else {"log_to_driver": False, "logging_level": "error"})
        self.call = ray.remote(max_retries=ATTEMPTS)(_there)

    def submit(self, work: Callable[..., Any], /, *arguments: Any, **named: Any) -> Future[Any]:
        future: Future[Any] = self.call.remote(str(Path.cwd()), work, arguments, named).future()
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        import ray

        ray.shutdown()


def _ray() -> RayPool:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is reported to anybody
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    address = os.environ.get("RAY_ADDRESS", "")
    try:
        _knock(address)
        return RayPool()
    except ImportError as error:
        raise Refused("data.runner=ray needs ray, which is not installed; pip install 'foretold[cluster]'") from error
    except OSError as error:
        raise Refused(f"RAY_ADDRESS={address}: no Ray cluster answers there ({error}); start one, or unset it") from error


def _knock(address: str) -> None:
    """Raises OSError where nobody listens: Ray itself would go on trying for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), timeout=WAIT).close()


def _there(folder: str, work: Callable[..., Any], arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
    os.chdir(folder)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    return work(*arguments, **named)
