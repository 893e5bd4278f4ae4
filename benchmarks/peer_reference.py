"""The paper's own implementation as a model of `peer.py`: its branch `main`, unchanged.

It runs on a JAX of its time (0.4.13, with flax 0.6.11 and optax 0.1.5), so what is here uses
nothing that is newer; and on today's, which has another name for an argument of `jnp.clip`.
"""

from collections.abc import Callable
from typing import Any

from peer import VOCAB, Call, random_tokens


class Reference:
    """The paper's implementation (its branch `main`), with the sizes of ours and its own programs:
    `sample_op` with nucleus 0.9, `eval_op`, `train_op`. Its time does not depend on the context."""

    def __init__(self, sizes: dict[str, int]):
        import jax

        jax.numpy.clip = with_old_names(jax.numpy.clip)
        self.jax, self.sizes = jax, sizes
        self.params = self.init()

    def config(self, **fields: Any) -> Any:
        """Its configuration."""
        from transformer_vq.nn.types import TransformerConfig

        block, width = self.sizes["block"], self.sizes["d_model"]
        mine = dict(
            param_dtype="float32", dtype="float32", global_batch_size=1, sequence_len=block,
            update_len=block, block_len=block, mem_len=block, grad_thru_cache=True, agg_cache=True,
            d_model=width, d_k=self.sizes["d_k"], d_v=2 * width, d_ff=0, n_head=1,
            n_code=self.sizes["codebook_size"], n_layer=self.sizes["num_layers"], n_vocab=VOCAB,
            pe_abs=False, pe_lam=100_000, p_dropemb=0.0, p_dropsin=0.0, p_dropres=0.0,
            p_droplyr=0.0, p_nucleus=0.9, c_beta=1e-4, c_gamma=0.99, e_tie=False, e_preln=True,
            e_scale=1.0, is_train=False,
        )  # fmt: skip
        return TransformerConfig.create(**{**mine, **fields})

    def init(self) -> Any:
        """Random parameters."""
        from flax.core import unfreeze

        from transformer_vq.nn.model import Transformer
        from transformer_vq.nn.vq import VQSpec

        jax, config = self.jax, self.config(is_train=True)
        jnp, length = jax.numpy, config.block_len
        ones = jnp.ones([1], jnp.int32)
        keys = jax.random.split(jax.random.PRNGKey(0), 3)
        variables = Transformer(config).init(
            dict(zip(("params", "ephemeral", "timeless"), keys, strict=True)),
            inputs=jnp.zeros([1, length], jnp.int32),
            doc_ids=jnp.zeros([1, length], jnp.int32),
            state=Transformer.initial_state(config, 1),
            vq_spec=VQSpec.create(
                n_device=ones, n_block_per_update=ones, loss_mask=jnp.ones([1, length], jnp.int32)
            ),
        )
        return unfreeze(variables["params"])

    @property
    def parameters(self) -> int:
        from flax.traverse_util import flatten_dict

        flat = flatten_dict(self.params).items()
        return sum(x.size for path, x in flat if not path[-1].startswith("c_"))

    def _spread(self, tree: Any) -> Any:
        """For one device, as `pmap` wants it."""
        return self.jax.tree_util.tree_map(lambda x: x[None], tree)

    def _batch(self, rows: int, length: int) -> Any:
        tokens, jnp = random_tokens(rows, length + 1), self.jax.numpy
        batch = dict(
            inputs=tokens[:, :-1],
            targets=tokens[:, 1:],
            doc_ids=jnp.zeros((rows, length), jnp.int32),
            loss_mask=jnp.ones((rows, length), jnp.int32),
        )
        return self._spread(self.jax.tree_util.tree_map(jnp.asarray, batch))

    def decode(self, length: int, tokens: int) -> tuple[Call, int]:
        """A call that writes tokens, from an empty state."""
        from transformer_vq.nn.model import Transformer
        from transformer_vq.ops.sample import sample_op

        config = self.config(sequence_len=tokens, block_len=1)
        params, key = self._spread(self.params), self.jax.random.PRNGKey(0)[None]
        state = self.jax.eval_shape(lambda: Transformer.initial_state(config, 1))
        size = sum(x.size * x.dtype.itemsize for x in self.jax.tree_util.tree_leaves(state))
        return lambda: sample_op(config, 0, params, key).block_until_ready(), size

    def prompt(self, length: int) -> Call:
        """A call that scores a text: it has no other way to read one."""
        return self.score(length)

    def score(self, length: int) -> Call:
        """A call that gives the loss of a text."""
        from transformer_vq.ops.evaluate import eval_op

        config, params = self.config(sequence_len=length), self._spread(self.params)
        batch = self._batch(1, length)
        return lambda: self.jax.block_until_ready(eval_op(config, params, batch))

    def train(self, rows: int, length: int) -> Call:
        """A call of one update."""
        import optax
        from flax.training.train_state import TrainState
        from flax.traverse_util import flatten_dict, unflatten_dict

        from transformer_vq.ops.train import train_op

        config = self.config(
            global_batch_size=rows, sequence_len=length, update_len=length, is_train=True
        )
        labels = unflatten_dict(
            {
                path: "codebook" if path[-1].startswith("c_") else "main"
                for path in flatten_dict(self.params)
            }
        )
        adam = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3, b2=0.98))
        tx = optax.multi_transform({"main": adam, "codebook": optax.sgd(1.0)}, labels)
        state = TrainState.create(apply_fn=None, params=self.params, tx=tx)
        kept = [self._spread(self.jax.tree_util.tree_map(self.jax.numpy.asarray, state))]
        batch, key = self._batch(rows, length), self.jax.random.PRNGKey(0)[None]

        def update() -> None:
            kept[0], _ = train_op(config, kept[0], batch, key)
            self.jax.block_until_ready(kept[0])

        update()  # what it returns lies elsewhere than what it was given, so the next one compiles
        return update


def with_old_names(clip: Callable) -> Callable:
    """`jnp.clip` that takes the names which its arguments had."""

    def named(x: Any, a_min: Any = None, a_max: Any = None) -> Any:
        return clip(x, a_min, a_max)

    return named
