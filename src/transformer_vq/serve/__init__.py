"""Between text and tokens, for whoever asks: stop texts now, a server later. Never JAX."""
