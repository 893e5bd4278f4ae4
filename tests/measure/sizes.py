"""The model of tests of what is measured, as options."""

TINY = ["--config.d-model", "16", "--config.d-k", "8", "--config.num-layers", "1"]
TINY += ["--config.codebook-size", "8", "--config.window-len", "8", "--config.block-len", "8"]
