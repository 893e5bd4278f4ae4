"""One model of `peers.py`, in a process of its own: `python benchmarks/peer.py llama [--smoke]`.

Reads questions from standard input, a JSON object a line, and answers each with one: {"what":
"decode", "length": 512, "tokens": 64} with {"seconds": ...}. What a question needs is made at its
first time, which its answer counts too, and kept until another question comes.
"""

import gc
import json
import os
import sys
import time
from collections.abc import Callable
from itertools import islice
from typing import Any

VOCAB = 256
SIZES = {  # of bench-small, and of a trial
    False: dict(d_model=256, d_k=64, num_layers=4, codebook_size=256, block=256),
    True: dict(d_model=32, d_k=8, num_layers=1, codebook_size=16, block=16),
}
Call = Callable[[], Any]


def our_config(sizes: dict[str, int]) -> Any:
    """The preset `small`, in these sizes."""
    from transformer_vq import ModelConfig

    block = sizes["block"]
    fields = {name: size for name, size in sizes.items() if name != "block"}
    return ModelConfig.preset("small", **fields, window_len=block, block_len=block)


def our_parameters(sizes: dict[str, int]) -> int:
    """How many numbers of it are trained."""
    from transformer_vq import costs

    return costs.parameter_count(our_config(sizes))


class Ours:
    """This project: bench-small with its memory, as `tvq` makes it."""

    def __init__(self, sizes: dict[str, int]):
        from transformer_vq import init_model
        from transformer_vq.measure.memory import trim_after_compiling

        trim_after_compiling()
        self.config, self.parameters = our_config(sizes), our_parameters(sizes)
        self.model = init_model(self.config, 0)

    def decode(self, length: int, tokens: int) -> tuple[Call, int]:
        """A call that writes the next tokens, greedily; and the bytes of the state."""
        from transformer_vq import SamplingParams, costs, stream
        from transformer_vq.engine.prefill import read

        state = read(self.model, None, random_tokens(1, length))
        params = SamplingParams(max_tokens=10**6, temperature=0.0)
        written = stream(self.model, [[0]], params, state)
        return lambda: list(islice(written, tokens)), costs.state_bytes(self.config)

    def prompt(self, length: int) -> Call:
        """A call that reads a prompt into a state."""
        from transformer_vq.engine.prefill import read

        prompt = random_tokens(1, length)
        return lambda: read(self.model, None, prompt).logits.block_until_ready()

    def score(self, length: int) -> Call:
        """A call that gives the loss of a text, as `tvq eval` scores a long one."""
        from transformer_vq.ops.evaluate import LONG_CHUNK, evaluate

        tokens = random_tokens(1, length + 1)[0]
        return lambda: evaluate(self.model, tokens, chunk_len=LONG_CHUNK)

    def train(self, rows: int, length: int) -> Call:
        """A call of one update."""
        import jax
        import numpy as np

        from transformer_vq import TrainConfig
        from transformer_vq.data import Batch
        from transformer_vq.ops.train import init_train_state, make_train_step
        from transformer_vq.sharding import data_mesh, shard_rows

        train, mesh = TrainConfig(batch_size=rows, sequence_len=length), data_mesh()
        tokens = random_tokens(rows, length + 1)
        mask, documents = np.ones((rows, length), bool), np.zeros((rows, length), np.int32)
        batch = shard_rows(mesh, Batch(tokens[:, :-1], tokens[:, 1:], mask, documents))
        kept = [init_train_state(self.config, train)]
        step = make_train_step(self.config, train, mesh).lower(kept[0], batch).compile()

        def update() -> None:
            kept[0], _ = step(kept[0], batch)
            jax.block_until_ready(kept[0])

        return update


class HuggingFace:
    """A model of Hugging Face transformers, as it is: PyTorch without compilation."""

    def __init__(self, sizes: dict[str, int]):
        import torch
        from transformers.utils import logging

        logging.set_verbosity_error()
        torch.manual_seed(0)
        torch.set_num_threads(len(os.sched_getaffinity(0)))
        self.torch, self.sizes = torch, sizes
        self.target = our_parameters(sizes)
        self.model = self.make()

    def make(self) -> Any:
        """The model, of as many parameters as ours as nearly as its sizes allow."""
        raise NotImplementedError

    @property
    def parameters(self) -> int:
        return sum(array.numel() for array in self.model.parameters())

    def greedily(self, tokens: int, **cache: Any) -> None:
        """Write so many tokens, the likeliest ones, after what a cache holds."""
        torch, model = self.torch, self.model.eval()
        token = torch.zeros((1, 1), dtype=torch.long)
        with torch.inference_mode():
            for _ in range(tokens):
                out = model(input_ids=token, use_cache=True, **cache)
                token = out.logits[:, -1:].argmax(-1)

    def prompt(self, length: int) -> Call:
        """A call that reads a prompt into a cache."""
        torch = self.torch
        prompt = torch.as_tensor(random_tokens(1, length)).long()

        def read() -> None:
            with torch.inference_mode():
                self.model.eval()(input_ids=prompt, use_cache=True, logits_to_keep=1)

        return read

    def score(self, length: int) -> Call:
        """A call that gives the loss of a text, as `tvq eval` does."""
        torch = self.torch
        tokens = torch.as_tensor(random_tokens(1, length + 1)).long()

        def loss() -> float:
            with torch.inference_mode():
                logits = self.model.eval()(input_ids=tokens[:, :-1], use_cache=False).logits
                return torch.nn.functional.cross_entropy(logits[0], tokens[0, 1:]).item()

        return loss

    def train(self, rows: int, length: int) -> Call:
        """A call of one update, its units computed again in the backward pass, as ours does."""
        torch = self.torch
        self.model = self.make().train()
        self.model.gradient_checkpointing_enable({"use_reentrant": False})
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3, weight_decay=2e-4)
        tokens = torch.as_tensor(random_tokens(rows, length + 1)).long()

        def update() -> None:
            logits = self.model(input_ids=tokens[:, :-1], use_cache=False).logits
            targets = tokens[:, 1:].flatten()
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

        return update


