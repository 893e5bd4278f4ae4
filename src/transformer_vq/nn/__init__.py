"""The mathematics: pure functions of arrays; no files."""
