"""Devices: one data-parallel mesh, and where arrays live on it."""

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

DATA_AXIS = 'data'


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


def shard_batch(mesh, tree):
    """Within jit: cuts the first axis of every array of the tree over the mesh."""
    return jax.lax.with_sharding_constraint(tree, batch_sharded(mesh))
