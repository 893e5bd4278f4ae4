"""Requests on the host: token ids in, token ids out."""
