"""Runs in a process of its own, takes away what a program must not have, and becomes the program.

    python -I -S launcher.py CONFIG       CONFIG: marshalled, in hexadecimal

A separate start instead of `preexec_fn`, which may deadlock in a trainer that has threads. Imports little: that is
paid for every program. When all limits hold it writes `ok` to the descriptor that it was told, which closes
with exec, and `no` after it if something fails yet, so that nobody takes a sandbox that did not come up for a program
that failed.
"""

import ctypes
import marshal
import os
import resource
import struct
import sys

LANDLOCK_CREATE, LANDLOCK_ADD, LANDLOCK_RESTRICT = 444, 445, 446  # the same on every architecture
PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 22, 38
PR_CAPBSET_READ, PR_CAPBSET_DROP, PR_CAP_AMBIENT = 23, 24, 47
FILE_RIGHTS = 0b1 | 0b10 | 0b100 | 1 << 14 | 1 << 15  # the rights that a rule for a file, not a folder, may hold

libc = ctypes.CDLL(None, use_errno=True)


def call(what, function, *arguments):
    """What a C function returns; OSError where it fails."""
    result = function(*arguments)
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def prctl(option, *arguments):
    """prctl(2) with all arguments as machine words."""
    words = [ctypes.c_ulong(word) for word in (*arguments, 0, 0, 0, 0)[:4]]
    return call(f"prctl {option}", libc.prctl, option, *words)


def drop_capabilities():
    """Also root's: without them it may neither raise its limits nor get past permissions."""
    capability = 0
    while (held := libc.prctl(PR_CAPBSET_READ, capability, 0, 0, 0)) >= 0:  # to the last that the kernel knows
        if held and os.geteuid() == 0:  # exec gives root, and nobody else, what is left here
            prctl(PR_CAPBSET_DROP, capability)
        capability += 1
    prctl(PR_CAP_AMBIENT, 4)
    header, none = struct.pack("Ii", 0x20080522, 0), bytes(24)
    call("capset", libc.capset, header, none)


def restrict_files(handled, rules):
    """Landlock: nothing but what `rules` (path, rights) allow, for all that is `handled` (file, network, scope)."""
    attributes = struct.pack("QQQ", *handled)[: 24 if handled[2] else 16 if handled[1] else 8]
    ruleset = call(
        "landlock", libc.syscall, LANDLOCK_CREATE, attributes, ctypes.c_size_t(len(attributes)), ctypes.c_uint(0)
    )
    for path, rights in rules:
        try:
            opened = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except OSError:
            continue  # what is not there need not be allowed
        rights &= handled[0] if os.path.isdir(path) else FILE_RIGHTS & handled[0]
        rule = struct.pack("=Qi", rights, opened)
        call("landlock rule", libc.syscall, LANDLOCK_ADD, ruleset, 1, rule, ctypes.c_uint(0))
        os.close(opened)
    call("landlock restrict", libc.syscall, LANDLOCK_RESTRICT, ruleset, ctypes.c_uint(0))
    os.close(ruleset)


def restrict_calls(instructions):
    """Seccomp: the system calls that the filter lets through, for this process and all it becomes."""
    buffer = ctypes.create_string_buffer(instructions, len(instructions))
    program = struct.pack("HxxxxxxQ", len(instructions) // 8, ctypes.addressof(buffer))
    holder = ctypes.create_string_buffer(program, len(program))
    prctl(PR_SET_SECCOMP, 2, ctypes.addressof(holder))


def main():
    """Confine this process, say so, and become the program."""
    config = marshal.loads(bytes.fromhex(sys.argv[1]))
    ready = config["ready"]
    os.set_inheritable(ready, False)
    for name, value in config["limits"].items():
        limit = getattr(resource, name)
        _, hard = resource.getrlimit(limit)
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(limit, (value, value))
    if config["kernel"]:
        prctl(PR_SET_PDEATHSIG, 9)
        prctl(PR_SET_NO_NEW_PRIVS, 1)
        drop_capabilities()
        if config["landlock"]:
            restrict_files(*config["landlock"])
        restrict_calls(config["seccomp"])
    os.write(ready, b"ok")
    try:
        os.execve(config["command"][0], config["command"], config["env"])
    except BaseException:
        os.write(ready, b"no")
        raise


main()
