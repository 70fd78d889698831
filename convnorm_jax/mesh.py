"""Devices of one process or of several: one data-parallel mesh, and where arrays are placed on it."""

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from convnorm_jax.errors import UserError

DATA_AXIS = 'data'

# Environment variables in which a launcher gives the number of processes.
_LAUNCHED = ('SLURM_STEP_NUM_TASKS', 'OMPI_COMM_WORLD_SIZE')


def start_distributed(coordinator: str = '', num_processes: int = 0, process_id: int = -1) -> None:
    """Connects this process to the others of its run; call it before the first array is made.

    Without arguments it uses the environment: SLURM (srun), Open MPI, a TPU pod, Kubernetes, or
    JAX_COORDINATOR_ADDRESS, by `jax.distributed`'s own detection. A single process starts nothing.

    Args:
      coordinator: 'HOST:PORT' of process 0, the same for all; '' where the environment gives it.
      num_processes, process_id: of the run; 0 and -1 where the environment gives them.

    Raises:
      UserError: some but not all of them, or the other processes were not found.
    """
    given = {
        'coordinator_address': coordinator or None,
        'num_processes': num_processes or None,
        'process_id': None if process_id < 0 else process_id,
    }
    given = {name: value for name, value in given.items() if value is not None}
    if not given and not _launched_with_others():
        return
    words = f'--coordinator={coordinator} --num_processes={num_processes} --process_id={process_id}'
    port = re.fullmatch(r'.+:(\d{1,5})', coordinator)
    if given and (len(given) < 3 or not port or int(port[1]) > 65535 or process_id >= num_processes):
        raise UserError(
            f'{words}: expected all three, a HOST:PORT and a process_id below num_processes, e.g. '
            '--coordinator=node0:1234 --num_processes=2 --process_id=0'
        )
    try:
        jax.distributed.initialize(**given)  # type: ignore[arg-type]  # each has the type of its name
    except (ValueError, RuntimeError) as error:
        raise UserError(
            f'{words}: the processes of the run cannot find each other '
            f'({" ".join(str(error).split())[:300]}); run the same command on every host, '
            'with the address of process 0'
        ) from error


def _launched_with_others():
    """Whether the environment names other processes of this run."""
    if os.environ.get('JAX_COORDINATOR_ADDRESS') or 'JOB_COMPLETION_INDEX' in os.environ:
        return True
    hosts = os.environ.get('TPU_WORKER_HOSTNAMES', '').split(',')
    return len(hosts) > 1 or any(int(os.environ.get(name, 1)) > 1 for name in _LAUNCHED)


def is_leader() -> bool:
    """Whether this process is the one that writes files and prints: process 0."""
    return jax.process_index() == 0


def any_process(flag: bool) -> bool:
    """Whether `flag` holds in any process; collective: all processes must call it."""
    if jax.process_count() == 1:
        return bool(flag)
    return bool(np.any(multihost_utils.process_allgather(np.int32(flag))))


def leader_says(flag: bool) -> bool:
    """Process 0's `flag`, in all processes; collective."""
    return bool(flag) if jax.process_count() == 1 else bool(multihost_utils.broadcast_one_to_all(np.int32(flag)))


def from_leader(make: Callable[[], bytes]) -> bytes:
    """What `make()` returned in process 0, the only one that calls it; its exception is raised in all. Collective."""
    if jax.process_count() == 1:
        return make()
    content, caught = b'', None
    if jax.process_index() == 0:
        try:
            content = make()
        except Exception as error:
            content, caught = str(error).encode(), error
    kind = {type(None): 0, UserError: 1}.get(type(caught), 2)
    kind, *size = (int(x) for x in multihost_utils.broadcast_one_to_all(np.array([kind, *divmod(len(content), 2**20)])))
    buffer = np.zeros(size[0] * 2**20 + size[1], np.uint8)
    if jax.process_index() == 0:
        buffer[:] = np.frombuffer(content, np.uint8)
    content = np.asarray(multihost_utils.broadcast_one_to_all(buffer)).tobytes() if buffer.size else b''
    if caught is not None:
        raise caught
    if kind:
        raise (UserError if kind == 1 else RuntimeError)(f'process 0: {content.decode()}')
    return content


def check_same_everywhere(what: str, content: Any) -> None:
    """Raises UserError unless all processes have the same JSON data; collective."""
    if jax.process_count() == 1:
        return
    digest = hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).digest()
    mine = np.frombuffer(digest, np.uint32)
    others = multihost_utils.process_allgather(mine)
    different = [i for i, other in enumerate(others) if not np.array_equal(other, others[0])]
    if different:
        raise UserError(
            f'processes {", ".join(map(str, different))} were given another {what} than process 0; '
            'run the same command on every host'
        )


