"""Prompts and token ids: what a model reads of a query and its documents."""