class Llama(HuggingFace):
    """Llama: full attention by PyTorch's fused kernel, a cache of all keys and values."""

    def make(self) -> Any:
        from transformers import LlamaConfig, LlamaForCausalLM

        width, layers = self.sizes["d_model"], self.sizes["num_layers"]
        besides = 2 * VOCAB * width + layers * 4 * width**2  # embeddings, attention
        inner = round((self.target - besides) / (layers * 3 * width))
        config = LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=width,
            intermediate_size=max(8, inner // 8 * 8),
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=2**20,
            attn_implementation="sdpa",
        )
        return LlamaForCausalLM(config)

    def decode(self, length: int, tokens: int) -> tuple[Call, int]:
        """A call that writes the next tokens, greedily; and the bytes of the cache, which is filled
        with random numbers, not by reading. It has its size from the start and is written in place:
        a growing one would be copied at every step."""
        from transformers import StaticCache

        heads, width = 4, self.sizes["d_model"] // 4
        cache = StaticCache(config=self.model.config, max_cache_len=length + tokens)
        for layer in range(self.sizes["num_layers"]):
            keys, values = (self.torch.randn(1, heads, length, width) for _ in range(2))
            cache.update(keys, values, layer)

        def write() -> None:
            self.greedily(tokens, past_key_values=cache)
            cache.crop(-tokens)

        return write, 4 * 2 * self.sizes["num_layers"] * length * heads * width


class Mamba(HuggingFace):
    """Mamba: a recurrent state. Training scans in parallel where mambapy is installed."""

    def make(self) -> Any:
        from transformers import MambaConfig, MambaForCausalLM

        def of(layers: int) -> Any:
            config = MambaConfig(
                vocab_size=VOCAB,
                hidden_size=self.sizes["d_model"],
                num_hidden_layers=layers,
                use_mambapy=True,
                tie_word_embeddings=False,
            )
            return MambaForCausalLM(config)

        one, two = (sum(x.numel() for x in of(n).parameters()) for n in (1, 2))
        return of(max(1, round((self.target - one) / (two - one)) + 1))

    def decode(self, length: int, tokens: int) -> tuple[Call, int]:
        """A call that writes the next tokens, greedily; and the bytes of the state, which is that
        after 16 tokens: after more of them it costs the same."""
        torch, model = self.torch, self.model.eval()
        with torch.inference_mode():
            prompt = torch.as_tensor(random_tokens(1, 16)).long()
            cache = model(input_ids=prompt, use_cache=True).cache_params
        config = model.config
        a_unit = config.intermediate_size * (config.state_size + config.conv_kernel)
        size = 4 * config.num_hidden_layers * a_unit
        return lambda: self.greedily(tokens, cache_params=cache), size


KINDS = {"transformer-vq": Ours, "llama": Llama, "mamba": Mamba}


def kind(name: str) -> Any:
    """The class of a model; that of the reference needs what others do not."""
    if name != "reference":
        return KINDS[name]
    from peer_reference import Reference

    return Reference


def random_tokens(rows: int, length: int) -> Any:
    """Whole numbers below the size of the vocabulary, int32 `[rows, length]`."""
    import numpy as np

    return np.random.default_rng(0).integers(0, VOCAB, (rows, length), np.int32)


def prepared(model: Any, question: dict[str, Any]) -> tuple[Call, dict[str, Any]]:
    """The call that a question times, and what else its answer tells."""
    what, length = question["what"], question["length"]
    if what == "decode":
        call, size = model.decode(length, question["tokens"])
        return call, {"state_bytes": size}
    if what == "train":
        return model.train(question["rows"], length), {}
    return (model.prompt(length) if what == "prompt" else model.score(length)), {}


def main() -> None:
    """Answer until the questions end."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no answer
    model, asked, call, more = None, None, None, {}
    for line in sys.stdin:
        question = json.loads(line)
        try:
            began = time.perf_counter()
            if model is None:
                model = kind(sys.argv[1])(SIZES["--smoke" in sys.argv])
            if question["what"] == "parameters":
                answer = {"parameters": model.parameters}
            else:
                if question != asked:
                    call = None
                    gc.collect()
                    call, more = prepared(model, question)
                    asked, began = question, time.perf_counter()
                assert call is not None
                call()
                answer = {"seconds": time.perf_counter() - began, **more}
        except Exception as error:  # whatever a peer raises: the others go on
            answer = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}
        print(json.dumps(answer), file=out, flush=True)


if __name__ == "__main__":
    main()
