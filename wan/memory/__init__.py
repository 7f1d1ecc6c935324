"""Where the weights of a run are while it goes on: `experts` come and go whole, `offload` streams blocks.

What lies where is decided before anything is loaded, by `wan.plan`.
"""
