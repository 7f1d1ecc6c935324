"""Checkpoints out: `export` writes GGUF, by the types of `recipes`, and `folder` quantised folders; `written` replaces
nothing but what these have written."""
