"""Products and sums over tokens, made in the form that the backend makes well.

XLA's CPU backend is slow at some things that a model does: products of few rows, sums over many
tokens, scattered sums by product. What to write instead is decided here and nowhere else, so the
rest of the package reads as the mathematics does. docs/benchmarks.md has the measurements.
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp


@dataclass(frozen=True)
class Tuning:
    """Sizes that suit a backend. They change the speed and the order of additions, nothing else."""

    few_rows: int  # products of at most so many rows have the matrix first; 0: none
    large: int  # numbers in a matrix that counts as large
    parts: int  # products that make that of one row and a large matrix
    tokens_per_chunk: int  # of a device, that go through a unit at once
    micro_batches: bool  # the default of training: no more rows at once than fit a chunk


CPU = Tuning(few_rows=64, large=2**20, parts=4, tokens_per_chunk=2048, micro_batches=True)
# Not in micro-batches: each costs a sum of the gradients over devices.
OTHERS = Tuning(few_rows=0, large=0, parts=1, tokens_per_chunk=65_536, micro_batches=False)


def tuning() -> Tuning:
    """The tuning for the backend that is being traced for.

    A mesh that tracing knows (`sharding.traced_on`) names its platform, and so does
    `jax.default_device`. Without either, tracing does not know where its program will run, and
    JAX's default backend is the best guess: `jax.lax.platform_dependent` would know, but it cannot
    choose between shapes.
    """
    mesh = jax.sharding.get_abstract_mesh()
    target = mesh.abstract_device or jax.config.jax_default_device  # pyright: ignore
    platform = getattr(target, "platform", target) or jax.default_backend()
    return CPU if platform == "cpu" else OTHERS


# Products of few rows: decoding.


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class OutputMajor:
    """A matrix that is stored as `[out, in]`, which products with few rows read in order."""

    matrix: jax.Array


def matmul(x: jax.Array, matrix: jax.Array | OutputMajor) -> jax.Array:
    """x `[..., in]` times a matrix `[in, out]`: `[..., out]`.

    As a product of two matrices: then its gradient copies no transpose.
    """
    lead = x.shape[:-1]
    x = x.reshape(-1, x.shape[-1])
    y = matmul_few(x, matrix.matrix) if isinstance(matrix, OutputMajor) else x @ matrix
    return y.reshape(*lead, y.shape[-1])


def matmul_few(x: jax.Array, matrix: jax.Array) -> jax.Array:
    """x `[..., rows, in]` times a matrix `[..., out, in]`: `[..., rows, out]`; meant for few rows.

    On a CPU the matrix comes first, and one that is not large is multiplied with each half of the
    rows, since two products run side by side better than one is shared. Barriers keep XLA from
    undoing this: it would make one product of products with the same operand, and put x first.
    """
    *lead, rows, width = x.shape
    out = matrix.shape[-2]
    tuned, parts = tuning(), parts_of(rows, matrix.size, out)
    if parts > 1:
        x = jnp.broadcast_to(x[..., None, :, :], (*lead, parts, rows, width))
        matrix = matrix.reshape(*lead, parts, out // parts, width)
        y = jnp.matmul(jax.lax.optimization_barrier(x), jnp.swapaxes(matrix, -1, -2))
        return jnp.moveaxis(y, -3, -2).reshape(*lead, rows, out)
    if rows <= tuned.few_rows:
        halves = jnp.split(x, 2 if rows % 2 == 0 and matrix.size < tuned.large else 1, axis=-2)
        products = [jnp.matmul(matrix, jnp.swapaxes(half, -1, -2)) for half in halves]
        products = [jnp.swapaxes(jax.lax.optimization_barrier(y), -1, -2) for y in products]
        return jnp.concatenate(products, axis=-2)
    return jnp.matmul(x, jnp.swapaxes(matrix, -1, -2))


def parts_of(rows: int, size: int, length: int) -> int:
    """How many products make that of `rows` rows and a matrix of `size` numbers, cut along an axis
    of `length`.

    XLA's CPU backend gives threads unequal shares of the product of one row and a large matrix;
    several such products it shares evenly.
    """
    tuned = tuning()
    return math.gcd(length, tuned.parts) if rows == 1 and size >= tuned.large else 1


def matmul_table(weights: jax.Array, table: jax.Array) -> jax.Array:
    """Weights `[B, G, R, J]` times a table of values for each `[B, G, J, V]`: `[B, G, R, V]`."""
    lead, (rows, width) = weights.shape[:-1], table.shape[-2:]
    parts = parts_of(1, table[0, 0].size, rows)
    weights = weights.reshape(*lead, parts, -1)
    table = table.reshape(*table.shape[:2], parts, -1, width)
    return jnp.einsum("bgrpj,bgpjv->bgprv", weights, table).sum(2)


# Sums, and what has sums for a gradient.


def matmul_exact(x: jax.Array, y: jax.Array) -> jax.Array:
    """The product of x and y in full precision: for a product that stands for a sum.

    XLA's sums over many rows, also those that are gradients of a broadcast, are many times slower
    on a CPU than a product; on other backends a product has a lower precision unless told.
    """
    return jnp.matmul(x, y, precision="highest")


def spread(vector: jax.Array, like: jax.Array) -> jax.Array:
    """A vector `[D]` in the shape of `like`, `[..., D]`.

    By a product, of which XLA makes a broadcast; its gradient, a sum over all tokens, stays one.
    """
    ones = jnp.ones((math.prod(like.shape[:-1]), 1), vector.dtype)
    return matmul_exact(ones, vector[None]).reshape(like.shape)


def sum_by_code(values: jax.Array, codes: jax.Array, size: int) -> jax.Array:
    """The sum of the values of each code: `[..., j, V]` and `[..., j]` to `[..., S, V]`.

    A value of code S belongs to none and is left out.

    On a CPU by adding rows one after the other, elsewhere by a product, whose order of additions
    does not change from run to run.
    """

    def by_rows(values: jax.Array, codes: jax.Array) -> jax.Array:
        def add(values: jax.Array, codes: jax.Array) -> jax.Array:
            return jnp.zeros((size, values.shape[-1]), values.dtype).at[codes].add(values)

        for _ in codes.shape[:-1]:
            add = jax.vmap(add)
        return add(values, codes)

    def by_product(values: jax.Array, codes: jax.Array) -> jax.Array:
        hits = jax.nn.one_hot(codes, size, dtype=values.dtype)
        return jnp.einsum("...js,...jv->...sv", hits, values, precision="highest")

    return jax.lax.platform_dependent(values, codes, cpu=by_rows, default=by_product)


def computed_once(x: jax.Array) -> jax.Array:
    """x, which XLA would otherwise compute again wherever it is used."""
    return jax.lax.optimization_barrier(x)
