"""The compiled loops for processors that are not here: as LLVM compiles them for ARM. They are not run."""

from __future__ import annotations

import pytest

from fixtures.forks import call_in_forks
from saekit import kernels

COMPILE = """
import os, re, tempfile
import torch
from saekit import kernels

def work(targets):
    os.environ["NUMBA_CPU_NAME"] = "generic"  # the loops of a processor without bf16
    os.environ["NUMBA_OPT"] = "0"  # nothing is made fast for this processor: it is about what comes before
    with tempfile.TemporaryDirectory() as empty:
        os.environ["NUMBA_CACHE_DIR"] = empty
        from numba.core import codegen

        texts, add = [], codegen.CPUCodeLibrary.add_ir_module

        def recorded(library, module):
            texts.append(str(module))  # before anything is done for this processor
            return add(library, module)

        codegen.CPUCodeLibrary.add_ir_module = recorded
        x, W = torch.randn(40, 16), torch.randn(640, 16)
        kernels.topk_encode(x, W, torch.zeros(640), 8)
    assert len(texts) > 20
    assert not any("llvm.x86" in text for text in texts)
    with_vectors = [text for text in texts if re.search("<[0-9]+ x float>", text)]
    return [compiled(with_vectors, *target) for target in targets]

def compiled(texts, triple, cpu):
    import llvmlite.binding as llvm

    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    machine = llvm.Target.from_triple(triple).create_target_machine(cpu=cpu, opt=2)
    code = ""
    for text in texts:
        text = re.sub('target triple = "[^"]*"', f'target triple = "{triple}"', text)
        text = re.sub('target datalayout = "[^"]*"', f'target datalayout = "{machine.target_data}"', text)
        module = llvm.parse_assembly(text)
        module.verify()
        code += machine.emit_assembly(module)
    return [len(texts), len(re.findall(r"[.]4s|v[0-9]+[.]", code))]
"""
TARGETS = [("aarch64-unknown-linux-gnu", "generic"), ("arm64-apple-macosx11.0", "apple-m1")]


@pytest.mark.slow
@pytest.mark.skipif(bool(kernels.unavailable()), reason="there are no compiled loops here")
def test_the_loops_compile_for_arm_with_its_vectors_and_nothing_of_x86() -> None:
    (found,) = call_in_forks(COMPILE, [[TARGETS]])
    assert len(found) == len(TARGETS)
    assert all(modules > 0 and vectors > 50 for modules, vectors in found), found