def wait_for_all(name: str) -> None:
    """A barrier: returns when every process has called it with this name."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def reserve_host_threads() -> None:
    """Gives XLA:CPU enough threads for fake devices; call it before the first array is made.

    A collective blocks a thread of a pool that is as large as the number of cores. With more fake devices than cores,
    all of them can end up waiting for each other, until XLA aborts.
    """
    flags = os.environ.get('XLA_FLAGS', '')
    asked = re.search(r'xla_force_host_platform_device_count=(\d+)', flags)
    devices = int(asked[1] if asked else os.environ.get('JAX_NUM_CPU_DEVICES', 1))
    if devices > 1:
        os.environ.setdefault('NPROC', str(2 * devices + (os.cpu_count() or 1)))  # XLA's name for it


def compiler_options() -> dict[str, str] | None:
    """`compiler_options` of `jax.jit` for a program as large as a training step.

    XLA:CPU then schedules for little memory. Its default schedules for concurrency, which takes three times the memory
    with ConvNorm (ResNet-18, batch 32: 0.81 GB of temporaries instead of 0.29) and was no faster.
    """
    if jax.default_backend() != 'cpu' or jax.__version_info__ < (0, 10):
        return None
    return {'xla_cpu_scheduler_type': 'CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED'}


def create_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh with the one axis `data` over all devices, or over those given."""
    return Mesh(np.asarray(jax.devices() if devices is None else devices), (DATA_AXIS,))


def replicated(mesh: Mesh) -> NamedSharding:
    """Sharding of what every device holds a copy of: state, data set."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharded(mesh: Mesh) -> NamedSharding:
    """Sharding of a batch: its first axis is split over the devices."""
    return NamedSharding(mesh, PartitionSpec(DATA_AXIS))


def check_batch_size(batch_size: int, mesh: Mesh, name: str = 'config.data.batch_size') -> None:
    """Raises UserError unless the batch can be split evenly over the devices of the mesh."""
    if batch_size < 1 or batch_size % mesh.size:
        raise UserError(f'{name}={batch_size}: expected a multiple of the number of devices, {mesh.size}')


def replicate(mesh: Mesh, tree: Any) -> Any:
    """Copies of a tree of arrays, the same in all processes, on every device of the mesh."""
    return place(tree, replicated(mesh))


def cut_batch(mesh: Mesh, tree: Any) -> Any:
    """Arrays that are the same in all processes, their first axis split over the mesh."""
    return place(tree, batch_sharded(mesh))


def global_batch(mesh: Mesh, tree: Any) -> Any:
    """Arrays split over the mesh, of whose batch each process holds its own part."""
    sharding = batch_sharded(mesh)
    return jax.tree.map(lambda leaf: jax.make_array_from_process_local_data(sharding, leaf), tree)


def place(tree: Any, sharding: jax.sharding.Sharding) -> Any:
    """`jax.device_put` of arrays that are the same in all processes, without comparing them over the network."""
    if sharding.is_fully_addressable:
        return jax.device_put(tree, sharding)
    return jax.tree.map(lambda leaf: _place_leaf(leaf, sharding), tree)


def _place_leaf(leaf, sharding):
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        return jax.device_put(leaf, sharding)
    if isinstance(leaf, jax.Array) and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        data = _place_leaf(jax.random.key_data(leaf), sharding)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
    host = np.asarray(leaf)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def fetch(tree: Any) -> Any:
    """NumPy copies of a tree of arrays, whole in every process; collective."""
    if all(getattr(leaf, 'is_fully_addressable', True) for leaf in jax.tree.leaves(tree)):
        return jax.tree.map(np.asarray, tree)
    return jax.tree.map(_fetch_leaf, tree)


def _fetch_leaf(leaf):
    if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable or leaf.is_fully_replicated:
        return np.asarray(leaf)
    return np.asarray(multihost_utils.process_allgather(leaf, tiled=True))


def shard_batch(mesh: Mesh, tree: Any) -> Any:
    """Within jit: splits the first axis of every array of the tree over the mesh."""
    return jax.lax.with_sharding_constraint(tree, batch_sharded(mesh))


def in_use(mesh: Mesh) -> contextlib.AbstractContextManager:
    """Context, within jit: tells layers over how many devices the batch is split (as `jax.set_mesh` does, around jit).

    ConvNorm then transforms the gradient with respect to its kernel back to the few taps before the all-reduce.
    """
    return jax.sharding.use_abstract_mesh(mesh.abstract_mesh)
