"""A run's life: its folder, its loop, what it logs, how it stops and goes on."""
