"""Workers on many machines, by Ray: `--ray` of wan.serve and wan.batch.

cluster (joins one, finds room in it) -> group (a worker elsewhere, as its user sees it) -> seat (what stands for it
there, an actor) -> the processes of `wan.serve.group`; luggage (the files that travel with a job). Machines share no
files: what is loaded lies at the same path on each, what a video is made from and what comes out travels.
"""
