"""Replicas of the cloud over a cluster, placed and scaled by Ray Serve. `deploy/ray.yaml` has it all in one file.

    serve run cloud_backend.ray_serve:application folders=/srv/stip/cloud token-file=/etc/stip/tokens.txt

A replica is the ASGI application in an actor. Ray's proxies take the sockets and bring each to one replica, where it
stays; a device whose replica goes finds another one and replays, as with any lost connection.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from cloud_backend.asgi import Application
from cloud_backend.folders import check_folders
from cloud_backend.server import CloudServer
from cloud_backend.words import Options, parse
from shared.errors import StipError, UsageError

try:
    import ray
    from ray import serve
    from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE
    from ray.serve._private.long_poll import LongPollNamespace, LongPollState
except ModuleNotFoundError as error:
    raise UsageError(f"the package {error.name!r} is not installed", hint="pip install 'stip[cloud,ray]'") from None

log = logging.getLogger("stip.cloud")

SPARE_REQUESTS = 256  # beyond its sessions: past its requests handshakes would hang, but a full replica says so itself
END_SECONDS = 10.0  # from the end of a drain to that of its process, at most
HEALTH_SECONDS = 2.0  # between looks at a replica: after about so long one whose process died is replaced
RETRY_SECONDS = 1.0  # between calls of a controller that does not answer


def application(arguments: Options) -> serve.Application:
    """What `serve run` and `serve deploy` take. arguments: options of `stip-cloud serve`, and of `_add_replicas`.

    Raises UsageError for options that cannot be carried out, or not by this cluster, and BundleError for a folder that
    is not whole where this is called: an export lies at the same path on every node.
    """
    with _hints():
        options = parse(arguments, _add_replicas)
        _check(options)
        check_folders(options.folders)
        if not options.nodes_come:
            _check_room(options)

    def build() -> Application:
        from cloud_backend.serving import prepare  # torch is for replicas

        async def beside(server: CloudServer) -> None:
            await _stopping()
            log.info("stopping")
            await server.drain(options.drain_seconds)
            await server.farewell()

        with _hints():
            return Application(prepare(options), options.origin, beside)

    scaling = {
        "min_replicas": options.min_replicas,
        "max_replicas": options.max_replicas,
        "target_ongoing_requests": options.target_sessions,  # an open socket is one of them
        "upscale_delay_s": options.upscale_seconds,
        "downscale_delay_s": options.downscale_seconds,
        "look_back_period_s": 15.0,  # sessions last: there is little to smooth
    }
    deployment = serve.deployment(
        name="Cloud",
        ray_actor_options={"num_cpus": options.cpus, "num_gpus": options.gpus},
        autoscaling_config=scaling,
        max_ongoing_requests=options.max_sessions + SPARE_REQUESTS,
        health_check_period_s=HEALTH_SECONDS,
        graceful_shutdown_wait_loop_s=0.5,
        graceful_shutdown_timeout_s=options.drain_seconds + END_SECONDS,
    )
    return deployment(serve.ingress(build)(Cloud)).bind()


class Cloud:
    """What Ray Serve keeps alive: one replica."""

    app: Application  # of the ingress

    async def check_health(self) -> None:
        """Called by Ray Serve. Raises where the replica is of no use to anyone, and is to be replaced."""
        if (trouble := self.app.server.health.broken()) is not None:
            raise RuntimeError(trouble)


async def _stopping() -> None:
    """Returns once Ray Serve means to stop this replica.

    It gives the replica no sign of that before the last request has ended, and a socket does not end by itself: after
    graceful_shutdown_timeout_s it would be cut. But the controller takes the replica at once off the list that the
    proxies route by. So this listens to that list, by the call that the proxies themselves make.
    """
    replica = serve.get_replica_context().replica_id
    controller = ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)
    key = (LongPollNamespace.DEPLOYMENT_TARGETS, replica.deployment_id)
    version, was_listed = -1, False
    while True:
        try:
            changes = await controller.listen_for_change.remote({key: version})
        except ray.exceptions.RayError:  # a controller that is gone will be back: meanwhile replicas serve as they are
            await asyncio.sleep(RETRY_SECONDS)
            continue
        if changes is LongPollState.TIME_OUT or key not in changes:
            continue
        version = changes[key].snapshot_id
        listed = any(other.replica_id == replica for other in changes[key].object_snapshot.running_replicas)
        if was_listed and not listed:
            return
        was_listed = listed


def _add_replicas(parser: argparse.ArgumentParser) -> None:
    replicas = parser.add_argument_group("replicas")
    replicas.add_argument("--min-replicas", type=int, default=1, metavar="N", help="(default: %(default)s)")
    replicas.add_argument("--max-replicas", type=int, metavar="N", help="(default: as many as the least)")
    replicas.add_argument(
        "--target-sessions",
        type=int,
        default=64,
        metavar="N",
        help="open sessions of a replica, beyond which there are to be more replicas (default: %(default)s)",
    )
    replicas.add_argument("--upscale-seconds", type=float, default=5.0, metavar="S", help="(default: %(default)s)")
    replicas.add_argument("--downscale-seconds", type=float, default=300.0, metavar="S", help="(default: %(default)s)")
    replicas.add_argument("--cpus", type=float, default=1.0, metavar="N", help="of each replica (default: %(default)s)")
    replicas.add_argument("--gpus", type=float, default=0.0, metavar="N", help="of each replica (default: %(default)s)")
    replicas.add_argument("--nodes-come", action="store_true", help="the cluster grows: do not look for room now")


def _check(options: argparse.Namespace) -> None:
    """Completes and checks the options of the replicas. Raises UsageError."""
    if options.max_replicas is None:
        options.max_replicas = options.min_replicas
    for name, least in (
        ("min_replicas", 1),
        ("max_replicas", options.min_replicas),
        ("target_sessions", 1),
        ("upscale_seconds", 0),
        ("downscale_seconds", 0),
        ("cpus", 0),
        ("gpus", 0),
    ):
        if not getattr(options, name) >= least:
            option = f"--{name.replace('_', '-')}"
            raise UsageError(f"{option}: seen {getattr(options, name):g}, wanted {least} or more", hint="see ray.yaml")
    if options.max_replicas > options.min_replicas and options.max_sessions <= options.target_sessions:
        raise UsageError(
            f"--target-sessions: seen {options.target_sessions}, wanted fewer than --max-sessions, "
            f"{options.max_sessions}: replicas would be full and no more of them would come",
            hint="a smaller --target-sessions, or a larger --max-sessions",
        )
    if options.gpus == 0 and options.device == "cuda":
        raise UsageError("--device cuda: seen --gpus 0, wanted a GPU for each replica", hint="say --gpus 1")
    if 0 < options.gpus < options.tensor_parallel:
        raise UsageError(
            f"--gpus: seen {options.gpus:g}, wanted one for each of --tensor-parallel {options.tensor_parallel}",
            hint=f"say --gpus {options.tensor_parallel}",
        )
    if options.gpus == 0:
        options.device = "cpu"  # Ray hides the GPUs of a node from who asked for none


def _check_room(options: argparse.Namespace) -> None:
    """Raises UsageError where the cluster's nodes have no room for the least number of replicas: Ray Serve would wait
    for it without end."""
    if ray.is_initialized():
        nodes = _nodes()
    else:  # by `serve run`, which connects later, with settings of its own
        try:
            ray.init("auto", log_to_driver=False, logging_level=logging.ERROR)
        except ConnectionError:
            return  # nothing runs yet: this machine will be the cluster
        try:
            nodes = _nodes()
        finally:
            ray.shutdown()
    wanted = {"CPU": options.cpus, "GPU": options.gpus}
    room = sum(
        int(min((node.get(kind, 0) / count for kind, count in wanted.items() if count), default=options.min_replicas))
        for node in nodes
    )
    if room < options.min_replicas:
        cpus, gpus = (sum(node.get(kind, 0) for node in nodes) for kind in ("CPU", "GPU"))
        raise UsageError(
            f"cluster: seen {cpus:g} CPUs and {gpus:g} GPUs on {len(nodes)} nodes, room for {room} replicas of "
            f"{options.cpus:g} CPUs and {options.gpus:g} GPUs, wanted {options.min_replicas}",
            hint="fewer --min-replicas, --cpus or --gpus, more nodes, or --nodes-come where they come by themselves",
        )


def _nodes() -> list[Mapping[str, float]]:
    """What each node has."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


@contextmanager
def _hints() -> Iterator[None]:
    """Adds the hint of an error to its traceback, which is what Ray shows of it."""
    try:
        yield
    except StipError as error:
        if error.hint is not None:
            error.add_note(f"hint: {error.hint}")
        raise
