"""The compilers that torch.compile calls, and what is missing where it fails. Needs no torch."""

import os
import shlex
import shutil
from collections.abc import Mapping
from dataclasses import dataclass

from corun_ray.core.errors import UserError, format_error


class CannotCompile(UserError):
    """torch.compile cannot work on this machine; the message is one line."""


@dataclass(frozen=True)
class Compiler:
    """A compiler as torch and Triton look for it."""

    language: str
    variable: str
    """The variable of the environment that names it."""
    names: tuple[str, ...]
    """The commands that are looked for where the variable is not set."""
    failure: str
    """What the error says that is raised where there is none."""


CPP = Compiler("C++", "CXX", ("g++",), "InvalidCxxCompiler")
"""torch's, for kernels on a CPU."""
C = Compiler("C", "CC", ("gcc", "clang"), "Failed to find C compiler")
"""Triton's, for what starts its kernels on a GPU."""

OWN_HINT = "Set TORCHDYNAMO_VERBOSE"
"""How torch's advice to its developers begins, after the reason."""
FRAMES = ("backend=", "Command:", "Output:")
"""How lines around the reason begin."""


def find_missing_compiler(compiler: Compiler = CPP, environment: Mapping[str, str] = os.environ) -> str | None:
    """Return that a compiler is missing on this machine, and what to install; None where it is there."""
    names = (_name_command(compiler, environment),) if compiler.variable in environment else compiler.names
    if any(shutil.which(name, path=environment.get("PATH")) for name in names):
        return None
    return describe_missing(compiler, environment)


def describe_missing(compiler: Compiler, environment: Mapping[str, str] = os.environ) -> str:
    """Return what a missing compiler means, and what to install."""
    looked_for = " or ".join(compiler.names)
    if compiler.variable in environment:
        looked_for = f"{_name_command(compiler, environment) or 'nothing'}, as {compiler.variable} says"
    return (
        f"torch.compile needs a {compiler.language} compiler, and this machine has none (looked for {looked_for}); "
        f"Debian has one in the package {compiler.names[0]}"
    )


def explain_failure(error: Exception, environment: Mapping[str, str] = os.environ) -> str:
    """Return why torch.compile has failed, as one line: the missing compiler, or what the compiler or torch says."""
    text = str(error)
    for compiler in (CPP, C):
        if compiler.failure in text:
            return describe_missing(compiler, environment)

    # The reason is the compiler's own line, where it has one, else torch's first.
    lines = [line.strip() for line in text.partition(OWN_HINT)[0].splitlines()]
    told = [line for line in lines if line and not line.startswith(FRAMES)]
    reason = next((line for line in told if "error:" in line), told[0] if told else format_error(error))
    return f"torch.compile does not work on this machine: {reason}"


def _name_command(compiler: Compiler, environment: Mapping[str, str]) -> str:
    """Return the command that the variable names, without its arguments; empty where it names none."""
    return next(iter(shlex.split(environment[compiler.variable])), "")
