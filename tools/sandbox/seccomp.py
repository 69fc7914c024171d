"""The system calls that a sandbox refuses, as the BPF program that ``bwrap --seccomp`` loads.

The program is empty on a machine other than x86_64 and aarch64. Namespaces alone would leave these calls open: tracing,
further namespaces with their own root, kernel interfaces that Python code never needs, memory and other kernel objects
that belong to no process and so escape the count, and socket families that a network namespace does not cover (vsock
reaches the host of a virtual machine).

Format: linux/filter.h, linux/seccomp.h; numbers: arch/x86/entry/syscalls/syscall_64.tbl, asm-generic/unistd.h.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Sequence

_ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_X32_BIT = 0x40000000

# name: (x86_64, aarch64)
_REFUSED = {
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "kcmp": (312, 272),
    "pidfd_getfd": (438, 438),
    "unshare": (272, 97),
    "setns": (308, 268),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fspick": (433, 433),
    "mount_setattr": (442, 442),
    "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265),
    "keyctl": (250, 219),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "kexec_load": (246, 104),
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "syslog": (103, 116),
    "quotactl": (179, 60),
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "process_madvise": (440, 440),
    "process_mrelease": (448, 448),
    "fanotify_init": (300, 262),
    "ioprio_set": (251, 30),
    # Memory that belongs to no process.
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "shmget": (29, 194),
    "semget": (64, 190),
    "msgget": (68, 186),
    "mq_open": (240, 180),
    # Each slot of a pipe can hold on to two megabytes of which it refers to one byte.
    "splice": (275, 76),
    "vmsplice": (278, 75),
    "tee": (276, 77),
    # Their number is limited for the machine or the user, so that one sandbox could take all of them.
    "io_setup": (206, 0),
    "inotify_init": (253, 26),
    "inotify_init1": (294, 26),
}
# As on a file system without extended attributes, whose space is not always counted with the file's.
_UNSUPPORTED = {
    "setxattr": (188, 5),
    "lsetxattr": (189, 6),
    "fsetxattr": (190, 7),
    "setxattrat": (463, 463),
}
_CLONE, _CLONE3, _SOCKET, _SOCKETPAIR = (56, 220), (435, 435), (41, 198), (53, 199)
_MMAP, _PRCTL, _IOCTL, _FCNTL = (9, 222), (157, 167), (16, 29), (72, 25)
_SETSOCKOPT, _SETRLIMIT, _PRLIMIT64 = (54, 208), (160, 164), (302, 261)
# CLONE_NEWNS | NEWCGROUP | NEWUTS | NEWIPC | NEWUSER | NEWPID | NEWNET
_NEW_NAMESPACES = 0x7E020000
# From netlink only the protocol by which libc lists network interfaces, as ZeroMQ asks it to.
_AF_UNIX, _AF_INET, _AF_INET6, _AF_NETLINK, _NETLINK_ROUTE = 1, 2, 10, 16, 0
# IP's own, ICMP, TCP, UDP, ICMPv6: others would load modules into the kernel.
_PROTOCOLS = (0, 1, 6, 17, 58)
_MAP_SHARED, _MAP_ANONYMOUS, _MAP_HUGETLB = 0x01, 0x20, 0x40000
_PR_SET_DUMPABLE = 4
# What types into a terminal (TIOCSTI, TIOCLINUX).
_TYPING = (0x5412, 0x541C)
# F_SETLEASE, F_NOTIFY, F_SETPIPE_SZ
_FILE_CONTROLS = (0x400, 0x402, 0x407)
_SOL_SOCKET, _BUFFER_SIZES = 1, (7, 8, 32, 33)
_RLIMIT_CORE = 4

# Offsets in struct seccomp_data; the low halves of arguments, as both machines are little endian.
_NUMBER, _ARCHITECTURE, _ARGUMENTS = 0, 4, (16, 24, 32, 40)
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000


def seccomp_program(machine: str) -> bytes:
    """Return the filter for ``machine`` (``platform.machine()``).

    Refused calls fail with EPERM, but ``clone3`` with ENOSYS: it hides its flags in memory that a filter cannot read,
    and without it libc falls back to ``clone``.
    """
    if machine not in _ARCHITECTURES:
        return b""
    column = 0 if machine == "x86_64" else 1
    program = [
        _instruction(_LOAD, _ARCHITECTURE),
        _instruction(_EQUAL, _ARCHITECTURES[machine], 1, 0),
        _answer(errno.EPERM),
        _instruction(_LOAD, _NUMBER),
    ]
    if machine == "x86_64":
        program += [_instruction(_AT_LEAST, _X32_BIT, 0, 1), _answer(errno.EPERM)]
    for call in _REFUSED.values():
        program += _for_call(call[column], [_answer(errno.EPERM)])
    for call in _UNSUPPORTED.values():
        program += _for_call(call[column], [_answer(errno.ENOTSUP)])
    for call, rules in _rules():
        program += _for_call(call[column], rules)
    return b"".join([*program, _instruction(_RETURN, _ALLOW)])


def _rules() -> list[tuple[tuple[int, int], list[bytes]]]:
    """Return the calls that depend on their arguments, with what is done about each; every list ends in an answer."""
    refuse, ignore, allow = _answer(errno.EPERM), _answer(0), _instruction(_RETURN, _ALLOW)
    return [
        (_CLONE3, [_answer(errno.ENOSYS)]),
        (_CLONE, [_load(0), _instruction(_ANY_BIT, _NEW_NAMESPACES, 0, 1), refuse, allow]),
        (_SOCKET, _socket_rules()),
        (_SOCKETPAIR, [_load(0), *_one_of((_AF_UNIX,), allow), _answer(errno.EAFNOSUPPORT)]),
        (
            _MMAP,
            [
                _load(3),
                _instruction(_ANY_BIT, _MAP_HUGETLB, 2, 0),
                _instruction(_ANY_BIT, _MAP_ANONYMOUS, 0, 2),
                _instruction(_ANY_BIT, _MAP_SHARED, 0, 1),
                refuse,
                allow,
            ],
        ),
        # Who cannot be read cannot be counted.
        (
            _PRCTL,
            [_load(0), _instruction(_EQUAL, _PR_SET_DUMPABLE, 0, 3), _load(1), *_one_of((0,), refuse), allow],
        ),
        (_IOCTL, [_load(1), *_one_of(_TYPING, refuse), allow]),
        (_FCNTL, [_load(1), *_one_of(_FILE_CONTROLS, refuse), allow]),
        # A larger buffer is a wish that the kernel may ignore.
        (
            _SETSOCKOPT,
            [
                _load(1),
                _instruction(_EQUAL, _SOL_SOCKET, 0, 1 + 2 * len(_BUFFER_SIZES)),
                _load(2),
                *_one_of(_BUFFER_SIZES, ignore),
                allow,
            ],
        ),
        # It stands at 1, which alone keeps the machine's handler of core dumps from being started.
        (_SETRLIMIT, [_load(0), *_one_of((_RLIMIT_CORE,), ignore), allow]),
        (
            _PRLIMIT64,
            [
                _load(1),
                _instruction(_EQUAL, _RLIMIT_CORE, 0, 5),
                # The address of a new limit; none means that the limit is only asked for.
                _load(2),
                _instruction(_EQUAL, 0, 0, 2),
                _instruction(_LOAD, _ARGUMENTS[2] + 4),
                _instruction(_EQUAL, 0, 1, 0),
                ignore,
                allow,
            ],
        ),
    ]


def _socket_rules() -> list[bytes]:
    allow, refuse = _instruction(_RETURN, _ALLOW), _answer(errno.EAFNOSUPPORT)
    protocols = [_load(2), *_one_of(_PROTOCOLS, allow), refuse]
    netlink = [_load(2), *_one_of((_NETLINK_ROUTE,), allow), refuse]
    return [
        _load(0),
        *_one_of((_AF_UNIX,), allow),
        _instruction(_EQUAL, _AF_INET, 1, 0),
        _instruction(_EQUAL, _AF_INET6, 0, len(protocols)),
        *protocols,
        _instruction(_EQUAL, _AF_NETLINK, 0, len(netlink)),
        *netlink,
        refuse,
    ]


def _for_call(number: int, rules: list[bytes]) -> list[bytes]:
    return [_instruction(_EQUAL, number, 0, len(rules)), *rules]


def _one_of(values: Sequence[int], then: bytes) -> list[bytes]:
    return [instruction for value in values for instruction in (_instruction(_EQUAL, value, 0, 1), then)]


def _load(argument: int) -> bytes:
    return _instruction(_LOAD, _ARGUMENTS[argument])


def _answer(number: int) -> bytes:
    """Return the instruction that fails with errno ``number``; 0 does nothing and reports success."""
    return _instruction(_RETURN, _ERRNO | number)


def _instruction(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("=HBBI", code, if_true, if_false, value)
