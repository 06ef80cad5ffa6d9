"""What a confined program may ask of the kernel: a seccomp filter that lets through a list and nothing else.

A program is one process, and unless it is allowed threads one thread: it can fork nothing, so nothing can outlive it
and nothing needs counting. It opens no socket, signals nobody, and changes neither owner, mode nor times of any file,
which Landlock does not look at.
"""

from __future__ import annotations

import platform
import struct

_X86_64, _AARCH64 = 0xC000003E, 0xC00000B7  # AUDIT_ARCH_… of linux/audit.h
_ALLOW, _KILL, _REFUSE, _ABSENT = 0x7FFF0000, 0x80000000, 0x00050001, 0x00050026  # EPERM; ENOSYS
_LOAD, _EQUAL, _AT_LEAST, _HAS, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06  # BPF instructions
_YOUNGEST = 450
"""The youngest system call that was considered. C libraries fall back to older ones on ENOSYS, not on EPERM."""

# name, number on x86_64, number on aarch64 (-: the architecture has no such call)
_ALLOWED = """
# files and folders: which ones, the file system's restrictions say
read 0 63; write 1 64; open 2 -; close 3 57; stat 4 -; fstat 5 80; lstat 6 -; lseek 8 62; pread64 17 67
pwrite64 18 68; readv 19 65; writev 20 66; access 21 -; sendfile 40 71; flock 73 32; fsync 74 82
fdatasync 75 83; truncate 76 45; ftruncate 77 46; getdents 78 -; getcwd 79 17; chdir 80 49; fchdir 81 50
rename 82 -; mkdir 83 -; rmdir 84 -; creat 85 -; link 86 -; unlink 87 -; symlink 88 -; readlink 89 -
umask 95 166; statfs 137 43; fstatfs 138 44; getdents64 217 61; openat 257 56; mkdirat 258 34; newfstatat 262 79
unlinkat 263 35; renameat 264 38; linkat 265 37; symlinkat 266 36; readlinkat 267 78; faccessat 269 48
preadv 295 69; pwritev 296 70; renameat2 316 276; copy_file_range 326 285; preadv2 327 286; pwritev2 328 287
statx 332 291; close_range 436 436; openat2 437 437; faccessat2 439 439
# memory
mmap 9 222; mprotect 10 226; munmap 11 215; brk 12 214; mremap 25 216; msync 26 227; mincore 27 232
madvise 28 233
# descriptors and waiting
poll 7 -; pipe 22 -; select 23 -; dup 32 23; dup2 33 -; epoll_create 213 -; epoll_wait 232 -; epoll_ctl 233 21
pselect6 270 72; ppoll 271 73; epoll_pwait 281 22; timerfd_create 283 85; timerfd_settime 286 86
timerfd_gettime 287 87; eventfd2 290 19; epoll_create1 291 20; dup3 292 24; pipe2 293 59; epoll_pwait2 441 441
sendto 44 206; recvfrom 45 207; sendmsg 46 211; recvmsg 47 212; shutdown 48 210; getsockname 51 204
getpeername 52 205; setsockopt 54 208; getsockopt 55 209
# time
nanosleep 35 101; getitimer 36 102; alarm 37 -; setitimer 38 103; gettimeofday 96 169; times 100 153; time 201 -
clock_gettime 228 113; clock_getres 229 114; clock_nanosleep 230 115
# the process itself, threads' locks, its own signals
rt_sigaction 13 134; rt_sigprocmask 14 135; rt_sigreturn 15 139; sched_yield 24 124; pause 34 -; getpid 39 172
execve 59 221; exit 60 93; wait4 61 260; uname 63 160; getrlimit 97 163; getrusage 98 165; sysinfo 99 179
getuid 102 174; getgid 104 176; geteuid 107 175; getegid 108 177; getppid 110 173; getpgrp 111 -
getgroups 115 158; getresuid 118 148; getresgid 120 150; getpgid 121 155; getsid 124 156; rt_sigpending 127 136
rt_sigtimedwait 128 137; rt_sigsuspend 130 133; sigaltstack 131 132; sched_get_priority_max 146 125
sched_get_priority_min 147 126; arch_prctl 158 -; setrlimit 160 164; gettid 186 178; futex 202 98
sched_getaffinity 204 123; set_tid_address 218 96; restart_syscall 219 128; exit_group 231 94; waitid 247 95
set_robust_list 273 99; get_robust_list 274 100; getcpu 309 168; getrandom 318 278; membarrier 324 283
rseq 334 293
"""
# Calls of which one argument decides: numbers, the argument's index, the values that it may have.
_STREAM = 1
_BY_ARGUMENT = [
    ((302, 261), 0, [0]),  # prlimit64: of the program itself
    ((157, 167), 0, [15, 16, 0x53564D41]),  # prctl: names of threads and mappings
    # fcntl: all but F_SETOWN and F_SETSIG, which send signals to whom they name
    ((72, 25), 1, [*range(8), 36, 37, 38, 1030, 1031, 1032]),
    # ioctl: is it a terminal, how much can be read, blocking, close on exec
    ((16, 29), 1, [0x5401, 0x802C542A, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451]),
    # socketpair: of streams; with datagrams one could write to any socket on the file system
    ((53, 199), 1, [kind | flags for kind in [_STREAM] for flags in (0, 0x800, 0x80000, 0x80800)]),
]
_CLONE, _CLONE3, _CLONE_THREAD = (56, 220), 435, 0x10000


def architecture() -> int | None:
    """Which column of the tables this machine needs; None where there is none."""
    machines = {"x86_64": 0, "amd64": 0, "aarch64": 1, "arm64": 1}
    return machines.get(platform.machine().lower())


def seccomp_filter(threads: bool = False) -> bytes:
    """The filter's instructions for this machine. ValueError for an architecture without a table."""
    column = architecture()
    if column is None:
        raise ValueError(f"no table of system calls for {platform.machine()}")

    def step(code: int, value: int, true: int = 0, false: int = 0) -> bytes:
        return struct.pack("=HBBI", code, true, false, value)

    def give(answer: int) -> bytes:
        return step(_RETURN, answer)

    parts = [
        step(_LOAD, 4) + step(_EQUAL, (_X86_64, _AARCH64)[column], 1, 0) + give(_KILL),
        step(_LOAD, 0) + step(_AT_LEAST, 0x40000000, 0, 1) + give(_KILL),  # x86's 32-bit pointers have other numbers
        step(_AT_LEAST, _YOUNGEST + 1, 0, 1) + give(_ABSENT),
        # Its flags are in memory, which a filter cannot read; libc then takes clone.
        step(_EQUAL, _CLONE3, 0, 1) + give(_ABSENT),
    ]
    entries = [entry.split() for line in _ALLOWED.splitlines() if line[:1] not in "#" for entry in line.split(";")]
    for _, *numbers in entries:
        if numbers[column] != "-":
            parts.append(step(_EQUAL, int(numbers[column]), 0, 1) + give(_ALLOW))
    for numbers, index, values in _BY_ARGUMENT:
        number = numbers[column]
        parts.append(step(_EQUAL, number, 0, 2 * len(values) + 2))
        parts.append(step(_LOAD, 16 + 8 * index))
        parts += [step(_EQUAL, value, 0, 1) + give(_ALLOW) for value in values]
        parts.append(give(_REFUSE))
    if threads:
        parts.append(step(_EQUAL, _CLONE[column], 0, 3) + step(_LOAD, 16) + step(_HAS, _CLONE_THREAD, 0, 1))
        parts.append(give(_ALLOW))
    parts.append(give(_REFUSE))
    return b"".join(parts)
