"""Programs over the mathematics: training, evaluation, sampling. Here things are compiled."""

from transformer_vq.ops.trim import trim_after_compiling

trim_after_compiling()
