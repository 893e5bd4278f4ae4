"""Products and sums over tokens, made in the form that the backend makes well.

XLA's CPU backend is slow at some things that a model does: products of few rows (decoding), sums
over many tokens (gradients), sums of the rows of each code (`sum_by_code`). What to write instead
is decided here and nowhere else, so the rest of the package reads as the mathematics does.
docs/log.md has the measurements.
"""

import functools
import math
from dataclasses import dataclass, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero, linear_call


@dataclass(frozen=True)
class Tuning:
    """Sizes that suit a backend. They change the speed and the order of additions, nothing else."""

    few_rows: int  # products of at most so many rows have the matrix first; 0: none
    large: int  # numbers in a matrix that counts as large
    parts: int  # products that make that of one row and a large matrix, or a table
    narrow_size: int  # numbers in a matrix that is worth keeping narrow
    narrow_rows: int  # products of at most so many rows read narrow matrices as they are
    loop_rows: int  # products of at most so many rows and a small matrix, or a table, are loops
    loop_size: int  # multiplications in such a product with tables, at most
    loop_sum: int  # rows of a matrix that one loop adds up; 1: a product does
    tokens_per_chunk: int  # of a device, that go through a unit at once
    logits_per_chunk: int  # of a device, that the loss holds at once
    prompt_chunk: int  # tokens of a prompt that a server reads between dispatches
    micro_batches: bool  # the default of training: no more rows at once than fit a chunk
    states_in_place: bool  # a call of many tokens writes states of units where it has read them


CPU = Tuning(
    few_rows=64,
    large=2**20,
    parts=4,
    narrow_size=2**19,
    narrow_rows=2,
    loop_rows=8,
    loop_size=2**23,
    loop_sum=8,
    tokens_per_chunk=2048,
    logits_per_chunk=2**22,
    prompt_chunk=256,  # four take as long as one of 1,024, and others wait for a quarter of it
    micro_batches=True,
    states_in_place=False,  # XLA fuses reads with the write, and copies the states of all units
)
# Not in micro-batches, and logits in large chunks: each costs a sum of gradients over devices.
OTHERS = Tuning(
    few_rows=0,
    large=0,
    parts=1,
    narrow_size=0,
    narrow_rows=2**30,
    loop_rows=0,
    loop_size=0,
    loop_sum=1,
    tokens_per_chunk=65_536,
    logits_per_chunk=2**26,
    prompt_chunk=1024,
    micro_batches=False,
    states_in_place=False,
)
TPU = replace(OTHERS, states_in_place=True)


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
    return {"cpu": CPU, "tpu": TPU}.get(platform, OTHERS)


def wide_dtype(dtype: Any) -> Any:
    """float32, or float64 for what is float64: the precision of norms, softmaxes and sums."""
    return jnp.dtype(jnp.float64 if jnp.dtype(dtype) == jnp.float64 else jnp.float32)


# Products of few rows: decoding.


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class OutputMajor:
    """A matrix that is stored as `[out, in]`, which products with few rows read in order."""

    matrix: jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class InputMajor:
    """A matrix that is stored as `[in, out]`, of which a product with few rows is a loop."""

    matrix: jax.Array


Weights = Literal["as-saved", "bfloat16", "int8"]
MOST_INT8 = 127


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Narrow:
    """A matrix in numbers of few bits, in int8 with a scale for each column."""

    numbers: jax.Array  # [in, out]: int8, or uint16, the bits of bfloat16
    scale: jax.Array | None  # float32 [out]; None: all are 1


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Rounding:
    """A matrix `[in, out]` whose products round what they multiply (`matmul_rounded`)."""

    matrix: jax.Array


Matrix = jax.Array | OutputMajor | InputMajor | Narrow | Rounding


def narrow(matrix: jax.Array, weights: Weights) -> Narrow:
    """A matrix `[..., in, out]` rounded; one that is rounded already keeps its values."""
    if weights == "bfloat16":
        return Narrow(jax.lax.bitcast_convert_type(matrix.astype(jnp.bfloat16), jnp.uint16), None)
    wide = matrix.astype(wide_dtype(matrix.dtype))
    scale = jnp.abs(wide).max(axis=-2) / MOST_INT8
    numbers = jnp.round(wide / jnp.where(scale == 0, 1, scale)[..., None, :])
    return Narrow(numbers.astype(jnp.int8), scale.astype(jnp.float32))


