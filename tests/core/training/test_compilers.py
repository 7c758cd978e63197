"""What torch.compile lacks on a machine, in words that say what to install."""

from pathlib import Path

import pytest
import torch

from corun_ray.core.training.acceleration import try_compiling
from corun_ray.core.training.compilers import C, CannotCompile, explain_failure, find_missing_compiler

TORCH_S_ADVICE = '\n\nSet TORCHDYNAMO_VERBOSE=1 for the internal stack trace\n, set TORCH_LOGS="+dynamo"\n'


def test_the_compiler_is_looked_for_as_torch_and_triton_do(tmp_path: Path) -> None:
    here = {"PATH": str(tmp_path)}
    assert find_missing_compiler(environment=here) == (
        "torch.compile needs a C++ compiler, and this machine has none (looked for g++); "
        "Debian has one in the package g++"
    )
    assert "a C compiler, and this machine has none (looked for gcc or clang)" in str(find_missing_compiler(C, here))

    for name in ("g++", "clang"):
        (tmp_path / name).touch(mode=0o755)
        (tmp_path / name).chmod(0o755)
    assert find_missing_compiler(environment=here) is None and find_missing_compiler(C, here) is None

    # A variable names the only one, with arguments.
    assert find_missing_compiler(environment=here | {"CXX": "clang -O1"}) is None
    assert "(looked for g++-99, as CXX says)" in str(find_missing_compiler(environment=here | {"CXX": "g++-99 -O1"}))
    assert "(looked for nothing, as CXX says)" in str(find_missing_compiler(environment=here | {"CXX": ""}))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("backend='inductor' raised:\nInvalidCxxCompiler: No working C++ compiler found in torch._inductor", "a C++ c"),
        ("RuntimeError: Failed to find C compiler. Please specify via CC", "torch.compile needs a C compiler"),
        (
            "CppCompileError: C++ compile error\n\nCommand:\ng++ a.cpp -o a\n\nOutput:\na.cpp:1:10: fatal error: "
            "Python.h: No such file or directory\ncompilation terminated.",
            "does not work on this machine: a.cpp:1:10: fatal error: Python.h: No such file or directory",
        ),
        ("backend='inductor' raised:\nGPUTooOldForTriton: too old", "on this machine: GPUTooOldForTriton: too old"),
        ("", "does not work on this machine: RuntimeError"),
    ],
)
def test_a_failure_is_one_line(text: str, reason: str) -> None:
    told = explain_failure(RuntimeError(text + TORCH_S_ADVICE if text else ""), {})
    assert reason in told and "\n" not in told and "TORCH" not in told and "_inductor" not in told


def test_what_fails_is_told_with_its_key(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("InvalidCxxCompiler")

    monkeypatch.setattr("torch.compile", lambda function: fail)
    with pytest.raises(CannotCompile, match=r"^optim\.compile: torch\.compile needs a C\+\+ compiler"):
        try_compiling(torch.device("cpu"), "optim.compile")
