"""One program on many processes: how they find each other, agree, wait for each other, and stop together.

Every process runs the same commands on the same recipe (JAX's multi-controller SPMD). All compute; process 0 writes
and prints. Files that one process wrote are found by the others: the work directory is shared between hosts.
"""

import importlib.util
import json
import os
import socket
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Array

# Plain environment variables, where no cluster that JAX knows tells the same. The first is JAX's own.
ADDRESS, COUNT, INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
# Deadlines, each a variable and its default: for all processes to appear (hosts of a pod boot minutes apart), and until
# one that is not heard of is given up, and with it the run.
START_S, HEARTBEAT_S = ("WMSS_START_SECONDS", 300), ("WMSS_HEARTBEAT_SECONDS", 60)
_TPU_DEVICES = ("/dev/accel0", "/dev/vfio/0")
_LIBRARIES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "wmss-jax")


def start() -> None:
    """Join the other processes of this run, if there are any; before anything asks for devices.

    Told of them by JAX_COORDINATOR_ADDRESS (host:port of process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID, or by what
    JAX finds: a TPU slice's metadata, SLURM, Open MPI, Kubernetes. A process that dies takes the others with it within
    WMSS_HEARTBEAT_SECONDS: JAX ends them.

    Raises:
        ValueError: only some of the variables are set, or to no numbers.
        TimeoutError: process 0 cannot be reached in time. (Where others do not appear, JAX ends the process.)
    """
    if jax.distributed.is_initialized():
        return
    told = {name: os.environ[name] for name in (ADDRESS, COUNT, INDEX) if os.environ.get(name)}
    if told and len(told) < 3:
        missing = sorted({ADDRESS, COUNT, INDEX} - set(told))
        raise ValueError(f"{', '.join(sorted(told))} given without {', '.join(missing)}: set all three, or none")
    if not told and not (_in_cluster() or _on_a_tpu()):
        return
    if told and not (told[COUNT].isdigit() and told[INDEX].isdigit() and int(told[INDEX]) < int(told[COUNT])):
        raise ValueError(f"{COUNT}={told[COUNT]}, {INDEX}={told[INDEX]}: expected a count and a number from 0 below it")
    start_s, heartbeat_s = _seconds(START_S), _seconds(HEARTBEAT_S)
    # On CPUs alone two programs may run at once, and gloo then mixes up their messages.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    where: dict[str, Any] = {}
    if told:
        numbers = {"num_processes": int(told[COUNT]), "process_id": int(told[INDEX])}
        where = {"coordinator_address": told[ADDRESS], **numbers}
        if numbers["process_id"] > 0:
            _await_coordinator(told[ADDRESS], start_s)
    try:
        jax.distributed.initialize(
            **where,
            initialization_timeout=start_s,
            heartbeat_timeout_seconds=heartbeat_s,
            shutdown_timeout_seconds=heartbeat_s,  # one that ends by an error need not wait longer for the others
        )
    except ValueError:
        if told or _in_cluster():
            raise  # to go on alone, each on its own, would be several runs in one directory


def _await_coordinator(address: str, start_s: int) -> None:
    """Return when process 0 can be reached; JAX would end this process without a word that helps."""
    host, _, port = address.rpartition(":")
    if not (host and port.isdigit()):
        raise ValueError(f"{ADDRESS}={address}: expected host:port")
    deadline = time.monotonic() + start_s
    while True:
        try:
            socket.create_connection((host, int(port)), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise TimeoutError(
                    f"nobody answers at {address} ({ADDRESS}) within {start_s} s: {error.strerror or error}; does "
                    f"process 0 run there, and is the port open?"
                ) from error
        time.sleep(0.5)


def _seconds(deadline: tuple[str, int]) -> int:
    name, default = deadline
    said = os.environ.get(name, str(default))
    if not said.isdigit() or said == "0":
        raise ValueError(f"{name}={said}: expected a whole number of seconds")
    return int(said)


def _in_cluster() -> bool:
    """Return whether this is one of several processes, by what their launcher says."""
    several = lambda count, index: index in os.environ and os.environ.get(count, "1") != "1"
    return (
        several("SLURM_NTASKS", "SLURM_PROCID")
        or several("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK")
        or "MEGASCALE_COORDINATOR_ADDRESS" in os.environ
        or "JOB_COMPLETION_INDEX" in os.environ
    )


def _on_a_tpu() -> bool:
    """Return whether this host has TPU chips: alone, or with others that its metadata name."""
    return bool(importlib.util.find_spec("libtpu")) and any(Path(device).exists() for device in _TPU_DEVICES)


def first() -> bool:
    """Whether this is the process that writes and prints."""
    return jax.process_index() == 0


def agreed[T](decide: Callable[[], T]) -> T:
    """Return what process 0 makes of `decide()`, JSON values, on all processes; its ValueError is raised on all.

    For what is read off files that process 0 also writes: asked one by one, processes may find different things there.
    """
    if jax.process_count() == 1:
        return decide()
    said: dict[str, Any] = {}
    if first():
        try:
            said = {"value": decide()}
        except (ValueError, OSError) as error:
            said = {"error": str(error) or type(error).__name__}
            failure = error
    said = json.loads(_broadcast(json.dumps(said).encode()))
    if "error" in said:
        raise failure if first() else ValueError(f"process 0: {said['error']}")
    return said["value"]


def by_first(work: Callable[[], Any]) -> None:
    """Have process 0 do `work()`, files for all to find, while the others wait; its error is raised on all."""
    agreed(lambda: (work(), None)[1])


def gathered(content: bytes) -> list[bytes]:
    """Return the bytes of every process, by number; every process has to ask."""
    if jax.process_count() == 1:
        return [content]
    lengths = np.ravel(multihost_utils.process_allgather(np.int32(len(content)))).tolist()
    all_content = np.asarray(multihost_utils.process_allgather(_padded(content, max(lengths))))
    return [bytes(row)[:length] for row, length in zip(all_content, lengths, strict=True)]


def whole(x: Array) -> np.ndarray:
    """Return all of an array, wherever its parts lie; every process has to ask."""
    if x.is_fully_addressable or x.is_fully_replicated:
        return np.asarray(x)
    return np.asarray(multihost_utils.process_allgather(x, tiled=True))


def check_alike(facts: Mapping[str, str]) -> None:
    """Raise ValueError, on all processes alike, unless every process has the same facts; before weights are loaded.

    Compared besides those given: number of local devices and their kind, versions of the libraries.
    """
    if jax.process_count() == 1:
        return
    devices = jax.local_devices()
    versions = {name: version(name) for name in _LIBRARIES}
    mine = {"devices": f"{len(devices)} x {devices[0].device_kind}", **versions, **facts}
    everyone = [json.loads(said) for said in gathered(json.dumps({"host": socket.gethostname(), **mine}).encode())]
    for number, theirs in enumerate(everyone):
        for what in mine:
            if theirs[what] != everyone[0][what]:
                raise ValueError(
                    f"process {number} on {theirs['host']} differs from process 0 on {everyone[0]['host']} in {what}: "
                    f"{theirs[what]}, not {everyone[0][what]}; start all from the same recipe, data and environment"
                )


def _broadcast(content: bytes) -> bytes:
    """Return process 0's bytes."""
    length = int(multihost_utils.broadcast_one_to_all(np.int32(len(content))))
    return bytes(multihost_utils.broadcast_one_to_all(_padded(content, length)))[:length]


def _padded(content: bytes, length: int) -> np.ndarray:
    return np.frombuffer(content.ljust(length, b"\0")[:length], np.uint8)
