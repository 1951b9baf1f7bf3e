"""Several copies of a model behind one front end: Ray Serve runs, watches and replaces them, on one machine or many.

The front end (the HTTP interface with its keys, limits and metrics, or the demo) stays one process, which asks the
replicas through the engine's interface. So whatever holds for one model holds for many, nothing of Ray's is reachable
for clients, and requests that are refused never come near a replica.
"""

import contextlib
import importlib.util
import logging
import os
import secrets
from collections.abc import Iterator, Mapping
from typing import Any

from llava_saep.errors import UserError
from llava_saep.serve.replica_settings import ReplicaSettings
from llava_saep.serve.replicated import ReplicatedEngine

_OBJECT_STORE_BYTES = 512 * 2**20
"""Shared memory through which questions with large images go; what does not fit goes through files."""


@contextlib.contextmanager
def deployed(
    folders: Mapping[str, str], replicas: ReplicaSettings, /, **arguments: Any
) -> Iterator[dict[str, ReplicatedEngine]]:
    """Start replicas of each model, wait until they are ready, and end them afterwards.

    With RAY_ADDRESS in the environment they run on the cluster there, else on a Ray of this machine alone, which ends
    with them.

    Args:
        folders: by the models' names: at the same path on every machine, or hub names.
        replicas: of each model.
        arguments: as for `LocalEngine.from_pretrained`.
    Yields:
        an engine for each name.
    Raises:
        UserError: Ray is not installed or cannot be started, there are too few processors, or a replica cannot load
            its model.
    """
    ray = _import_ray()
    is_own = not os.environ.get("RAY_ADDRESS")
    with contextlib.ExitStack() as started:
        _start_ray(ray, is_own)
        started.callback(_stop_ray, ray, is_own)
        resources = _replica_resources(ray.cluster_resources(), replicas, len(folders), arguments.get("device"))
        engines = {}
        for model_id, folder in folders.items():
            name = f"llava-saep-{model_id}"
            started.callback(_delete_application, ray, name)
            handle = _run_application(ray, name, (folder, model_id, arguments), replicas, resources)
            engines[model_id] = ReplicatedEngine(handle, handle.describe.remote().result())
        yield engines


def _import_ray() -> Any:
    if importlib.util.find_spec("ray") is None:
        raise UserError(
            '--replicas needs Ray Serve, which is not installed; in the repository: pip install -e ".[serve]"'
        )
    os.environ |= _environment(os.environ)  # Ray reads it when it is imported
    import ray
    import ray.serve

    return ray


def _environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Variables for Ray: no reports to anybody, and a Ray of this machine alone that only this program can use."""
    added = {"RAY_USAGE_STATS_ENABLED": "0"}
    if environment.get("RAY_ADDRESS"):
        return added
    # Gives it the loopback address. Else its ports, through which code can be run, are open to the network.
    added["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    if "RAY_AUTH_MODE" not in environment:
        # A token of this run's own; Ray would write one into the home folder, for all to read.
        added |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    return added


def _start_ray(ray: Any, is_own: bool) -> None:
    quiet = {"namespace": "serve", "logging_level": logging.WARNING, "log_to_driver": False}
    if is_own:
        quiet |= {"address": "local", "include_dashboard": False, "object_store_memory": _OBJECT_STORE_BYTES}
    try:
        ray.init(**quiet)
        ray.serve.start(proxy_location="Disabled", logging_config={"log_level": "WARNING"})
    except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
        where = "could not be started" if is_own else f"cannot be reached at RAY_ADDRESS={os.environ['RAY_ADDRESS']}"
        raise UserError(f"Ray {where}: {error}") from error


def _run_application(ray: Any, name: str, model: tuple, settings: ReplicaSettings, resources: dict[str, float]) -> Any:
    """Start the replicas of one model, and return the handle through which they are asked.

    Args:
        model: the first arguments of `ModelReplica`.
    """
    from llava_saep.serve.replica import ModelReplica

    deployment = ray.serve.deployment(
        ModelReplica, name="model", ray_actor_options=resources, **_deployment_options(settings)
    )
    try:
        application = deployment.bind(*model, settings.max_ongoing_requests)
        return ray.serve.run(application, name=name, route_prefix=None)
    except RuntimeError as error:
        raise UserError(f"no replica could load {model[0]}: {_failure(ray, name) or error}") from error


def _deployment_options(settings: ReplicaSettings) -> dict[str, Any]:
    """Ray Serve's options of the deployment, without the resources."""
    options = {
        "max_ongoing_requests": settings.max_ongoing_requests,
        "max_queued_requests": settings.max_queued_requests,
        "health_check_period_s": 5,
        "graceful_shutdown_timeout_s": 10,
        "max_constructor_retry_count": 1,
        "request_router_config": {
            "request_router_class": "llava_saep.serve.replica:ConversationRouter",
            "request_router_kwargs": {"num_fallback_replicas": settings.most_replicas},
            # While all are busy, ask often: a wait between two answers is time in which a model does nothing.
            "max_backoff_s": 0.1,
        },
    }
    if settings.max_replicas is None:
        return {**options, "num_replicas": settings.replicas}
    autoscaling = {
        "min_replicas": settings.replicas,
        "max_replicas": settings.max_replicas,
        "target_ongoing_requests": 1,
        "upscale_delay_s": settings.upscale_delay_seconds,
        "downscale_delay_s": settings.downscale_delay_seconds,
    }
    return {**options, "autoscaling_config": autoscaling}


def _replica_resources(
    cluster: Mapping[str, float], settings: ReplicaSettings, num_models: int, device: str | None
) -> dict[str, float]:
    """What Ray sets aside for one replica.

    Raises:
        UserError: the cluster has less than all replicas need.
    """
    num_gpus = settings.num_gpus_per_replica
    if num_gpus is None:
        num_gpus = 1.0 if cluster.get("GPU", 0) >= 1 and device != "cpu" else 0.0
    num_replicas = num_models * settings.most_replicas
    for resource, each in (("CPU", settings.num_cpus_per_replica), ("GPU", num_gpus)):
        needed, there = num_replicas * each, cluster.get(resource, 0.0)
        if needed > there:
            raise UserError(
                f"{num_replicas} replicas with {each:g} {resource}s each need {needed:g}, Ray has {there:g}; "
                f"lower --replicas or --num-{resource.lower()}s-per-replica, or add machines to the cluster"
            )
    return {"num_cpus": settings.num_cpus_per_replica, "num_gpus": num_gpus}


def _failure(ray: Any, name: str) -> str | None:
    """The last line of what Ray knows of a failed start: the error's message, below its traceback."""
    application = ray.serve.status().applications.get(name)
    messages = [] if application is None else [state.message for state in application.deployments.values()]
    lines = [line.strip() for message in messages for line in message.splitlines() if line.strip()]
    return lines[-1] if lines else None


def _delete_application(ray: Any, name: str) -> None:
    with contextlib.suppress(Exception):  # whatever is wrong with Ray by now, the rest must still end
        ray.serve.delete(name)


def _stop_ray(ray: Any, is_own: bool) -> None:
    if is_own:
        with contextlib.suppress(Exception):
            ray.serve.shutdown()
    ray.shutdown()
