"""One side of `benchmarks.peers gguf`, in a process of its own that imports only what this side needs.

    python -m benchmarks.gguf_server ours|diffusers|ours_bf16 FILE FOLDER THREADS

Loads the transformer in FILE, writes the line `ready`, then one line of JSON for each line of JSON it reads. FOLDER has
the shapes of the model: `ours.json` and diffusers' `config.json`.
"""

from __future__ import annotations

import contextlib
import json
import resource
import sys
import time
from pathlib import Path


def load(side: str, file: str, folder: str):
    """A forward pass as a function of (latent, timestep, text)."""
    import torch

    dtype = torch.bfloat16
    if side == "diffusers":
        from diffusers import GGUFQuantizationConfig, WanTransformer3DModel

        config = GGUFQuantizationConfig(compute_dtype=dtype)
        theirs = WanTransformer3DModel.from_single_file(
            file, config=folder, quantization_config=config, torch_dtype=dtype
        ).eval()
        return lambda x, t, text: theirs(x.to(dtype), t, text.to(dtype), return_dict=False)[0]

    from wan.models.dit import WanModel
    from wan.weights.assign import load_weights
    from wan.weights.source import open_source

    with torch.device("meta"):
        ours = WanModel(**json.loads(Path(folder, "ours.json").read_text())).eval()
    return load_weights(ours, open_source(file), "dit", dtype=dtype, stream=side == "ours")


def memory_as_run(side: str) -> contextlib.AbstractContextManager:
    """How our pipeline has memory handled while it denoises."""
    if side == "diffusers":
        return contextlib.nullcontext()
    from wan.quant.scratch import freed_memory_kept

    return freed_memory_kept()


def major_faults() -> int:
    """How often this process had to wait for a page to be read from a file."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_majflt


def memory() -> dict[str, int]:
    """peak_bytes: the most that was resident; anonymous_bytes: what is resident now and backed by no file."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    fields = {"peak_bytes": "VmHWM", "anonymous_bytes": "RssAnon"}  # ru_maxrss would begin at that of the parent
    return {name: int(lines[field].split()[0]) * 1024 for name, field in fields.items()}


def main(side: str, file: str, folder: str, threads: str) -> None:
    """Answers {"inputs": FILE, "output": FILE or null} by the time of a forward and the memory, {} by the latter."""
    import torch

    answers, sys.stdout = sys.stdout, sys.stderr  # what libraries print must not be taken for an answer
    torch.set_num_threads(int(threads))
    call = load(side, file, folder)
    print("ready", file=answers, flush=True)
    with memory_as_run(side):
        for line in sys.stdin:
            question, answer = json.loads(line), {}
            if question:
                args = torch.load(question["inputs"])
                with torch.inference_mode():
                    faults, started = major_faults(), time.perf_counter()
                    result = call(*args)
                    answer = {"seconds": time.perf_counter() - started, "major_faults": major_faults() - faults}
                if question["output"]:
                    torch.save(result.float(), question["output"])
            print(json.dumps(answer | memory()), file=answers, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
