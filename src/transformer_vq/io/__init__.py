"""Models and training state on disk: checkpoints, export, weights of other implementations."""
