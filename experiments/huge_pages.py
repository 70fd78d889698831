"""Huge pages for what a command computes on the CPU."""

import os
import sys

_NAME = 'glibc.malloc.hugetlb'
_RESTARTED = 'CONVNORM_RESTARTED'


def restart_with_huge_pages():
    """Starts this process anew, under its id, with glibc's malloc asking for huge pages; returns where that is no use.

    XLA:CPU allocates its temporaries anew at every call, and the kernel hands them out page by page: with pages of
    4 KiB a third of a training step of ResNet-18 is this. glibc asks for larger ones only if told so at its start.
    """
    given = os.environ.get('GLIBC_TUNABLES', '')
    if _RESTARTED in os.environ or _NAME in given or not (_glibc_asks() and _kernel_waits_to_be_asked()):
        return
    tunables = ':'.join(part for part in (given, f'{_NAME}=1') if part)
    try:
        os.execve(
            sys.executable,
            [sys.executable, *sys.orig_argv[1:]],
            {**os.environ, 'GLIBC_TUNABLES': tunables, _RESTARTED: '1'},
        )
    except OSError:  # as slow as it would have been
        return


def _glibc_asks():
    """Whether it is glibc, and of a version that can."""
    try:
        name, version = os.confstr('CS_GNU_LIBC_VERSION').split()
    except (ValueError, AttributeError, OSError):
        return False
    return name == 'glibc' and tuple(map(int, version.split('.')[:2])) >= (2, 35)


def _kernel_waits_to_be_asked():
    """Whether there are huge pages for those who ask; `always` has them for all, `never` for none."""
    try:
        with open('/sys/kernel/mm/transparent_hugepage/enabled') as file:
            return '[madvise]' in file.read()
    except OSError:
        return False
