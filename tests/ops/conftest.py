"""Kernels run on a GPU where there is one, else on a CPU, by Triton's interpreter, which tests/conftest.py asks for."""

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="needs Triton (pip install -r requirements-dev.txt)")

from triton.runtime import interpreter


def _converted(numbers, source, target, rounding):
    """To the nearest number, as GPUs do; Triton's own cuts bits off, or carries none over."""
    given = torch.from_numpy(np.ascontiguousarray(numbers).view(f"int{source.primitive_bitwidth}"))
    made = given.view(_TYPES[source.name]).to(_TYPES[target.name]).contiguous()
    signed = made.view(getattr(torch, f"int{target.primitive_bitwidth}"))
    return signed.numpy().view(f"uint{target.primitive_bitwidth}").reshape(numbers.shape)


_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_TYPES |= {"fp8e4nv": torch.float8_e4m3fn, "fp8e5": torch.float8_e5m2}


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    monkeypatch.setattr(interpreter, "_convert_float", _converted)
    with torch.no_grad():
        yield


@pytest.fixture(scope="session")
def device():
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
