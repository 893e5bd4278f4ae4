"""Programs over the mathematics: training, evaluation, sampling. Here things are compiled."""
