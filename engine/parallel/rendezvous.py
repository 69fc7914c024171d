"""Where the ranks of a job meet: the key-value store that rank 0 hosts, or torchrun's agent.

Ranks of one machine meet on its loopback address, which no other machine reaches; torch would listen on all addresses.
The store of several machines is open to whoever reaches its port, so a firewall has to keep others out.
"""

from __future__ import annotations

import ipaddress
import os
import socket
from datetime import timedelta

from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

_LOOPBACK_INTERFACE = "lo"


def open_store(timeout_s: float) -> Store:
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
