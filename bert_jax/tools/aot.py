"""Chips that programs are compiled for without having one, and what their compilers say of a program.

    target = targets.get("v5e:2x4")     # `target.devices` go into a mesh as any others do
    check = targets.check(step.trace(...), target)
    check.fits, check.memory, check.collectives

TPU and GPU compilers run on any machine (extra `aot`). That a program compiles and fits is all that they say: nothing
of its speed, and nothing was run.
"""

import importlib.util
import math
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
from jax.extend.core import jaxprs_in_params

from bert_jax.config import BertConfig
from bert_jax.errors import InputError, quoted

GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """What is published of a chip.

    Attributes:
        platform: By JAX's name, "tpu" or "cuda".
        topology: How many there are by default.
        memory: Bytes of each that a program may have, as the compiler of the TPUs and the driver of the GPU say.
        flops: Of products of bfloat16, dense, a second.
        memory_rate: Bytes a second to and from its memory.
        link_rate: Bytes a second to other chips, and as many from them.
    """

    platform: str
    topology: str
    memory: int
    flops: float
    memory_rate: float
    link_rate: float


# TPUs: cloud.google.com/tpu/docs/v5e, v6e and v5p; H100 SXM: NVIDIA's data sheet. Their links are published both ways
# together (v5e 400 GB/s, v6e 800, v5p 1200, H100 900).
CHIPS = {
    "v5e": Chip("tpu", "2x4", int(15.75 * GIB), 197e12, 819e9, 200e9),
    "v6e": Chip("tpu", "2x4", int(31.25 * GIB), 918e12, 1638e9, 400e9),
    "v5p": Chip("tpu", "2x2x2", int(95.74 * GIB), 459e12, 2765e9, 600e9),
    "h100": Chip("cuda", "8", 84942979072, 989e12, 3350e9, 450e9),
}

