"""The mathematics: pure functions of arrays; no jit, no input or output."""
