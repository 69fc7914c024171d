"""This rank's process groups in torch.distributed and megatron-core, the store where ranks meet, and errors they share.

Ranks are laid out as megatron-core does: tensor-parallel ranks are neighbours, then come context-parallel ranks,
then replicas, then stages. They meet at the key-value store that rank 0 hosts, or torchrun's agent. Ranks of one
machine meet on its loopback address, which no other machine reaches; torch would listen on all addresses. The store of
several machines is open to whoever reaches its port, so a firewall has to keep others out.
"""

from __future__ import annotations

import ipaddress
import os
import socket
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Literal, TypeVar

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore
from typing_extensions import assert_never

from reflectron.engine.config import ParallelConfig
from reflectron.engine.files import printable
from reflectron.engine.job_lock import LockLost
from reflectron.engine.parallel.judge import RankProgress

_LOOPBACK_INTERFACE = "lo"


@dataclass(frozen=True)
class ParameterGroups:
    """The process groups that one kind of parameters is spread over."""

    shards: dist.ProcessGroup
    """Ranks that each hold a part of a parameter."""
    replicas: dist.ProcessGroup
    """Ranks that hold the same part: over them its gradient is summed and its optimizer state may be sharded."""


@dataclass(frozen=True)
class ParallelGroups:
    """The process groups of this rank, named as megatron-core names them, and its place in them."""

    device: torch.device
    """Where this rank's tensors live."""
    tp: dist.ProcessGroup
    """Ranks that share this rank's layers and samples."""
    cp: dist.ProcessGroup
    """Ranks that share the tokens of this rank's packs, with the same parameters."""
    dp: dist.ProcessGroup
    """Ranks with the same parameters and the same place in ``cp`` that train on other packs."""
    dp_cp: dist.ProcessGroup
    """All ranks with the same parameters: over them gradients are summed and optimizer state is sharded."""
    pp: dist.ProcessGroup
    """Stages of one replica."""
    expt_tp: dist.ProcessGroup
    """As ``tp``, for the parameters of experts."""
    expt_dp: dist.ProcessGroup
    """As ``dp_cp``, for the parameters of experts."""
    hosts: dist.ProcessGroup
    """All ranks, over gloo: for what hosts agree on without waiting for their devices."""
    is_last_stage: bool
    """This rank computes the loss."""
    progress: RankProgress = field(default_factory=RankProgress)
    """Where this rank is, for the watchdog."""

    @property
    def is_main(self) -> bool:
        """The rank that writes files and talks to the terminal."""
        return dist.get_rank() == 0

    def of(self, parameter: torch.Tensor) -> ParameterGroups:
        """Return the groups of a parameter; megatron-core marks those of experts by ``allreduce = False``."""
        if getattr(parameter, "allreduce", True):
            return ParameterGroups(self.tp, self.dp_cp)
        return ParameterGroups(self.expt_tp, self.expt_dp)

    def barrier(self) -> None:
        """Wait for the hosts of all ranks, while their devices continue."""
        dist.barrier(group=self.hosts)


def device_type(parallel: ParallelConfig) -> Literal["cpu", "cuda"]:
    """Return the kind of device that ``parallel.device`` stands for on this machine.

    Raises:
        ValueError: when CUDA is asked for and none is visible.
    """
    found: Literal["cpu", "cuda"] = "cuda" if torch.cuda.is_available() else "cpu"
    if parallel.device in ("auto", found):
        return found
    if parallel.device == "cuda":
        raise ValueError("parallel.device is 'cuda', expected 'cpu' or 'auto': no CUDA device is visible")
    raise ValueError(
        "parallel.device is 'cpu', expected no visible CUDA device: set CUDA_VISIBLE_DEVICES= to hide them"
    )


def device_index(local_rank: int, visible: int) -> int:
    """Return which of the ``visible`` CUDA devices is this rank's: that of its own number, or the only one.

    A launcher may show every rank its own device alone, as Slurm does with ``--gpus-per-task``.

    Raises:
        ValueError: when several devices are visible and this rank has none among them.
    """
    if visible == 1:
        return 0
    if local_rank >= visible:
        raise ValueError(
            f"local rank {local_rank} sees {visible} CUDA devices, expected one for each rank of a machine"
        )
    return local_rank


