"""Compiles programs for chips that the machine lacks, and reports memory use, matrix products and collectives.

    target = aot.get("v5e:2x4")     # `target.devices` can form a mesh, like the machine's own devices
    check = aot.check(step.trace(...), target)
    check.fits, check.memory, check.collectives

The TPU and GPU compilers, which the `aot` extra installs, run on any machine. They show whether a program compiles and
fits in memory. The program is not run, so its speed and its results are not tested.
"""

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
from bert_jax.errors import InputError, check_extra, quoted

GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """The published properties of a chip.

    Attributes:
        platform: JAX's name for the platform, "tpu" or "cuda".
        topology: The default number and layout of chips, such as "2x4".
        memory: Memory that a program may use on one chip, in bytes, as reported by the TPU compiler or the GPU driver.
        flops: Operations per second in dense bfloat16 matrix products.
        memory_rate: Bytes per second to and from the chip's memory.
        link_rate: Bytes per second to other chips; the rate from other chips is the same.
    """

    platform: str
    topology: str
    memory: int
    flops: float
    memory_rate: float
    link_rate: float


# Sources: cloud.google.com/tpu/docs/v5e, v6e and v5p; NVIDIA's data sheet for the H100 SXM. The published
# interconnect rates (v5e 400 GB/s, v6e 800, v5p 1200, H100 900) are the sums of both directions, so the table contains
# half of each.
CHIPS = {
    "v5e": Chip("tpu", "2x4", int(15.75 * GIB), 197e12, 819e9, 200e9),
    "v6e": Chip("tpu", "2x4", int(31.25 * GIB), 918e12, 1638e9, 400e9),
    "v5p": Chip("tpu", "2x2x2", int(95.74 * GIB), 459e12, 2765e9, 600e9),
    "h100": Chip("cuda", "8", 84942979072, 989e12, 3350e9, 450e9),
}

