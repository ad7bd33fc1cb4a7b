"""Changes a model's activations during a call by applying functions at named sites.

A site is a named activation. Most names follow the path of the module that computes the activation. `SITES` lists all
names and shapes. Under jit, grad and vmap, the functions are traced together with the model.

Example:
    model(**inputs, interventions={"layers.3.attention.heads": lambda heads: heads.at[:, :, 5].set(0.0)})
"""

import functools
import re
from collections.abc import Callable, Mapping
from types import MappingProxyType

import jax

from bert_jax.errors import InputError, quoted

Interventions = Mapping[str, Callable[[jax.Array], jax.Array]]
"""Maps the name of a site to a function that takes the activation and returns its replacement, an array of the same
shape."""

NONE: Interventions = MappingProxyType({})
"""No interventions."""
SITES = {
    "embeddings": "[B, T, D]",
    "layers.{i}.attention.query": "[B, T, N, H]",
    "layers.{i}.attention.key": "[B, S, N, H]",
    "layers.{i}.attention.value": "[B, S, N, H]",
    "layers.{i}.attention.probabilities": "[B, N, T, S]",
    "layers.{i}.attention.heads": "[B, T, N, H]",
    "layers.{i}.attention.output": "[B, T, D]",
    "layers.{i}.intermediate": "[B, T, F]",
    "layers.{i}.output": "[B, T, D]",
    "layers.{i}": "[B, T, D]",
    "pooler": "[B, D]",
}
"""The sites, in the order of computation, with the shapes of their activations. `{i}` is the layer number.

`heads` is the context of each head before the output projection. `intermediate` is the hidden state of the feed-forward
block after the activation function. `attention.output` and `output` are the values that the attention block and the
feed-forward block add to the residual stream. `layers.{i}` is the output of the layer, which is also
`hidden_states[i + 1]`. If a call selects tokens with `positions`, T in the last layer is the number of selected tokens,
and `pooler` is [B, T, D].
"""


def checked_interventions(
    interventions: Interventions, *, layers: int, pooler: bool, fused: str | None, scan: bool
) -> Interventions:
    """Checks that a model has all sites at which a call intervenes.

    Args:
        interventions: The interventions of the call.
        layers: The number of layers in the model.
        pooler: Whether the model has a pooler.
        fused: The name of the attention kernel if it is fused; otherwise None.
        scan: Whether the layers are compiled as one loop.

    Returns:
        The interventions, with each function wrapped. The wrapper converts the function's result to the activation's
        dtype and raises `InputError` if the result is not an array of the activation's shape.

    Raises:
        InputError: If `interventions` is not a dict, or if a site is unknown or cannot be reached.
    """
    if not isinstance(interventions, Mapping) or not all(isinstance(site, str) for site in interventions):
        raise InputError(f"interventions is {quoted(interventions)}; expected a dict from sites to functions.")
    for site, function in interventions.items():
        layer = re.match(r"layers\.(0|[1-9][0-9]*)(?=\.|$)", site)
        name = site.replace(layer[0], "layers.{i}", 1) if layer else site
        if name not in SITES or "{i}" in site:
            raise InputError(f"{quoted(site)} is not a site; expected one of {', '.join(SITES)}.")
        if layer and int(layer[1]) >= layers:
            raise InputError(f"{quoted(site)} is not a site: the model has the layers 0 to {layers - 1}.")
        if name == "pooler" and not pooler:
            raise InputError("'pooler' is not a site of this model, because it has no pooler.")
        if layer and scan:
            raise InputError(
                f"{quoted(site)} cannot be reached, because scan_layers compiles all layers as one. Load the model "
                "with scan_layers=False."
            )
        if name.endswith(".probabilities") and fused:
            raise InputError(
                f"{quoted(site)} cannot be reached, because attention {quoted(fused)} does not store the "
                "probabilities. Load the model with attention='plain'."
            )
        if not callable(function):
            raise InputError(f"interventions[{quoted(site)}] is {quoted(function)}; expected a function of an array.")
    return {site: functools.partial(_call, site, function) for site, function in interventions.items()}


def _call(site: str, function: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
    y = function(x)
    if getattr(y, "shape", None) != x.shape:
        shape = getattr(y, "shape", quoted(y))
        raise InputError(f"The intervention at {quoted(site)} returned {shape}; expected an array of shape {x.shape}.")
    return y.astype(x.dtype)


def within(interventions: Interventions, module: str) -> Interventions:
    """Returns the interventions in a module, with site names relative to the module.

    The name "" refers to the module's output.
    """
    return {
        site.removeprefix(module).removeprefix("."): function
        for site, function in interventions.items()
        if f"{site}.".startswith(f"{module}.")
    }


def intervene(interventions: Interventions, site: str, x: jax.Array) -> jax.Array:
    """Applies a site's function to its activation. If the site has no function, returns the activation unchanged."""
    return interventions[site](x) if site in interventions else x