def start_process_groups(parallel: ParallelConfig, seed: int, timeout_minutes: float = 30) -> ParallelGroups:
    """Join the job described by RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT.

    Where the address is the loopback's, nothing of the job listens on another.

    Raises:
        ValueError: when the number of processes does not fit the parallel sizes, or a machine has too few devices.
    """
    kind = device_type(parallel)
    check_world_size(parallel, int(os.environ["WORLD_SIZE"]))
    silence_upstream_warnings(kind)
    if kind == "cpu":
        from reflectron.engine.parallel.cpu_backend import keep_freed_memory, redirect_cuda_to_cpu

        redirect_cuda_to_cpu()
        keep_freed_memory()
        device, communication = torch.device("cpu"), "gloo"
    elif kind == "cuda":
        # megatron-core overlaps the communication of tensor parallelism with matrix products by the order of launches,
        # which one hardware queue keeps.
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
        device = torch.device("cuda", device_index(int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()))
        torch.cuda.set_device(device)
        communication = "nccl"
    else:
        assert_never(kind)
    timeout = timedelta(minutes=timeout_minutes)
    dist.init_process_group(
        communication,
        store=join_store(timeout.total_seconds()),
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
        timeout=timeout,
    )
    return model_parallel_groups(parallel, device, seed, timeout_minutes)


def model_parallel_groups(
    parallel: ParallelConfig,
    device: torch.device,
    seed: int,
    timeout_minutes: float = 30,
    create_gloo_process_groups: bool = True,
) -> ParallelGroups:
    """Return the groups of one layout over the processes that have joined; ``seed`` starts this rank's generators."""
    from megatron.core import parallel_state, tensor_parallel

    chunks = parallel.virtual_pipeline_model_parallel_size
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=chunks if chunks > 1 else None,
        context_parallel_size=parallel.context_parallel_size,
        distributed_timeout_minutes=int(timeout_minutes),
        create_gloo_process_groups=create_gloo_process_groups,
    )
    # Without devices everything goes over gloo already.
    hosts = dist.group.WORLD
    if device.type == "cuda":
        hosts = dist.new_group(backend="gloo", timeout=timedelta(minutes=timeout_minutes))
    assert hosts is not None, "this process has joined the job"
    # Sequence parallelism forks this generator around the embedding's dropout, also when its probability is 0.
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
    return ParallelGroups(
        device=device,
        tp=parallel_state.get_tensor_model_parallel_group(),
        cp=parallel_state.get_context_parallel_group(),
        dp=parallel_state.get_data_parallel_group(),
        dp_cp=parallel_state.get_data_parallel_group(with_context_parallel=True),
        pp=parallel_state.get_pipeline_model_parallel_group(),
        expt_tp=parallel_state.get_expert_tensor_parallel_group(),
        expt_dp=parallel_state.get_expert_data_parallel_group(),
        hosts=hosts,
        is_last_stage=parallel_state.is_pipeline_last_stage(),
    )


def silence_upstream_warnings(kind: Literal["cpu", "cuda"]) -> None:
    """Filter warnings that do not concern a job on that kind of device; call it before importing megatron-core."""
    if kind == "cpu":
        # They ask for CUDA extensions, which `reflectron doctor` lists.
        warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.")
    # megatron-core 0.16.1 calls collectives that torch 2.13 has renamed.
    warnings.filterwarnings("ignore", category=FutureWarning, message=r"`torch\.distributed\.")


def check_world_size(parallel: ParallelConfig, world_size: int) -> int:
    """Return the data-parallel size of a job of ``world_size`` processes.

    Raises:
        ValueError: naming the keys and the number of processes.
    """
    replica, replicas = processes_of_a_replica(parallel), parallel.data_parallel_size
    if world_size % replica or (replicas is not None and world_size != replica * replicas):
        expected = f"{replica * replicas}" if replicas is not None else f"a multiple of {replica}"
        raise ValueError(
            f"the job has {world_size} processes, expected {expected}: parallel.tensor_model_parallel_size "
            f"({parallel.tensor_model_parallel_size}) x parallel.pipeline_model_parallel_size "
            f"({parallel.pipeline_model_parallel_size}) x parallel.context_parallel_size "
            f"({parallel.context_parallel_size}) x parallel.data_parallel_size ({replicas})"
        )
    return world_size // replica


