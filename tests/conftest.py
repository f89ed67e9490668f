"""On a machine with a GPU only the kernels' tests use it: the others describe ranks on CPU."""

from __future__ import annotations

import os

import pytest
import torch

# Triton reads this when it is imported and when a kernel is decorated. With a GPU the kernels run on it; without one
# they run in Triton's interpreter, on CPU tensors.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(scope="module", autouse=True)
def _on_cpu(request):
    with pytest.MonkeyPatch.context() as patch:
        if "kernels" not in request.path.parts:
            patch.setattr(torch.cuda, "is_available", lambda: False)
        yield
