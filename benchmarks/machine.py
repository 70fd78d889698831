"""Describes the machine of a benchmark."""

import importlib.metadata
import os
import platform

import jax


def cores():
    """Number of processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()


def description():
    """One line: the processor, the cores in use, JAX's devices."""
    devices = f'{jax.device_count()} x {jax.devices()[0].device_kind}'
    return f'{_processor()}, cores used: {cores()}, jax on {devices}'


def versions(*packages):
    """{package: version} of installed packages."""
    return {name: importlib.metadata.version(name) for name in packages}


def _processor():
    try:
        with open('/proc/cpuinfo') as file:
            return next(line.split(':')[1].strip() for line in file if line.startswith('model name'))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