def processes_of_a_replica(parallel: ParallelConfig) -> int:
    """Return the ranks that one pack passes through."""
    return parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size * parallel.context_parallel_size


def stop_process_groups() -> None:
    """Leave the job."""
    from megatron.core import parallel_state

    # A rank that leaves early closes connections that others may still be reading from. Without its device NCCL guesses
    # one, and torch warns of it.
    dist.barrier(device_ids=[torch.cuda.current_device()] if dist.get_backend() == "nccl" else None)
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


T = TypeVar("T")

# What writing a file raises: torch's writer and safetensors have types of their own.
WRITE_ERRORS = (OSError, RuntimeError, SafetensorError, LockLost)


def error_on_main(action: Callable[[], str | None]) -> str:
    """Run ``action`` on the main rank; every rank gets the error that it returned or raised, in one line."""
    error = [""]
    if dist.get_rank() == 0:
        try:
            error = [action() or ""]
        except WRITE_ERRORS as failure:
            error = [file_error(failure)]
    dist.broadcast_object_list(error)
    return error[0]


def first_error(error: str) -> str:
    """Return the error of the lowest rank that has one, the same on all ranks; every rank calls it with its own."""
    errors = [""] * dist.get_world_size()
    dist.all_gather_object(errors, error)
    return next((f"rank {rank}: {text}" for rank, text in enumerate(errors) if text), "")


def from_main(value: T) -> T:
    """Return the main rank's ``value``, on every rank."""
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]


def file_error(error: BaseException) -> str:
    """Return why a file could not be written: file and reason, where the system said so."""
    # torch's writer follows an OSError of the stream with a RuntimeError of its own.
    cause = error
    while not isinstance(cause, OSError) and cause.__context__ is not None:
        cause = cause.__context__
    if isinstance(cause, OSError) and cause.strerror:
        return f"{cause.filename}: {cause.strerror}" if cause.filename else cause.strerror
    return printable((str(error).splitlines() or [type(error).__name__])[0])


def join_store(timeout_s: float) -> Store:
    """Return this rank's connection to the store of the job that RANK, MASTER_ADDR and MASTER_PORT describe; rank 0
    hosts it.

    Raises:
        RuntimeError: when it cannot be reached in time.
        OSError: when its port is taken.
    """
    host, port = master()
    hosts_it = os.environ["RANK"] == "0" and not _torchrun_hosts_it()
    listening = None
    if is_loopback(host):
        stay_on_this_machine()
        if hosts_it:
            listening = _listen(host, port)
            port = listening.getsockname()[1]
    store = TCPStore(
        host,
        port,
        is_master=hosts_it,
        wait_for_workers=False,
        timeout=timedelta(seconds=timeout_s),
        # The store closes it.
        master_listen_fd=None if listening is None else listening.detach(),
    )
    return PrefixStore(_attempt(), store)


def connect_again(timeout_s: float) -> Store:
    """Return a connection of its own to the same store: each allows one call at a time, which may wait."""
    host, port = master()
    store = TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=timeout_s))
    return PrefixStore(_attempt(), store)


def master() -> tuple[str, int]:
    """Return where the store listens."""
    return os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])


def is_loopback(host: str) -> bool:
    """Return whether only processes of this machine reach ``host``."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def stay_on_this_machine() -> None:
    """Have the backends listen on the loopback interface alone, whatever a cluster's environment says."""
    os.environ["GLOO_SOCKET_IFNAME"] = os.environ["NCCL_SOCKET_IFNAME"] = _LOOPBACK_INTERFACE


def _listen(host: str, port: int) -> socket.socket:
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    listening = socket.socket(family, kind, protocol)
    # A store of the run before may not have been forgotten yet.
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind(address)
    except OSError as error:
        listening.close()
        raise OSError(error.errno, f"port {port} of {host}, where the ranks meet, is taken: {error.strerror}") from None
    listening.listen(4096)
    return listening


def _torchrun_hosts_it() -> bool:
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _attempt() -> str:
    # torchrun keeps the store over its restarts.
    return f"attempt{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}"
