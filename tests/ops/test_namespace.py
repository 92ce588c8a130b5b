"""`torch.ops.gradprobe` after `import gradprobe`: the first access defines the operators and loads the C++ kernels."""

import json
import subprocess
import sys

import pytest

from gradprobe.ops import libraries

IMPORTS = {
    "torch-first": "import torch, gradprobe",
    "gradprobe-first": """
import gradprobe
assert "torch" not in sys.modules
assert any(type(finder).__module__ == "gradprobe.ops.namespace" for finder in sys.meta_path)
importlib.reload(gradprobe)
import torch
""",
    "both-in-threads": """
together = threading.Barrier(4)

def load(name):
    together.wait()
    importlib.import_module(name)

threads = [threading.Thread(target=load, args=(name,)) for name in ("torch", "gradprobe", "torch", "gradprobe")]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
import torch, gradprobe
""",
}
FIRST_ACCESS = """
assert not any(type(finder).__module__ == "gradprobe.ops.namespace" for finder in sys.meta_path)
assert "gradprobe.ops.schemas" not in sys.modules

def rows_of(x):
    out = torch.empty(1, 6, dtype=torch.float64)
    torch.ops.gradprobe.grad_stats_into([x], out)
    return out

if sys.argv[1] == "compiled":
    rows_of = torch.compile(rows_of, backend="aot_eager", fullgraph=True)
rows = rows_of(torch.tensor([3.0, -4.0])).tolist()
namespace = torch.ops.gradprobe
importlib.reload(gradprobe)
assert torch.ops.gradprobe is namespace
assert torch.ops.gradprobe.grad_stats_into is namespace.grad_stats_into
assert namespace.grad_stats_into.__module__ == torch.ops.aten.add.__module__.replace("aten", "gradprobe")
assert not hasattr(namespace, "no_such_operator")
print(json.dumps([rows, torch._C._dispatch_has_kernel_for_dispatch_key("gradprobe::grad_stats_into", "CPU")]))
"""


@pytest.mark.parametrize(
    ("order", "how"), [("torch-first", "compiled"), ("gradprobe-first", "eager"), ("both-in-threads", "eager")]
)
def test_the_first_access_defines_the_operators(order: str, how: str) -> None:
    script = "import importlib, json, sys, threading\n" + IMPORTS[order] + FIRST_ACCESS
    done = subprocess.run([sys.executable, "-c", script, how], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows, has_cpu_kernel = json.loads(done.stdout)
    assert rows == [[-1.0, 7.0, 25.0, 4.0, 0.0, 0.0]]
    assert has_cpu_kernel == (libraries.parts()["cpu"] == "ready")