# Environment variables that libtpu needs on a machine without a TPU. They are set before libtpu is loaded.
TPU_ENVIRONMENT = {
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_LOG_DIR": "disabled",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}

# An H100 SXM as XLA's `GpuTargetConfigProto`. The limits are from the CUDA programming guide, for compute capability
# 9.0. The driver reports the other values for this device.
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
    """Devices for which programs are compiled. The machine does not need to have these devices."""

    name: str
    chip: Chip
    devices: Sequence[Any]


def get(name: str) -> Target:
    """Returns the target with the given name, such as `v5e:2x4` or `h100:8`.

    If the name contains only a chip, for example `v5e`, the target has eight of these chips.

    Raises:
        InputError: If there is no such chip or topology, or if the compiler for the chip is not installed.
    """
    kind, _, topology = name.partition(":")
    chip = CHIPS.get(kind)
    if chip is None or not re.fullmatch(rf"([1-9]\d*(x[1-9]\d*){{{chip.topology.count('x')}}})?", topology):
        known = ", ".join(f"{kind}:{chip.topology}" for kind, chip in CHIPS.items())
        raise InputError(f"The target {quoted(name)} is unknown; expected a chip and a topology such as {known}.")
    check_extra("aot", {"tpu": "libtpu", "cuda": "jax_cuda13_plugin"}[chip.platform])
    topology = topology or chip.topology
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
        raise InputError(f"The compiler does not support the target {name!r}: {error}") from None
    return Target(f"{kind}:{topology}", chip, described.devices)


# ── The compiler's report ─────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Check:
    """The result of compiling a program for a target.

    Attributes:
        target: The devices for which the program was compiled.
        fits: Whether the program fits in the memory of a device.
        memory: Peak memory per device, in bytes. If the compiler fails because the program does not fit, this is the
            number in the error message, or 0 if the message contains none.
        resident: Number of bytes per device in arguments and results, which stay in memory while the program runs. A
            donated argument and the result that overwrites it are counted as one. If the compiler fails, this is 0.
        aliased: Number of bytes per device in donated arguments that results overwrite. If the compiler fails, this is
            0.
        seconds: Compilation time, in seconds.
        products: Maps the types in a matrix product, such as "bfloat16 × bfloat16 → float32", to a pair: the number of
            matrix products with these types, and their total number of operations on all devices. A multiplication and
            an addition count as two operations. Matrix products in custom kernels are not included.
        collectives: Maps the name of a collective, such as "all-reduce", to the number of such collectives and the
            total size of their results on each device, in bytes.
        kernels: Maps the name of a custom kernel to the number of calls to it in the text of the compiled program.
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
        """One line that states whether the program fits in memory and how much memory it needs."""
        verdict = "fits" if self.fits else "DOES NOT FIT"
        return f"{verdict}, {self.memory / GIB:.2f} of {self.target.chip.memory / GIB:.2f} GiB per device"

    def __str__(self) -> str:
        devices = f"{len(self.target.devices)} × {self.target.devices[0].device_kind}"
        lines = [
            f"{'compiles' if self.fits else 'does not compile'} for {self.target.name} ({devices}), "
            f"{self.seconds:.0f} s; not run on it",
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
    """Compiles a traced program for a target. The program's arguments must be placed on the target's devices.

    TPU compilers run with low effort (`exec_time_optimization_effort`), because the check tests whether the program
    fits in memory, not how fast it is.
    """
    multiplied = products(traced)
    began = time.perf_counter()
    options = {"exec_time_optimization_effort": -1.0} if target.chip.platform == "tpu" else {}
    try:
        compiled = traced.lower().compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        needed = re.search(r"(?:Used |temporaries \()([\d.]+)([KMGT])", str(error))
        memory = int(float(needed[1]) * 1024 ** ("KMGT".index(needed[2]) + 1)) if needed else 0
        return Check(target, False, memory, 0, 0, time.perf_counter() - began, multiplied, {}, {})
    seconds = time.perf_counter() - began
    sizes: Any = compiled.memory_analysis()
    resident = sizes.argument_size_in_bytes + sizes.output_size_in_bytes - sizes.alias_size_in_bytes
    memory = resident + sizes.temp_size_in_bytes + sizes.generated_code_size_in_bytes
    text = compiled.as_text() or ""
    kernels = Counter(re.findall(r'custom_call_target="([^"]+)"', text))
    return Check(
        target=target,
        # Whether a program fits is determined from the sizes, because the GPU compiler does not report it.
        fits=memory <= target.chip.memory,
        memory=memory,
        resident=resident,
        aliased=sizes.alias_size_in_bytes,
        seconds=seconds,
        products=multiplied,
        collectives=_collectives(text),
        kernels={name: n for name, n in kernels.most_common() if name not in _OWN},
    )


def products(traced: jax.stages.Traced) -> dict[str, tuple[int, float]]:
    """Counts the matrix products in a program and their operations; see `Check.products`.

    A matrix product in a scan is counted once per iteration.
    """
    counts, flops = Counter[str](), Counter[str]()

    def walk(jaxpr: Any, times: int) -> None:
        for equation in jaxpr.eqns:
            if equation.primitive.name == "dot_general":
                left, right, result = (variable.aval for variable in (*equation.invars, *equation.outvars))
                (contracted, _), _ = equation.params["dimension_numbers"]
                name = f"{left.dtype} × {right.dtype} → {result.dtype}"
                counts[name] += times
                flops[name] += 2 * times * result.size * math.prod(left.shape[axis] for axis in contracted)
            elif equation.primitive.name != "pallas_call":
                repeats = times * equation.params.get("length", 1) if equation.primitive.name == "scan" else times
                for inside in jaxprs_in_params(equation.params):
                    walk(inside, repeats)

    walk(traced.jaxpr.jaxpr, 1)
    return {name: (counts[name], float(n)) for name, n in flops.most_common()}


_COLLECTIVE = re.compile(r" = (.*?) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-done)?\(")
_ARRAY = re.compile(r"\b(pred|[a-z]+(\d+)[a-z0-9]*)\[([\d,]*)\]")
# Custom calls that compilers insert. They are not kernels of the program.
_OWN = {"AllocateBuffer", "AssumeGatherIndicesInBound", "GatherScatterIndicesBitpacked", "X64Combine", "Sharding"}


def _collectives(text: str) -> dict[str, tuple[int, int]]:
    """Finds the collectives in the text of a compiled program; see `Check.collectives`.

    A collective in a loop is counted once per iteration. The number of iterations is assumed to be the largest constant
    in the loop's condition, which is correct for a scan.
    """
    _, *parts = re.split(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$", text, flags=re.MULTILINE)
    names, bodies = parts[1::3], parts[2::3]
    computations = dict(zip(names, bodies, strict=True))
    found: dict[str, tuple[int, int]] = {}

    def walk(name: str, times: int) -> None:
        for line in computations.get(name, "").splitlines():
            if match := _COLLECTIVE.search(line):
                count, size = found.get(match[2], (0, 0))
                found[match[2]] = count + times, size + times * _bytes(match[1])
            repeats = times
            if loop := re.search(r"condition=%?([\w.\-]+)", line):
                limits = re.findall(r"s32\[\]\S* constant\((\d+)\)", computations.get(loop[1], ""))
                repeats *= max(map(int, limits), default=1)
            for inside in re.findall(r"(?:body|calls|to_apply|branch_computations)=\{?%?([\w.\-]+)", line):
                walk(inside, repeats)

    walk(next((name for name, entry in zip(names, parts[::3], strict=True) if entry), ""), 1)
    return found


def _bytes(shapes: str) -> int:
    return sum(
        max(1, int(bits or 8) // 8) * math.prod(int(size) for size in sizes.split(",") if size)
        for _, bits, sizes in _ARRAY.findall(shapes)
    )


def largest(try_out: Callable[[int], Check], n: int, first: Check) -> int:
    """Finds the largest size, such as a number of rows, at which a program fits in memory. Returns 0 if no size fits.

    A result of 16 or more may be too low, but by less than an eighth of its value.

    Apart from the state, memory use grows almost linearly with the size. The next size to try is therefore extrapolated
    or interpolated from the memory use of two programs. Near the limit, compilers save memory, so this prediction is
    too low. Therefore, the next size is at least one step larger than the largest size that is known to fit. A step is
    an eighth of the largest size that fits, rounded down, but at least 1. As long as all sizes tried so far fit, the
    next size is at least four steps larger.

    Args:
        try_out: A function that compiles the program for a given size.
        n: A size that has already been tried.
        first: The result for `n`.
    """
    limit, check = first.target.chip.memory, first
    low: tuple[int, int] = (0, first.resident)  # the largest size that fits, and its memory use in bytes
    high: tuple[int, int] | None = None  # the smallest size that does not fit, and its memory use
    while True:
        low, high = ((n, check.memory), high) if check.fits else (low, (n, check.memory))
        step = max(1, low[0] // 8)
        if high and high[0] - low[0] <= step:
            return low[0]
        (n1, memory1), (n2, memory2) = (low, high) if high else ((0, first.resident), low)
        pointed = min(n1 + (limit - memory1) * (n2 - n1) / max(memory2 - memory1, 1), 64 * n2)
        if high:
            # The prediction is moved halfway to the midpoint of low and high, because memory use may be far from
            # linear.
            pointed = min((2 * pointed + low[0] + high[0]) / 4, high[0] - 1)
        n = int(max(pointed, low[0] + (step if high else 4 * step)))
        check = try_out(n)


# ── Estimates ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def train_flops(config: BertConfig, rows: int, length: int) -> float:
    """Returns the number of operations in a training step.

    This is three times the number of operations in the encoder's matrix products in a forward pass. For B rows of T
    tokens, L layers, hidden size D and intermediate size F, the result is 6·B·T·L·(4D² + 2DF + 2TD).
    """
    size, inner = config.hidden_size, config.intermediate_size
    per_token = 4 * size**2 + 2 * size * inner + 2 * length * size
    return 6.0 * rows * length * config.num_hidden_layers * per_token


def bound(check: Check) -> dict[str, float]:
    """Returns the minimum time that each kind of work in a program takes at the published rates of the chip.

    The largest of these times is the roofline bound of the program.

    Returns:
        The time in seconds for each kind of work:

        - `products`: computing all matrix products, except those in custom kernels, at the peak bfloat16 rate.
        - `memory`: reading the arguments once and writing the results once.
        - `links`: sending the results of collectives to other devices. As in a ring algorithm, each of n devices sends
          (n - 1) / n of the bytes of a result, or twice as many for an all-reduce.
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