# What libtpu wants to know on a machine without a TPU, before it is loaded.
TPU_ENVIRONMENT = {
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_LOG_DIR": "disabled",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}

# An H100 SXM as XLA's `GpuTargetConfigProto`: the CUDA programming guide's limits of compute capability 9.0, and what
# the driver says of the device.
H100 = """
gpu_device_info {
  cuda_compute_capability { major: 9 }
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448 shared_memory_per_core: 233472
  registers_per_block_limit: 65536 registers_per_core_limit: 65536
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98 l2_cache_size: 52428800
  memory_bandwidth: 3352320000000 device_memory_size: 84942979072
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


@dataclass(frozen=True)
class Target:
    """Devices that programs are compiled for, and none of which need be there."""

    name: str
    chip: Chip
    devices: Sequence[Any]


def get(name: str) -> Target:
    """The devices of a chip's topology, `v5e:2x4`, `h100:8`, or `v5e` for eight.

    Raises:
        InputError: If there is no such chip or topology, or its compiler is not installed.
    """
    kind, _, topology = name.partition(":")
    if kind not in CHIPS:
        known = ", ".join(f"{kind}:{chip.topology}" for kind, chip in CHIPS.items())
        raise InputError(f"The target {quoted(name)} is unknown; expected a chip and how many, as in {known}.")
    chip = CHIPS[kind]
    compiler = {"tpu": "libtpu", "cuda": "jax_cuda13_plugin"}[chip.platform]
    if importlib.util.find_spec(compiler) is None:
        raise InputError(f"The target {name!r} needs its compiler, {compiler}: pip install 'bert-jax[aot]'.")
    topology = topology or chip.topology
    shape = rf"[1-9]\d*(x[1-9]\d*){{{chip.topology.count('x')}}}"
    if not re.fullmatch(shape, topology):
        raise InputError(f"The target {name!r} has no such topology; expected one like {kind}:{chip.topology}.")
    from jax.experimental import topologies

    try:
        if chip.platform == "tpu":
            for variable, value in TPU_ENVIRONMENT.items():
                os.environ.setdefault(variable, value)
            described = topologies.get_topology_desc(platform="tpu", topology_name=f"{kind}:{topology}")
        else:
            described = topologies.get_topology_desc(
                platform="cuda", topology_name="", target_config=H100, topology=f"1x1x{topology}"
            )
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        raise InputError(f"The compiler has no target {name!r}: {error}") from None
    return Target(f"{kind}:{topology}", chip, described.devices)


# ── What a compiler says ─────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Check:
    """What became of a program.

    Attributes:
        target: What it was compiled for.
        fits: Whether a device's memory suffices.
        memory: Bytes that a device needs at the most; of a program that does not fit, as the compiler says.
        resident: Bytes of arguments and results that lie in it from beginning to end.
        aliased: Bytes of arguments that results overwrite, for they were donated.
        seconds: That compiling took.
        products: "bfloat16 × bfloat16 → float32" -> how many there are, and their operations, on all devices; a product
            and a sum are two. What custom kernels do is not among them.
        collectives: Name -> how many there are, and bytes of what they give on each device.
        kernels: Name -> how many calls of it.
    """

    target: Target
    fits: bool
    memory: int
    resident: int
    aliased: int
    seconds: float
    products: Mapping[str, tuple[int, float]]
    collectives: Mapping[str, tuple[int, int]]
    kernels: Mapping[str, int]

    @property
    def line(self) -> str:
        """Whether it fits, in short."""
        verdict = "fits" if self.fits else "DOES NOT FIT"
        return f"{verdict}, {self.memory / GIB:.2f} of {self.target.chip.memory / GIB:.2f} GiB a device"

    def __str__(self) -> str:
        devices = f"{len(self.target.devices)} × {self.target.devices[0].device_kind}"
        lines = [
            f"{'compiles' if self.fits else 'does not compile'} for {self.target.name} ({devices}), "
            f"{self.seconds:.0f} s; never run on it",
            f"memory: {self.line}"
            + (f", {self.resident / GIB:.2f} of it for state, parameters and batch" if self.fits else ""),
            "products: " + _listed(self.products, lambda n, flops: f"{n}, {flops / 1e12:.2f} TFLOP"),
        ]
        if self.fits:
            lines.append("collectives: " + _listed(self.collectives, lambda n, size: f"{n}, {size / 1e6:,.1f} MB"))
            lines.append("custom kernels: " + (", ".join(f"{n} × {k}" for k, n in self.kernels.items()) or "none"))
        return "\n".join(lines)


def _listed(entries: Mapping[str, tuple[int, Any]], words: Callable[[int, Any], str]) -> str:
    return "; ".join(f"{name} ({words(*entry)})" for name, entry in entries.items()) or "none"


def check(traced: jax.stages.Traced, target: Target) -> Check:
    """Compiles a program whose arguments lie on a target's devices.

    TPU compilers are told to make haste (`exec_time_optimization_effort`): it is asked whether a program fits, not for
    the fastest one.
    """
    products = _products(traced.jaxpr.jaxpr)
    began = time.perf_counter()
    options = {"exec_time_optimization_effort": -1.0} if target.chip.platform == "tpu" else {}
    try:
        compiled = traced.lower().compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        needed = re.search(r"(?:Used |temporaries \()([\d.]+)([KMGT])", str(error))
        memory = int(float(needed[1]) * 1024 ** ("KMGT".index(needed[2]) + 1)) if needed else 0
        return Check(target, False, memory, 0, 0, time.perf_counter() - began, products, {}, {})
    seconds = time.perf_counter() - began
    sizes = compiled.memory_analysis()
    assert sizes is not None
    resident = sizes.argument_size_in_bytes + sizes.output_size_in_bytes - sizes.alias_size_in_bytes
    memory = resident + sizes.temp_size_in_bytes + sizes.generated_code_size_in_bytes
    text = compiled.as_text() or ""
    return Check(
        target=target,
        fits=memory <= target.chip.memory,  # GPUs' compiler does not say
        memory=memory,
        resident=resident,
        aliased=sizes.alias_size_in_bytes,
        seconds=seconds,
        products=products,
        collectives=_collectives(text),
        kernels=_kernels(text),
    )


def _products(jaxpr: Any, times: int = 1) -> dict[str, tuple[int, float]]:
    """Products by the types of their operands and result; those in loops as often as they run."""
    found: dict[str, tuple[int, float]] = {}

    def add(name: str, count: int, flops: float) -> None:
        before = found.get(name, (0, 0.0))
        found[name] = before[0] + count, before[1] + flops

    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            left, right, result = (variable.aval for variable in (*equation.invars, *equation.outvars))
            (contracted, _), _ = equation.params["dimension_numbers"]
            inner = math.prod(left.shape[axis] for axis in contracted)
            add(f"{left.dtype} × {right.dtype} → {result.dtype}", times, 2.0 * times * result.size * inner)
        elif equation.primitive.name != "pallas_call":
            repeats = times * equation.params.get("length", 1) if equation.primitive.name == "scan" else times
            for inside in jaxprs_in_params(equation.params):
                for name, entry in _products(inside, repeats).items():
                    add(name, *entry)
    return dict(sorted(found.items(), key=lambda item: -item[1][1]))


_COLLECTIVE = re.compile(r" = (.*?) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-done)?\(")
_ARRAY = re.compile(r"\b(pred|[a-z]+(\d+)[a-z0-9]*)\[([\d,]*)\]")
# Those that compilers put in for their own purposes.
_OWN = {"AllocateBuffer", "AssumeGatherIndicesInBound", "GatherScatterIndicesBitpacked", "X64Combine", "Sharding"}


def _collectives(text: str) -> dict[str, tuple[int, int]]:
    """Collectives of a compiled program's text; those in loops as often as they run."""
    computations: dict[str, list[str]] = {}
    entry = current = ""
    for line in text.splitlines():
        if header := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            current = header[2]
            entry = current if header[1] else entry
            computations[current] = []
        elif current:
            computations[current].append(line)
    found: dict[str, tuple[int, int]] = {}

    def walk(name: str, times: int) -> None:
        for line in computations.get(name, ()):
            if match := _COLLECTIVE.search(line):
                count, size = found.get(match[2], (0, 0))
                found[match[2]] = count + times, size + times * _bytes(match[1])
            repeats = times
            if loop := re.search(r"condition=%?([\w.\-]+)", line):  # counted loops alone, as scans are
                limits = re.findall(r"s32\[\]\S* constant\((\d+)\)", "\n".join(computations.get(loop[1], ())))
                repeats *= max(map(int, limits), default=1)
            for inside in re.findall(r"(?:body|calls|to_apply|branch_computations)=\{?%?([\w.\-]+)", line):
                walk(inside, repeats)

    walk(entry, 1)
    return found


def _bytes(shapes: str) -> int:
    return sum(
        max(1, int(bits or 8) // 8) * math.prod(int(size) for size in sizes.split(",") if size)
        for _, bits, sizes in _ARRAY.findall(shapes)
    )


def _kernels(text: str) -> dict[str, int]:
    names = Counter(re.findall(r'custom_call_target="([^"]+)"', text))
    return {name: n for name, n in names.most_common() if name not in _OWN}


def largest(try_out: Callable[[int], Check], n: int, first: Check) -> int:
    """The most that fits, to within an eighth or one; 0 if none does.

    Memory grows nearly in line with what lies beside the state, so that a line through two programs' needs points to
    where to look; near the limit compilers save it, and what the line points to is left behind in larger steps.

    Args:
        try_out: Compiles the program of so many.
        n: What has been tried.
        first: What became of it.
    """
    limit, check = first.target.chip.memory, first
    low: tuple[int, int] = (0, first.resident)  # fits: how many, and bytes
    high: tuple[int, int] | None = None  # does not
    while True:
        low, high = ((n, check.memory), high) if check.fits else (low, (n, check.memory))
        step = max(1, low[0] // 8)
        if high and high[0] - low[0] <= step:
            return low[0]
        (n1, memory1), (n2, memory2) = (low, high) if high else ((0, first.resident), low)
        pointed = min(n1 + (limit - memory1) * (n2 - n1) / max(memory2 - memory1, 1), 64 * n2)
        if high:  # halfway to the middle, for the line may be far from straight
            pointed = min((2 * pointed + low[0] + high[0]) / 4, high[0] - 1)
        n = int(max(pointed, low[0] + (step if high else 4 * step)))
        check = try_out(n)


# ── On paper ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def train_flops(config: BertConfig, rows: int, length: int) -> float:
    """Operations of a training step by formula, 6·B·T·L·(4D² + 2DF + 2TD): the encoder's products, three times over."""
    size, inner = config.hidden_size, config.intermediate_size
    per_token = 4 * size**2 + 2 * size * inner + 2 * length * size
    return 6.0 * rows * length * config.num_hidden_layers * per_token


def bound(check: Check) -> dict[str, float]:
    """Seconds that a program takes at the least, by each of a chip's published rates; the longest is the roofline.

    `products` (those of custom kernels apart) at the peak rate of bfloat16; `memory` moves arguments and results once;
    `links` carry an all-reduce twice, less the own share, as a ring does, and any other collective's result once.
    """
    n, chip = len(check.target.devices), check.target.chip
    sent = sum(
        size * (2.0 if name == "all-reduce" else 1.0) * (n - 1) / n for name, (_, size) in check.collectives.items()
    )
    return {
        "products": sum(flops for _, flops in check.products.values()) / n / chip.flops,
        "memory": (check.resident + check.aliased) / chip.memory_rate,
        "links": sent / chip.link_rate,
    }