def for_few_rows(
    matrix: jax.Array, weights: Weights = "as-saved", dtype: Any = None
) -> OutputMajor | InputMajor | Narrow:
    """A matrix `[in, out]` as products of few rows want it: rounded as `weights` says, if it is
    large enough for that to pay; else in `dtype`, if one is given."""
    tuned = tuning()
    if weights != "as-saved" and matrix.size >= tuned.narrow_size:
        return narrow(matrix, weights)
    matrix = matrix if dtype is None else matrix.astype(dtype)
    small = matrix.size < tuned.large and matrix.dtype == wide_dtype(matrix.dtype)
    loops = tuned.loop_rows > 0 and len(matrix) % tuned.loop_sum == 0
    return InputMajor(matrix) if small and loops else OutputMajor(matrix.T)


def matmul(x: jax.Array, matrix: Matrix) -> jax.Array:
    """x `[..., in]` times a matrix `[in, out]`: `[..., out]`.

    As a product of two matrices: then its gradient copies no transpose.
    """
    lead = x.shape[:-1]
    x = x.reshape(-1, x.shape[-1])
    if isinstance(matrix, Narrow):
        y = matmul_narrow(x, matrix)
    elif isinstance(matrix, Rounding):
        y = matmul_rounded(x, matrix.matrix)
    elif isinstance(matrix, InputMajor):
        looped = len(x) <= tuning().loop_rows
        y = matmul_loop(x, matrix.matrix) if looped else x @ matrix.matrix
    else:
        y = matmul_few(x, matrix.matrix) if isinstance(matrix, OutputMajor) else x @ matrix
    return y.reshape(*lead, y.shape[-1])


