"""Programs over the mathematics, compiled: training, evaluation, sampling."""
