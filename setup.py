"""Builds dynplan._C (PyTorch ops) and dynplan._native (torch-free kernels over NumPy buffers).

Environment: DYNPLAN_CUDA=auto|0|1 (default auto: when the installed torch and a CUDA toolkit agree),
TORCH_CUDA_ARCH_LIST (default "8.0+PTX;9.0a"), MAX_JOBS; DYNPLAN_LABEL=1 (default 0) names torch's release in
the version, as wheels have it: 1.0.0+torch2.13.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup

ROOT = Path(__file__).parent.resolve()
SOURCES = ROOT / "csrc/sources.txt"
MIN_TORCH = (2, 11)
MIN_GCC = 11
INSTALL_HINT = "pip install torch==2.13.0, then pip install --no-build-isolation ."


def stop(problem: str, remedy: str) -> None:
    sys.exit(f"\ndynplan: {problem}\n  run: {remedy}\n")


try:
    import torch
    from torch.utils import cpp_extension
except ImportError as error:
    stop(f"building needs torch in this environment and it does not import ({error})", INSTALL_HINT)

try:
    import pybind11
except ImportError:
    stop("building needs pybind11", "pip install pybind11 ninja setuptools wheel")


def check_torch() -> None:
    version = tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2])
    if version < MIN_TORCH:
        stop(
            f"expected torch >= {MIN_TORCH[0]}.{MIN_TORCH[1]}, got {torch.__version__}",
            INSTALL_HINT,
        )


def check_compiler() -> tuple[str, bool]:
    """The compiler's name and version, and whether it is GCC."""
    compiler = os.environ.get("CXX", "g++")
    path = shutil.which(compiler.split()[-1])
    if path is None:
        stop(f"no C++ compiler: {compiler!r} is not on PATH", "apt-get install g++ (or set CXX)")
    banner = subprocess.run([path, "--version"], capture_output=True, text=True).stdout
    banner = banner.splitlines()[0] if banner else path
    dump = subprocess.run([path, "-dumpversion"], capture_output=True, text=True).stdout
    major = int(dump.split(".")[0]) if dump.strip() else 0
    is_gcc = "clang" not in banner
    if is_gcc and 0 < major < MIN_GCC:
        stop(
            f"expected g++ >= {MIN_GCC} for C++20, got {banner}",
            "apt-get install g++-12; CXX=g++-12",
        )
    return banner, is_gcc


def want_cuda() -> bool:
    choice = os.environ.get("DYNPLAN_CUDA", "auto")
    if choice not in ("auto", "0", "1"):
        stop(
            f"expected DYNPLAN_CUDA to be auto, 0 or 1, got {choice!r}",
            "DYNPLAN_CUDA=auto pip install ...",
        )
    if choice == "0":
        return False
    has_torch_cuda = torch.version.cuda is not None
    nvcc = Path(cpp_extension.CUDA_HOME or "/nonexistent") / "bin" / "nvcc"
    has_nvcc = nvcc.exists()
    if choice == "1" and not has_torch_cuda:
        stop(
            f"DYNPLAN_CUDA=1 but torch {torch.__version__} is a CPU build",
            "install a CUDA build of torch, or DYNPLAN_CUDA=0",
        )
    if choice == "1" and not has_nvcc:
        stop(
            "DYNPLAN_CUDA=1 but nvcc was not found",
            "install the CUDA toolkit and set CUDA_HOME, or DYNPLAN_CUDA=0",
        )
    return has_torch_cuda and has_nvcc


def sources(*groups: str) -> list[str]:
    rows = (line.split() for line in SOURCES.read_text().splitlines())
    rows = [row for row in rows if row and not row[0].startswith("#")]
    return [f"csrc/{path}" for group, path in rows if group in groups]


check_torch()
compiler, is_gcc = check_compiler()
cuda = want_cuda()
version = (ROOT / "version.txt").read_text().strip()
info = {
    "version": version,
    "torch": torch.__version__,
    "cuda": torch.version.cuda if cuda else None,
    "compiler": compiler,
    "python": sys.version.split()[0],
}
(ROOT / "dynplan/_build_info.json").write_text(json.dumps(info, indent=2) + "\n")
print("dynplan build:", json.dumps(info))

