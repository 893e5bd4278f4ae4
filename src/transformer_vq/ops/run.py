"""Kept path: `load_run` lives in `transformer_vq.run.folder`."""

from transformer_vq.run.folder import load_run as load_run
