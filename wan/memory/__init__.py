"""Where the weights of a run are while it goes on: `residency` has the models of a task, `experts` come and go whole,
`offload` streams blocks.

What lies where is decided before anything is loaded, by `wan.plan`.
"""
