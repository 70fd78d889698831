"""Devices: one data-parallel mesh, and where arrays live on it."""

import os
import re

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

DATA_AXIS = 'data'


def reserve_host_threads():
    """Gives XLA:CPU threads enough for fake devices; call it before the first array is made.

    A collective there blocks a thread of a pool that is as large as the number of cores. With more
    fake devices than cores, all of them can end up waiting for each other, until XLA aborts.
    """
    flags = os.environ.get('XLA_FLAGS', '')
    asked = re.search(r'xla_force_host_platform_device_count=(\d+)', flags)
    devices = int(asked[1] if asked else os.environ.get('JAX_NUM_CPU_DEVICES', 1))
    if devices > 1:
        os.environ.setdefault('NPROC', str(2 * devices + (os.cpu_count() or 1)))  # XLA's name for it


def create_mesh(devices=None):
    """A mesh with the one axis `data` over all devices, or over those given."""
    return Mesh(np.asarray(jax.devices() if devices is None else devices), (DATA_AXIS,))


def replicated(mesh):
    """Sharding of what every device holds whole: state, data set."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharded(mesh):
    """Sharding of a batch: its first axis is cut over the devices."""
    return NamedSharding(mesh, PartitionSpec(DATA_AXIS))


def check_batch_size(batch_size, mesh, name='config.data.batch_size'):
    """Raises ValueError unless the batch divides over the devices of the mesh."""
    if batch_size < 1 or batch_size % mesh.size:
        raise ValueError(f'{name}={batch_size}: expected a multiple of the number of devices, {mesh.size}')


def replicate(mesh, tree):
    """Copies of a tree of arrays on every device of the mesh."""
    return jax.device_put(tree, replicated(mesh))


def global_batch(mesh, tree):
    """Arrays over the whole mesh, their first axis cut, from NumPy arrays that hold this process's part of a batch."""
    sharding = batch_sharded(mesh)
    return jax.tree.map(lambda leaf: jax.make_array_from_process_local_data(sharding, leaf), tree)


def shard_batch(mesh, tree):
    """Within jit: cuts the first axis of every array of the tree over the mesh."""
    return jax.lax.with_sharding_constraint(tree, batch_sharded(mesh))
