"""The vendor's own torch_npu on a runtime of stubs: `python tests/vendor/ascend_stub.py` makes build/vendor/ascend.

It installs the wheel there and compiles with gcc what libtorch_npu.so asks for. Nothing of it comes into the repository, nor
into an environment that porthal runs in. `load()` starts it in this process.
"""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
MADE = HERE.parents[1] / "build" / "vendor" / "ascend"
VERSION = "2.13.0"
# The package looks for optional names in each of these, so those without code of their own depend on the first.
LIBRARIES = "ascendcl", "hccl", "acl_op_compiler", "ge_runner", "graph", "acl_tdt_channel"
# Looked for when it runs, and no undefined symbols.
LATE = [
    "aclrtSynchronizeStreamWithTimeout", "aclrtSynchronizeDeviceWithTimeout", "aclrtSetStreamOverflowSwitch",
    "aclSetCompileopt", "aclrtGetStreamOverflowSwitch", "aclrtSetStreamAttribute", "aclrtGetStreamAttribute",
    "aclrtSetSysParamOpt", "aclrtCtxSetSysParamOpt", "aclrtDestroyStreamForce", "aclrtPeekAtLastError",
    "aclrtGetLastError", "aclrtSetStreamFailureMode", "aclsysGetCANNVersion", "aclInit", "aclrtSetOpExecuteTimeOut",
    "aclrtSetOpWaitTimeout", "aclrtSetDeviceSatMode", "aclrtResetEvent", "aclrtSynchronizeEvent", "aclFinalize",
    "aclDestroyTensor", "aclDestroyScalar", "aclDestroyIntArray", "aclDestroyFloatArray", "aclDestroyBoolArray",
    "aclDestroyTensorList", "aclDestroyScalarList",
]  # fmt: skip


def make() -> None:
    """Install the wheel and compile the libraries."""
    if not (MADE / "torch_npu").exists():
        wheel = f"torch-npu=={VERSION}"
        pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-compile", "--target", str(MADE), wheel]
        subprocess.run(pip, check=True)
    package = MADE / "torch_npu" / "lib" / "libtorch_npu.so"
    listed = subprocess.run(["nm", "-D", "--undefined-only", str(package)], capture_output=True, text=True, check=True).stdout
    wanted = {line.split()[-1].partition("@")[0] for line in listed.splitlines()} | set(LATE)
    code = (HERE / "cann.c").read_text(encoding="utf-8")
    defined = set(re.findall(r"\b(acl\w+)\(", code))
    plain = sorted(n for n in wanted - defined if re.match(r"acl|rt[A-Z]|Hccl|Msprof|ge[A-Z]", n))
    kernels = sorted(name.decode() for name in set(re.findall(rb"\baclnn[A-Z]\w+", package.read_bytes())))
    _compile("ascendcl", code + "".join(f"int {name}(void) {{ return 0; }}\n" for name in plain))
    for name in LIBRARIES[1:]:
        _compile(name, "", "ascendcl")
    _compile("opapi", "int porthal_log(const char *);\n" + "".join(map(_kernel, kernels)), "ascendcl")


def _kernel(name: str) -> str:
    """How much memory a kernel needs is asked before it runs, and not logged."""
    answer = "0" if name.endswith("GetWorkspaceSize") else f'porthal_log("{name}")'
    return f"int {name}(void) {{ return {answer}; }}\n"


def _compile(name: str, code: str, *needs: str) -> None:
    file = MADE / f"lib{name}.so"
    linked = ["-Wl,--no-as-needed", f"-L{MADE}", *(f"-l{need}" for need in needs)]
    command = ["gcc", "-shared", "-fPIC", "-O1", "-w", "-x", "c", "-", "-o", str(file), f"-Wl,-soname,{file.name}", *linked]
    subprocess.run(command, input=code, text=True, check=True)


def load() -> ctypes.CDLL:
    """Start torch_npu on the stubs; the runtime, which says what was called."""
    os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"  # else `import torch` imports torch_npu, before it can start
    runtime, *_ = [ctypes.CDLL(str(MADE / f"lib{name}.so"), mode=ctypes.RTLD_GLOBAL) for name in (*LIBRARIES, "opapi")]
    runtime.porthal_call.restype = ctypes.c_char_p
    sys.path.insert(0, str(MADE))
    import torch  # noqa: F401
    import torch_npu  # noqa: F401

    return runtime


if __name__ == "__main__":
    make()
