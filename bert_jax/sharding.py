"""Placement of arrays on devices. A mesh arranges devices along named axes, and each axis shards certain arrays.

The `data` axis shards the rows of a batch. The `fsdp` axis shards not only the rows but also the parameters, their
gradients and the optimizer state (Rajbhandari et al. 2020, "ZeRO", stage 3). The `tensor` axis shards the attention
heads and the inner features of the feed-forward layers (Shoeybi et al. 2019, "Megatron-LM", section 3).
"""

import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Concatenate, ParamSpec, TypeVar

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from bert_jax import distributed, tree
from bert_jax.config import BertConfig
from bert_jax.errors import InputError

Model = TypeVar("Model")
Arguments = ParamSpec("Arguments")
Output = TypeVar("Output")

AXES = ("data", "fsdp", "tensor")
"""The axes of the meshes that `mesh` creates."""
BATCH_AXES = ("data", "fsdp")
"""The mesh axes that shard the rows of a batch."""

# Each rule pairs a pattern for parameter paths with the mesh axes that shard the first, second, … axis of a parameter.
# The first pattern that matches a path applies. A parameter that no pattern matches is replicated on every device. An
# array axis is not sharded if its size is not a multiple of the mesh axis's size. Weights of linear layers have the
# shape [out, in].
RULES: tuple[tuple[str, PartitionSpec], ...] = (
    (r".*\.(query|key|value|intermediate)\.weight", PartitionSpec("tensor", "fsdp")),
    (r".*\.(query|key|value|intermediate)\.bias", PartitionSpec("tensor")),
    (r".*\.output\.weight", PartitionSpec("fsdp", "tensor")),
    (r".*\.word_embeddings\.weight", PartitionSpec("tensor", "fsdp")),
    (r".*\.(position_embeddings|pooler|transform)\.weight", PartitionSpec("fsdp")),
)


def mesh(
    *, data: int = -1, fsdp: int = 1, tensor: int = 1, devices: Sequence[jax.Device] | None = None
) -> jax.sharding.Mesh:
    """Arranges devices along the `data`, `fsdp` and `tensor` axes.

    Args:
        data: The number of device groups across which the rows of a batch are sharded; -1 for as many groups as the
            devices allow.
        fsdp: The number of devices across which a group's rows, the parameters, the gradients and the optimizer state
            are sharded.
        tensor: The number of devices across which the attention heads and the inner features of the feed-forward layers
            are sharded.
        devices: The devices to use; by default, the devices of all processes.

    Raises:
        InputError: If the sizes of the axes do not fit the number of devices.
    """
    devices = sorted(
        jax.devices() if devices is None else devices, key=lambda device: (device.process_index, device.id)
    )
    count, rest = len(devices), fsdp * tensor
    groups = count // rest if data == -1 and rest > 0 and count % rest == 0 else data
    shape = (groups, fsdp, tensor)
    if min(shape) < 1 or math.prod(shape) > count:
        raise InputError(
            f"mesh is {{data: {data}, fsdp: {fsdp}, tensor: {tensor}}}; there are {count} devices. Expected sizes of "
            f"at least 1 with a product of at most {count}, or data: -1 (all devices) if fsdp · tensor divides {count}."
        )
    array = np.array(devices[: math.prod(shape)]).reshape(shape)
    return jax.sharding.Mesh(array, AXES, axis_types=(AxisType.Auto,) * 3)


def local(sizes: Mapping[str, int] | None = None) -> jax.sharding.Mesh:
    """Returns a mesh of this process's devices.

    Args:
        sizes: The axis sizes to pass to `mesh`. By default, the `data` axis contains all devices of this process, with
            two exceptions. If `jax.default_device` is set, the mesh contains only that device. On CPUs, the mesh
            contains only the first device, because simulated devices share the same cores.

    Raises:
        InputError: If the sizes of the axes do not fit the number of devices.
    """
    if sizes is not None:
        return mesh(**sizes, devices=jax.local_devices())
    default = jax.config.jax_default_device  # type: ignore[attr-defined]
    devices = jax.local_devices(backend=default if isinstance(default, str) else None)
    if isinstance(default, jax.Device):
        devices = [default]
    elif default is not None or devices[0].platform == "cpu":
        devices = devices[:1]
    return mesh(devices=devices)


