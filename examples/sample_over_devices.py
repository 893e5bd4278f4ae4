"""One call of `generate` over all devices, with the tokens of one device.

Requests never exchange anything, so each device decodes its own rows. Where there is one device,
this example asks JAX for four virtual ones: they share its cores and show the result, not a speed.

    python examples/sample_over_devices.py --requests 6
"""

import argparse
import os

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=4")  # before JAX

import jax

from transformer_vq import ModelConfig, SamplingParams, generate, init_model
from transformer_vq.sharding import data_mesh


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Sample over all devices.")
    parser.add_argument("--requests", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=16, help="of each request")
    options = parser.parse_args(argv)

    model = init_model(ModelConfig.preset("tiny"), 0)  # untrained: its tokens mean nothing
    prompts = [[i] for i in range(options.requests)]
    params = [SamplingParams(max_tokens=options.tokens, seed=i) for i in range(options.requests)]

    together = generate(model, prompts, params, mesh=data_mesh())
    alone = generate(model, prompts, params)
    print(f"{options.requests} requests on {jax.device_count()} devices")
    for i, (tokens, same) in enumerate(zip(together, alone, strict=True)):
        print(f"request {i}: {'equal' if tokens == same else 'DIFFERENT'}: {tokens[:8]} ...")


if __name__ == "__main__":
    main()