# The PTX is for chips newer than both: the driver compiles it there.
os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0+PTX;9.0a")
CXX_FLAGS = [
    "-O3",
    "-std=c++20",
    "-Wall",
    "-Wextra",
    "-Wno-unused-parameter",
    "-Wno-psabi",
    # Of torch's and pybind11's headers: precompiled, they lose the pragmas that silence these.
    "-Wno-sign-compare",
    "-Wno-missing-field-initializers",
    "-fvisibility=hidden",
    "-g0",
]
# Copies of functions for constant arguments: half of the region kernels' compile time, no gain at run time.
KERNEL_FLAGS = ["-fno-ipa-cp-clone"] if is_gcc else []
# at::parallel_for has no threads without it. The linker does not get it: the one thread pool is torch's own,
# which libtorch brings along.
OPENMP = ["-fopenmp"] if torch.backends.openmp.is_available() else []
NVCC_FLAGS = ["-O3", "-std=c++20", "--expt-relaxed-constexpr", "-lineinfo"]
INCLUDES = [str(ROOT / "csrc")]
BUILD = ROOT / "build"
PRECOMPILED = {"dynplan._C": "csrc/ops/precompiled.h", "dynplan._native": "csrc/native/precompiled.h"}


class Build(cpp_extension.BuildExtension):
    """Compiles the torch-free kernels once, into an archive for both modules and the C++ tests.

    Everything compiled stays in build/, where the next build finds what has not changed; pip by itself gives
    each build a new folder.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, use_ninja=True, **kwargs)

    def build_extensions(self):
        self.archive: Path | None = None
        if is_gcc:
            self.compiler.src_extensions.append(".h")  # what g++ makes of a header is a precompiled one
        super().build_extensions()

    def build_extension(self, extension):
        extension.extra_objects = [str(self.kernels())]
        self.build_temp = str(BUILD / extension.name)
        if is_gcc:
            self.precompile(extension)
        super().build_extension(extension)

    def precompile(self, extension):
        """Parse torch's or pybind11's headers once for all sources: two thirds of their time."""
        source = PRECOMPILED[extension.name]
        header = BUILD / "headers" / extension.name / "precompiled.h"
        (parsed,) = self.compiler.compile(
            [source],
            output_dir=str(header.parent),
            macros=extension.define_macros,
            include_dirs=extension.include_dirs,
            extra_postargs=extension.extra_compile_args,
        )
        shutil.copy2(ROOT / source, header)
        link = header.with_name(f"{header.name}.gch")
        link.unlink(missing_ok=True)
        link.symlink_to(parsed)
        extension.extra_compile_args["cxx"] += ["-include", str(header), "-Winvalid-pch"]

    def kernels(self) -> Path:
        if self.archive is None:
            objects = self.compiler.compile(
                sources("kernel"),
                output_dir=str(BUILD / "kernels"),
                include_dirs=INCLUDES,
                extra_postargs={"cxx": CXX_FLAGS + KERNEL_FLAGS},
            )
            self.archive = BUILD / "libdynplan_kernels.a"
            newest = max(Path(path).stat().st_mtime for path in (*objects, SOURCES))
            if not self.archive.exists() or self.archive.stat().st_mtime < newest:
                self.archive.unlink(missing_ok=True)  # ar would keep the objects of sources that are gone
                self.compiler.create_static_lib(objects, "dynplan_kernels", str(BUILD))
        return self.archive


make_extension = cpp_extension.CUDAExtension if cuda else cpp_extension.CppExtension
ops = make_extension(
    "dynplan._C",
    sources("op", "cpu", *(["cuda"] if cuda else [])),
    include_dirs=INCLUDES,
    define_macros=[("Py_LIMITED_API", "0x030A0000"), ("AT_PER_OPERATOR_HEADERS", None)]
    + ([("DYNPLAN_WITH_CUDA", None)] if cuda else []),
    extra_compile_args={"cxx": CXX_FLAGS + OPENMP} | ({"nvcc": NVCC_FLAGS} if cuda else {}),
    py_limited_api=True,
)
native = Extension(
    "dynplan._native",
    sources("native"),
    include_dirs=[*INCLUDES, pybind11.get_include()],
    define_macros=[("DYNPLAN_VERSION", f'"{version}"')],
    extra_compile_args={"cxx": [*CXX_FLAGS]},
    extra_link_args=["-pthread"],
    language="c++",
)
release = ".".join(torch.__version__.split(".")[:2])
label = f"+torch{release}" + (f".cu{torch.version.cuda.replace('.', '')}" if cuda else "")
setup(
    version=version + label * (os.environ.get("DYNPLAN_LABEL") == "1"),
    install_requires=[
        f"torch=={release}.*",
        "numpy",
        "transformers>=5.0",
        "safetensors",
        "typer",
        "rich",
        "tqdm",
    ],
    ext_modules=[ops, native],
    cmdclass={"build_ext": Build},
)