def mesh_of(params: Any) -> jax.sharding.Mesh | None:
    """Returns a mesh of the devices on which a pytree's arrays were explicitly placed.

    If the arrays were not explicitly placed, returns None.

    Raises:
        InputError: If the arrays are sharded on a mesh that `mesh` did not create, or on devices of other processes.
    """
    first = next(iter(jax.tree.leaves(params)))
    if not isinstance(first, jax.Array) or not first.committed:
        return None
    place = first.sharding
    if isinstance(place, NamedSharding) and isinstance(place.mesh, jax.sharding.Mesh):
        if _ours(place.mesh) and not place.mesh.is_multi_process:
            return place.mesh
        if not all(leaf.is_fully_replicated for leaf in jax.tree.leaves(params)):
            raise InputError(
                "The model is sharded on a mesh that was not made by bert_jax.sharding.mesh, or that has devices of "
                "other processes. Pass mesh=bert_jax.sharding.mesh(devices=jax.local_devices()), or replicate the "
                "parameters first."
            )
        return None
    return mesh(devices=list(place.device_set)) if len(place.device_set) == 1 else None


def _ours(mesh: jax.sharding.Mesh) -> bool:
    """Returns whether a mesh has the axes that `sharding.mesh` creates."""
    return mesh.axis_names == AXES and set(mesh.axis_types) == {AxisType.Auto}


def part(mesh: jax.sharding.Mesh) -> tuple[int, int]:
    """Determines which part of a batch's rows this process's devices hold.

    Processes that differ only in their position along the `tensor` axis hold the same part.

    Returns:
        The index of the part and the number of parts.

    Raises:
        InputError: If the mesh has no devices of this process, or if the processes would not hold equal, contiguous
            parts.
    """
    owners = mesh.devices.reshape(share(mesh), -1)
    groups = [n for n, row in enumerate(owners) if jax.process_index() in {device.process_index for device in row}]
    count = len(groups)
    if not count or share(mesh) % count or groups[0] % count or groups[-1] - groups[0] >= count:
        raise InputError(
            f"mesh is {dict(mesh.shape)}; {distributed.name()} holds the parts {groups} of the rows. Expected a mesh "
            "of all devices, with axes that divide the number of devices of a process or are multiples of it."
        )
    return groups[0] // count, share(mesh) // count


def check(mesh: jax.sharding.Mesh, config: BertConfig) -> None:
    """Checks that a mesh fits a model.

    Raises:
        InputError: If the mesh does not have the axes that `bert_jax.sharding.mesh` creates, or if the size of the
            `tensor` axis does not divide both the number of attention heads and the number of inner features.
    """
    if not _ours(mesh):
        axes = ", ".join(f"{name} ({kind.name})" for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True))
        raise InputError(
            f"The mesh has the axes {axes}; expected {', '.join(AXES)} (Auto). Make it with bert_jax.sharding.mesh."
        )
    for name in ("num_attention_heads", "intermediate_size"):
        if getattr(config, name) % mesh.shape["tensor"]:
            raise InputError(
                f"mesh.tensor is {mesh.shape['tensor']}, which does not divide {name}, {getattr(config, name)}."
            )


def replicated(mesh: jax.sharding.Mesh) -> NamedSharding:
    """Returns a sharding that replicates an array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def by_row(mesh: jax.sharding.Mesh) -> NamedSharding:
    """Returns a sharding that splits a batch by rows."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def placement(mesh: jax.sharding.Mesh, path: str, shape: tuple[int, ...]) -> NamedSharding:
    """Returns the sharding of a parameter according to `RULES`."""
    spec = next((spec for pattern, spec in RULES if re.fullmatch(pattern, path)), PartitionSpec())
    fitting = [axis if axis and size % mesh.shape[axis] == 0 else None for axis, size in zip(spec, shape, strict=False)]
    return NamedSharding(mesh, PartitionSpec(*fitting))


def placements(mesh: jax.sharding.Mesh, tree: Any) -> Any:
    """Returns the sharding of each array in a pytree according to `RULES`.

    The last key in an array's pytree path serves as its parameter path. In a training run, the parameters and the
    optimizer state are in dicts keyed by parameter path. Other arrays, such as the number of steps, match no rule and
    are replicated.
    """

    def of(path: Any, leaf: Any) -> NamedSharding:
        return placement(mesh, jax.tree_util.keystr(path[-1:], simple=True), leaf.shape)

    return jax.tree_util.tree_map_with_path(of, tree)


def put(arrays: Any, layout: Any) -> Any:
    """Puts a pytree of arrays on devices, sharded according to `layout`. Every process passes the complete arrays."""
    if jax.process_count() == 1:
        return jax.device_put(arrays, layout)

    def place(array: Any, sharding: NamedSharding) -> jax.Array:
        return jax.make_array_from_callback(array.shape, sharding, np.asarray(array).__getitem__)

    return jax.tree.map(place, arrays, layout)


