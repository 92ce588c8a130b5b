"""Whether the CUDA kernels can run on a device: nvcc's objects, linked with a CUDA runtime whose answers are set here.

The compiled library links the CUDA runtime statically, so that nothing can take its place there.
"""

import ctypes
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from emulation.building import CSRC, session_folder

from gradprobe.ops import libraries

HERE = Path(__file__).resolve().parent
DRIVER = 99000  # newer than any toolkit
NO_IMAGE = 209  # cudaErrorNoKernelImageForDevice
INVALID_DEVICE = 101
OUT_OF_MEMORY = 2

pytestmark = [
    pytest.mark.soak,  # nvcc compiles every kernel
    pytest.mark.skipif(shutil.which("nvcc") is None or shutil.which("g++") is None, reason="needs nvcc and g++"),
]


@pytest.fixture(scope="module")
def library() -> Path:
    """The kernels of csrc/cuda, for one architecture, and the fake runtime."""
    folder = session_folder()
    library = folder / "libreadiness.so"
    dry_run = subprocess.run(
        ["nvcc", "--dryrun", "-E", "-x", "cu", "/dev/null"], capture_output=True, text=True, check=True
    )
    (top,) = re.findall(r"^#\$ TOP=(.+)$", dry_run.stderr, re.MULTILINE)
    # hidden, as in a real build: the process would share one list of kernels with other libraries under test
    options = ["-arch=sm_75", "-Xptxas=-O0", "-Xcompiler=-fPIC,-fvisibility=hidden"]
    compile_cuda = ["nvcc", "-std=c++20", f"-I{CSRC}", *options, "-c"]
    compile_host = ["g++", "-std=c++20", "-fPIC", "-Wall", "-Wextra", "-Werror", "-isystem", f"{top}/include", "-c"]
    jobs = [[*compile_cuda, str(source)] for source in sorted((CSRC / "cuda").glob("*.cu"))]
    jobs.append([*compile_host, str(HERE / "fake_runtime.cpp")])
    objects = [str(folder / f"{Path(job[-1]).stem}-fake.o") for job in jobs]
    running = [
        subprocess.Popen([*job, "-o", target], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for job, target in zip(jobs, objects, strict=True)
    ]
    for process in running:
        output, _ = process.communicate()
        assert process.returncode == 0, output
    # -z defs: no function of the CUDA runtime but those of the fake.
    link = ["g++", "-shared", "-Wl,-z,defs", *objects, "-o", str(library)]
    done = subprocess.run(link, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return library


@pytest.fixture
def fake(library: Path, monkeypatch: pytest.MonkeyPatch) -> ctypes.CDLL:
    """The library, in the place of the compiled one."""
    monkeypatch.setattr(libraries, "_library", lambda: library)
    return ctypes.CDLL(str(library))


def answer(
    fake: ctypes.CDLL, driver: int = DRIVER, device: int = 0, load: int = 0, kernels: str = "", max_threads: int = 1024
) -> None:
    fake.fake_answer(driver, device, load, kernels.encode(), max_threads)


def test_every_kernel_is_loaded_on_the_device(fake: ctypes.CDLL) -> None:
    answer(fake)
    assert libraries.cuda_refusal(torch.device("cuda", 3)) == "ready"
    assert fake.fake_device() == 3
    assert fake.fake_n_loaded() == fake.fake_n_questions() == fake.fake_n_registered() > 40


def test_without_a_device_only_the_driver_is_asked(fake: ctypes.CDLL) -> None:
    answer(fake, load=NO_IMAGE)
    assert libraries.cuda_refusal() == "ready"
    assert (fake.fake_device(), fake.fake_n_questions()) == (-1, 0)


@pytest.mark.parametrize(
    ("answers", "reason"),
    [
        (
            {"load": NO_IMAGE},
            r"kernel \w+(<.*>)? on compute capability 6\.1: no kernel image is available for execution on the device",
        ),
        (
            {"load": NO_IMAGE, "kernels": "scale_chunks"},
            r"kernel scale_chunks<(__half|__nv_bfloat16|float|double), \d+> on .*",
        ),
        ({"load": NO_IMAGE, "kernels": "clip_rows"}, r"kernel clip_rows on .*"),
        (
            {"kernels": "join_chunks", "max_threads": 128},
            r"kernel join_chunks<.*>: needed blocks of 256 threads, got at most 128",
        ),
        ({"device": INVALID_DEVICE}, "invalid device ordinal"),
        ({"driver": 0}, "no NVIDIA driver is installed"),
        ({"driver": 11080}, r"needed a driver for CUDA \d+\.\d or newer, got one for CUDA 11\.8: update the driver"),
        ({"driver": 12000}, r"needed a driver for CUDA \d+\.\d or newer, got one for CUDA 12\.0: update the driver"),
    ],
    ids=["no-image", "one-kernel", "no-template", "registers", "device", "no-driver", "old-driver", "older-driver"],
)
def test_the_reason_names_what_was_needed(fake: ctypes.CDLL, answers: dict[str, int], reason: str) -> None:
    answer(fake, **answers)  # type: ignore[arg-type]
    found = libraries.cuda_refusal(torch.device("cuda", 0))
    assert found is not None
    assert re.fullmatch(reason, found), found


def test_a_lack_of_memory_is_no_reason(fake: ctypes.CDLL) -> None:
    answer(fake, load=OUT_OF_MEMORY)
    assert libraries.cuda_refusal(torch.device("cuda", 0)) is None


def test_an_old_driver_is_known_before_a_device_is_used(fake: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
    if libraries.parts()["cuda"] != "ready":
        pytest.skip(libraries.parts()["cuda"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    answer(fake, driver=11080)
    assert "got one for CUDA 11.8" in libraries._registered("CUDA", {"cuda": "built"})
    assert fake.fake_device() == -1


# Chooses a back end for a GPU that torch is made to believe in.
CHOICE = """
import ctypes, json, sys, warnings
from pathlib import Path
import torch
from gradprobe import ops
from gradprobe.errors import BackendError
from gradprobe.ops import libraries
assert libraries.parts()["cuda"] == "ready"
torch.cuda.is_available = lambda: True
libraries._library = lambda: Path(sys.argv[1])
fake = ctypes.CDLL(sys.argv[1])
fake.fake_answer(99000, 0, int(sys.argv[2]), b"", 1024)
chosen = []
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(3):
        chosen.append(ops.resolve("auto", torch.device("cuda", 1)).name)
try:
    refused = ops.resolve("native", torch.device("cuda", 1)).name
except BackendError as error:
    refused = str(error)
messages = [str(warning.message) for warning in caught]
print(json.dumps([chosen, messages, refused, ops.backends()["native"], fake.fake_n_questions(), fake.fake_device()]))
"""


@pytest.mark.parametrize("load", [0, NO_IMAGE], ids=["fine", "no-image"])
def test_auto_takes_the_next_back_end_with_one_warning(library: Path, load: int) -> None:
    if libraries.parts()["cuda"] != "ready":
        pytest.skip(libraries.parts()["cuda"])
    done = subprocess.run(
        [sys.executable, "-c", CHOICE, str(library), str(load)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    chosen, messages, refused, state, n_questions, device = json.loads(done.stdout)
    assert device == 1
    if load == 0:
        assert (set(chosen), messages, refused, state) == ({"native"}, [], "native", "ready")
        return
    assert set(chosen) <= {"triton", "reference"}
    assert n_questions == 1  # the first failure is enough, and is remembered
    (message,) = messages
    assert "backend 'native' cannot run on cuda:1: kernel " in message
    assert message.endswith(f"; using the back end '{chosen[0]}'")
    assert "no kernel image is available" in refused
    assert state.startswith("ready for cpu; cuda: cannot run on cuda:1: kernel ")
