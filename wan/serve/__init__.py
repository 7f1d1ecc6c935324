"""python -m wan.serve: videos by HTTP, as OpenAI's Videos API has them. HTTP is one process, engines are others.

app (routes) -> inputs, fields (a request -> options) -> workers (check requests, give out jobs) -> store (rows and
files). Only `worker` and `checker`, which are the other processes, import torch. With --ray workers are on many
machines: see `wan.remote`.
"""
