"""The GPU kernel without a GPU: it compiles for a GPU, and in Triton's interpreter it passes the CPU path's tests."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).with_name("test_quantile_huber.py")


def test_interpreted_kernel_passes_the_same_tests() -> None:
    # In a process of its own, because the variable must be set before Triton is imported and would affect vLLM here.
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    selected = "not at_size or heavy-0.05 or ties-1.0"  # the interpreter takes seconds for 200 by 200
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", selected, str(TESTS)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("dtype", ["fp32", "fp64"])
@pytest.mark.parametrize("ones", [(), ("targets",), ("atoms", "levels", "targets")])
def test_kernel_compiles_for_hopper(
    dtype: str, ones: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Triton compiles sizes that are 1 as constants, which gives a different program."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from dvpo_service.algo.quantile_huber_triton import _BLOCK, _WARPS, _kernel

    constants = {"UNIT": True, "BLOCK": _BLOCK} | dict.fromkeys(ones, 1)
    types = {name: f"*{dtype}" if i < 6 else "i32" for i, name in enumerate(_kernel.arg_names)}
    source = ASTSource(_kernel, signature=types | dict.fromkeys(constants, "constexpr"), constexprs=constants)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": _WARPS})
    assert compiled.asm["cubin"]
    assert compiled.metadata.shared == 0
