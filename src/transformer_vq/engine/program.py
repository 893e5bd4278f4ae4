"""Programs that are compiled before they are called."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache


class Program:
    """A function of trees, for arguments like these. `compile` it before calling it.

    It is compiled as a function of lists of leaves: the types in `nn` are of arrays, and JAX would
    make some of what merely describes its arguments.

    `model_first`: the first argument is a model, most often this one, so its leaves are kept: to
    find them takes as long as all else that a call does in Python.
    """

    def __init__(
        self,
        fn: Callable[..., Any],
        args: Sequence[Any],
        donate: tuple[int, ...] = (),
        *,
        model_first: bool = False,
    ):
        trees = [jax.tree.structure(arg) for arg in args]
        out = None

        def flat(*leaves: list[Any]) -> list[Any]:
            nonlocal out
            given = (tree.unflatten(x) for tree, x in zip(trees, leaves, strict=True))
            leaves_out, out = jax.tree.flatten(fn(*given))
            return leaves_out

        lowered = jax.jit(flat, donate_argnums=donate).lower(*map(jax.tree.leaves, args))
        assert out is not None  # it was traced
        self._lowered, self._out = lowered, out
        first = args[0] if model_first else None
        self._model, self._model_leaves = first, jax.tree.leaves(first)

    def compile(self) -> None:
        self._call = self._lowered.compile()
        del self._lowered

    def text(self) -> str:
        """What was compiled, as XLA writes it."""
        return self._call.as_text() or ""

    def __call__(self, *args: Any) -> Any:
        if self._model is not None and args[0] is self._model:
            leaves = [self._model_leaves, *map(jax.tree.leaves, args[1:])]
        else:
            leaves = map(jax.tree.leaves, args)
        return self._out.unflatten(self._call(*leaves))


@contextlib.contextmanager
def compiled_now() -> Iterator[None]:
    """What is compiled here comes from no cache."""
    before = jax.config.jax_enable_compilation_cache  # pyright: ignore
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
        compilation_cache.reset_cache()


def compile_all(programs: Iterable[Program]) -> None:
    """Compile programs in some threads at once."""
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(Program.compile, programs))
