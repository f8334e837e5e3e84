"""What `test_cuda` runs in a process of its own: compile launches of the Triton kernels for GPUs, without having one.

Standard input: one launch a line, as `gpu_checks` writes them, ``[kernel, {argument: type or value}, options]``.
Prints, for each, its name and the bytes of machine code.
"""

from __future__ import annotations

import json
import sys

from saekit.kernels.cuda import triton_kernels

CAPABILITIES = (80, 90)


def main() -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    for line in sys.stdin:
        name, arguments, options = json.loads(line)
        kernel = getattr(triton_kernels, name)
        signature = {key: kind if isinstance(kind, str) else "constexpr" for key, kind in arguments.items()}
        constants = {key: value for key, value in arguments.items() if not isinstance(value, str)}
        for target in (GPUTarget("cuda", capability, 32) for capability in CAPABILITIES):
            source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
            compiled = triton.compile(source, target=target, options=options)
            print(name, target.arch, len(compiled.asm["cubin"]), flush=True)


if __name__ == "__main__":
    main()