def matmul_few(x: jax.Array, matrix: jax.Array) -> jax.Array:
    """x `[..., rows, in]` times a matrix `[..., out, in]`: `[..., rows, out]`; meant for few rows.

    On a CPU the matrix comes first, and with one row a large one is cut in parts. Barriers keep XLA
    from undoing this: it would put x first, and make one product of the parts.
    """
    *lead, rows, width = x.shape
    out = matrix.shape[-2]
    tuned = tuning()
    parts = math.gcd(out, tuned.parts) if rows == 1 and matrix.size >= tuned.large else 1
    if parts > 1:
        x = jnp.broadcast_to(x[..., None, :, :], (*lead, parts, rows, width))
        matrix = matrix.reshape(*lead, parts, out // parts, width)
        y = jnp.matmul(jax.lax.optimization_barrier(x), jnp.swapaxes(matrix, -1, -2))
        return jnp.moveaxis(y, -3, -2).reshape(*lead, rows, out)
    if rows <= tuned.few_rows:
        y = jnp.matmul(matrix, jnp.swapaxes(x, -1, -2))
        return jnp.swapaxes(jax.lax.optimization_barrier(y), -1, -2)
    return jnp.matmul(x, jnp.swapaxes(matrix, -1, -2))


def matmul_loop(x: jax.Array, matrix: jax.Array) -> jax.Array:
    """x `[..., rows, in]` times a matrix `[..., in, out]`, as it is or narrow: `[..., rows, out]`.

    A sum of some rows of the matrix, each times a number, is one loop that reads them in order and
    that threads share evenly; a product with ones adds up the sums.
    """
    *lead, rows, width = x.shape
    count, out = math.gcd(width, tuning().loop_sum), matrix.shape[-1]
    dtype = wide_dtype(x.dtype)
    given = computed_once(x.astype(dtype)).reshape(*lead, rows, count, -1, 1)
    parts = matrix.reshape(*lead, count, -1, out)
    terms = (  # [..., rows, in / count, out]
        given[..., i, :, :] * widened(parts[..., None, i, :, :]).astype(dtype) for i in range(count)
    )
    ones = jnp.ones((*lead, rows, 1, width // count), dtype)
    sums = functools.reduce(jnp.add, terms)
    return (ones @ computed_once(sums))[..., 0, :].astype(x.dtype)


def matmul_narrow(x: jax.Array, matrix: Narrow) -> jax.Array:
    """x `[rows, in]` times a narrow matrix `[in, out]`: `[rows, out]`, added up in float32 or more.

    XLA's CPU backend has no product of int8 or bfloat16 and float32: it writes the matrix in
    float32 first, and reads that. But a loop (`matmul_loop`) reads it as it is. The barrier says
    that the matrix belongs to this step: in a loop of steps XLA would turn all of it to float32
    before the loop.
    """
    dtype, tuned = wide_dtype(x.dtype), tuning()
    numbers, given = jax.lax.optimization_barrier((matrix.numbers, x.astype(dtype)))
    if len(x) > tuned.narrow_rows or tuned.loop_sum == 1:
        y = given @ widened(numbers).astype(dtype)
    else:
        y = matmul_loop(given, numbers)
    if matrix.scale is not None:
        y = y * matrix.scale.astype(dtype)
    return y.astype(x.dtype)


def widened(numbers: jax.Array) -> jax.Array:
    """The numbers of a matrix, in float32 if it is narrow. By bits, not by XLA's conversion from
    bfloat16, which would not become a part of the loop that uses it."""
    if numbers.dtype != jnp.uint16:
        return numbers
    bits = numbers.astype(jnp.uint32) << jnp.uint32(16)  # bfloat16 is the first half of float32
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def matmul_table(weights: jax.Array, table: jax.Array) -> jax.Array:
    """Weights `[B, G, R, J]` times a table of values for each `[B, G, J, V]`: `[B, G, R, V]`.

    For few rows it is a loop on a CPU, where its sums fit the caches. Where they do not, that of
    one row is made in parts along J. Of more rows it is whole, between barriers, which keep XLA
    from making one slow operation of it and those around it.
    """
    tuned = tuning()
    *lead, rows, length = weights.shape
    if not tuned.loop_rows:
        return jnp.matmul(weights, table)
    if rows <= tuned.loop_rows and weights.size * table.shape[-1] <= tuned.loop_size:
        return matmul_loop(weights, table)
    if rows == 1:
        parts = math.gcd(length, tuned.parts)
        weights = weights.reshape(*lead, rows, parts, -1)
        table = table.reshape(*lead, parts, -1, table.shape[-1])
        return jnp.einsum("bgrpj,bgpjv->bgprv", weights, table).sum(2)
    return computed_once(jnp.matmul(computed_once(weights), table))


# Products that round what they multiply: training and prompts.


@jax.custom_jvp
def matmul_rounded(x: jax.Array, y: jax.Array) -> jax.Array:
    """x `[..., r, k]` times y `[..., k, c]` of equal leading axes, both rounded to bfloat16, the
    sums in float32; and so are the products of its gradient.

    Some processors make these several times as fast as products of float32. JAX's transpose of
    such a product multiplies float32 by bfloat16, for which XLA's CPU backend turns both to
    float32, so it is given here.
    """
    return _rounded(x, y, (1, 0))


@functools.partial(matmul_rounded.defjvp, symbolic_zeros=True)
def _matmul_rounded_jvp(primals, tangents):
    (x, y), (d_x, d_y) = primals, tangents
    out = matmul_rounded(x, y)
    parts = []
    if not isinstance(d_x, SymbolicZero):
        moved = linear_call(
            lambda y, d_x: _rounded(d_x, y, (1, 0)), lambda y, g: _rounded(g, y, (1, 1)), y, d_x
        )
        parts.append(moved)
    if not isinstance(d_y, SymbolicZero):
        moved = linear_call(
            lambda x, d_y: _rounded(x, d_y, (1, 0)), lambda x, g: _rounded(x, g, (0, 0)), x, d_y
        )
        parts.append(moved)
    return out, functools.reduce(jnp.add, parts) if parts else jnp.zeros_like(out)


def product(x: jax.Array, y: jax.Array, *, rounded: bool) -> jax.Array:
    """x `[..., r, k]` times y `[..., k, c]`, rounded or not. The last of the leading axes of y may
    be 1 where that of x is not."""
    if not rounded:
        return jnp.matmul(x, y)
    if x.shape[-3] == y.shape[-3]:
        return matmul_rounded(x, y)
    *lead, some, rows, width = x.shape
    out = matmul_rounded(x.reshape(*lead, some * rows, width), y[..., 0, :, :])
    return out.reshape(*lead, some, rows, -1)


def _rounded(x: jax.Array, y: jax.Array, summed: tuple[int, int]) -> jax.Array:
    """The product over the `summed` ones of the last two axes of x and of y."""
    lead = tuple(range(x.ndim - 2))
    over = (len(lead) + summed[0],), (len(lead) + summed[1],)
    x, y = x.astype(jnp.bfloat16), y.astype(jnp.bfloat16)
    return jax.lax.dot_general(
        x, y, (over, (lead, lead)), preferred_element_type=jnp.dtype(jnp.float32)
    )


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


def scaled(x: jax.Array, factors: jax.Array) -> jax.Array:
    """x `[..., j, V]` with each row times its factor, `[..., j, 1]`.

    The factors are spread by a product, as in `spread`: theirs is the gradient that would be a sum.
    """
    return x * matmul_exact(factors, jnp.ones((1, x.shape[-1]), factors.dtype))


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
