"""Checkpoints in, tensors out: find the files, read them lazily, translate their names, fill a model.

locate (folder or hub id -> files), source (files -> tensors, through `containers`), names (their names -> ours), infer
(what a file holds), assign (tensors -> model), lora; `write` writes files. `locate` imports no torch.
"""
