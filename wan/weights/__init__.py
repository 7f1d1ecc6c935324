"""Checkpoints in, tensors out: find the files, read them lazily, translate their names, fill a model.

locate (folder or hub id -> files), source (files -> tensors), names (their names -> ours), infer (what a file
holds), assign (tensors -> model). `locate` imports no torch.
"""