def abstract(tree: Any, places: Any) -> Any:
    """Returns the shapes, dtypes and shardings of a pytree of arrays.

    Args:
        tree: The pytree.
        places: One sharding for all arrays, or a pytree with one sharding for each array.
    """
    places = jax.tree.broadcast(places, tree)
    return jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree, places)


def put_batch(batch: Mapping[str, Any], mesh: jax.sharding.Mesh) -> Any:
    """Puts a batch on the devices. Each process passes its own rows."""
    return jax.make_array_from_process_local_data(by_row(mesh), batch)


def share(mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh) -> int:
    """Returns the number of shards into which a mesh divides a batch.

    The number of rows in the batch must be a multiple of this number.
    """
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def by_rows(x: jax.Array) -> jax.Array:
    """Constrains activations between layers to be sharded only by rows.

    Without this constraint, the compiler may choose another layout.

    Args:
        x: The activations, [B, …].

    Returns:
        The constrained activations. If the current mesh (`jax.set_mesh`) lacks an axis in `BATCH_AXES` or does not
        shard rows, `x` is returned unchanged.
    """
    return jax.lax.with_sharding_constraint(x, PartitionSpec(BATCH_AXES)) if shares() > 1 else x


def by_rows_from_features(x: jax.Array) -> jax.Array:
    """Applies `by_rows` to vectors [B, T, D] from a table whose features are sharded along the `fsdp` axis.

    The looked-up vectors are first constrained to be sharded by rows along `data` and by features along `fsdp`. To
    change from this layout to that of `by_rows`, the devices along `fsdp` exchange parts of the vectors. If both axes
    have several devices, the compiler would replicate all vectors without this intermediate layout ("involuntary full
    rematerialization").
    """
    mesh = jax.sharding.get_abstract_mesh()
    both = set(BATCH_AXES) <= set(mesh.axis_names) and min(mesh.shape[axis] for axis in BATCH_AXES) > 1
    if both and x.shape[-1] % mesh.shape["fsdp"] == 0:
        return by_rows(jax.lax.with_sharding_constraint(x, PartitionSpec("data", None, "fsdp")))
    return x


def shares() -> int:
    """Returns `share` for the current mesh (`jax.set_mesh`); 1 if that mesh lacks an axis in `BATCH_AXES`."""
    mesh = jax.sharding.get_abstract_mesh()
    return share(mesh) if set(BATCH_AXES) <= set(mesh.axis_names) else 1


def platform() -> str:
    """Returns JAX's name for the current mesh's platform, or for JAX's default platform if there is no mesh."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else str(device.platform)


def automatic(
    call: Callable[Concatenate[Model, Arguments], Output],
) -> Callable[Concatenate[Model, Arguments], Output]:
    """Decorates a model's call so that it also runs on a mesh with Explicit axes.

    `jax.make_mesh` creates Explicit axes by default. On these axes, an operation must specify the sharding of its
    result if the operands do not determine that sharding. Inside the decorated call, the compiler chooses the shardings
    instead. The rows of the output are sharded like those of `input_ids` or `inputs_embeds`. The decorator does nothing
    unless the current mesh (`jax.set_mesh`) has Explicit axes.
    """

    @functools.wraps(call)
    def run(model: Model, /, *args: Arguments.args, **kwargs: Arguments.kwargs) -> Output:
        mesh = jax.sharding.get_abstract_mesh()
        pairs = zip(mesh.axis_names, mesh.axis_types, strict=True)
        explicit = tuple(name for name, kind in pairs if kind == AxisType.Explicit)
        if not explicit:
            return call(model, *args, **kwargs)
        params, skeleton = tree.split(model)
        values = [*args, *kwargs.values()]
        fixed = {i for i, value in enumerate(values) if value is None or isinstance(value, Mapping)}  # interventions
        arrays = {i: jax.numpy.asarray(value) for i, value in enumerate(values) if i not in fixed}

        def inside(params: tree.Params, arrays: Mapping[int, jax.Array]) -> Output:
            given: Any = [arrays.get(i, value) for i, value in enumerate(values)]
            named = dict(zip(kwargs, given[len(args) :], strict=True))
            return call(tree.merge(skeleton, params), *given[: len(args)], **named)

        names: list[Any] = ["input_ids"][: len(args)] + [None] * (len(args) - 1) + list(kwargs)
        inputs = [arrays[i] for i in arrays if names[i] in ("input_ids", "inputs_embeds") and arrays[i].ndim > 1]
        rows = jax.typeof(inputs[0]).sharding.spec[0] if inputs else None
        found: Output = jax.sharding.auto_axes(inside, axes=explicit, out_sharding=PartitionSpec(rows))(params, arrays)
        return found

    return run
