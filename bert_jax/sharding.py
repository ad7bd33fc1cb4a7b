"""Where arrays live: devices laid along named axes, and what is shared out along which."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from bert_jax import settings
from bert_jax.errors import InputError


def mesh(axes: settings.Mesh) -> jax.sharding.Mesh:
    """The devices of all processes, along the axis `data`.

    Raises:
        InputError: If the axis asks for more devices than there are.
    """
    devices = jax.devices()
    data = len(devices) if axes.data == -1 else axes.data
    if not 0 < data <= len(devices):
        raise InputError(f"mesh.data is {axes.data}; there are {len(devices)} devices (-1 takes all).")
    return jax.sharding.Mesh(np.array(devices[:data]), ("data",), axis_types=(AxisType.Auto,))


def replicated(mesh: jax.sharding.Mesh) -> NamedSharding:
    """Whole on every device: parameters and the optimizer's state."""
    return NamedSharding(mesh, PartitionSpec())


def batched(mesh: jax.sharding.Mesh) -> NamedSharding:
    """Rows shared out along `data`: batches."""
    return NamedSharding(mesh, PartitionSpec("data"))


def put_batch(batch: Mapping[str, Any], mesh: jax.sharding.Mesh) -> Any:
    """Puts a batch, of which each process brings its own rows, on the devices."""
    sharding = batched(mesh)
    if jax.process_count() == 1:
        return jax.device_put(batch, sharding)
    return jax.tree.map(lambda rows: jax.make_array_from_process_local_data(sharding, rows), batch)
