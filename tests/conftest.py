"""On a machine with a GPU only the kernels' tests use it: the others describe ranks on CPU."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

# Triton reads this when it is imported and when a kernel is decorated. With a GPU the kernels run on it; without one
# they run in Triton's interpreter, on CPU tensors.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
# Nothing depends on the network: a name that is no folder is looked for at no Hub, and not for a minute where none is.
os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="module", autouse=True)
def _on_cpu(request):
    with pytest.MonkeyPatch.context() as patch:
        if "kernels" not in request.path.parts:
            patch.setattr(torch.cuda, "is_available", lambda: False)
        yield


@pytest.fixture(scope="session")
def quickstart_run(tmp_path_factory) -> tuple[Path, str]:
    """Folder and output of the whole quickstart, for slow tests: `.quickstart/` then holds its model and its text.

    QUICKSTART_RUN names a run to use instead, with its output beside it in <folder>.log: for work on these tests.
    """
    from tests.launch import quickstart  # not before the environment is set above

    if "QUICKSTART_RUN" in os.environ:
        out = Path(os.environ["QUICKSTART_RUN"])
        return out, out.with_suffix(".log").read_text()
    out = tmp_path_factory.mktemp("quickstart") / "run"
    return out, quickstart(out)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The first test to ask for the quickstart waits for its installs and its training as well."""
    for item in items:
        if "quickstart_run" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.timeout(1800), append=False)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With `--dist loadgroup` a file's tests run in one process, those of all files that use the quickstart in another.

    xdist's own marks would say it better, but xdist 3.8 does not see them under pytest 9.2.
    """
    if config.getvalue("dist") != "loadgroup":
        return None
    from xdist.scheduler import LoadScopeScheduling  # there where tests are dealt out, and nowhere else

    class Grouped(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return "quickstart" if "quickstart_run" in (config.rootpath / file).read_text() else file

    return Grouped(config, log)
