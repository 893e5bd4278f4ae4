"""Kept path: `train` lives in `transformer_vq.run.loop`."""

from transformer_vq.run.loop import train as train
