"""What `test_gpu` runs in a process of its own: compile launches of the Triton kernels for GPUs, without having one.

Standard input: one launch a line, as `gpu_checks` writes them, ``[kernel, {argument: type or value}, options]``.
Prints, for each, its name and the bytes of machine code.
"""

from __future__ import annotations

import json
import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from saekit.kernels import gpu_loops

TARGETS = [GPUTarget("cuda", 80, 32), GPUTarget("cuda", 90, 32)]


def main() -> None:
    for line in sys.stdin:
        name, arguments, options = json.loads(line)
        kernel = getattr(gpu_loops, name)
        signature = {key: kind if isinstance(kind, str) else "constexpr" for key, kind in arguments.items()}
        constants = {key: value for key, value in arguments.items() if not isinstance(value, str)}
        for target in TARGETS:
            source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
            compiled = triton.compile(source, target=target, options=options)
            print(name, target.arch, len(compiled.asm["cubin"]), flush=True)


if __name__ == "__main__":
    main()
