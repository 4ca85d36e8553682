"""Build steps that pyproject.toml cannot express: generated contracts and the native core.

`python setup.py build_protos` writes the protobuf and gRPC code of proto/ into esper/<name>/v1/.
`python setup.py build_ext --inplace` compiles csrc/ into esper/_C.*.so, only what has changed.
Both also run as part of every wheel and editable install.

Environment:
    ESPER_CUDA: `auto` (default: on when nvcc is found), `0` or `1`; a GPU is never asked for.
    ESPER_SANITIZE: 1 builds with AddressSanitizer and UndefinedBehaviorSanitizer and without CUDA,
        in a folder of its own; `make sanitize` runs the kernel tests on it.
    CUDA_HOME: where the CUDA toolkit is; else nvcc on PATH, else /usr/local/cuda.
    CXX: the C++ compiler, default g++.
    MAX_JOBS: compile jobs at once, default the number of cores.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
from importlib.util import find_spec
from pathlib import Path

from setuptools import Command
from setuptools import Extension
from setuptools import find_packages
from setuptools import setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.command.egg_info import egg_info

ROOT = Path(__file__).resolve().parent
PROTO = ROOT / "proto"
SANITIZE = os.environ.get("ESPER_SANITIZE") == "1"
NATIVE_BUILD = ROOT / "build" / ("sanitize/native" if SANITIZE else "native")
SANITIZERS = (
    "-fsanitize=address,undefined -fno-sanitize=vptr -fno-sanitize-recover=undefined "
    "-fno-omit-frame-pointer"
)
CUDA_ARCHS = ("80", "90")  # machine code; the last one is also embedded as PTX for later devices


def fail(message: str) -> None:
    """Ends the build with one sentence instead of a traceback."""
    raise SystemExit(f"esper: {message}")


# ---------------------------------------------------------------- contracts


def proto_files() -> list[str]:
    return sorted(path.relative_to(PROTO).as_posix() for path in PROTO.glob("esper/*/v1/*.proto"))


def generate_protos() -> None:
    """Regenerates esper/*/v1 from proto/; a no-op while the output is newer than every source."""
    sources = proto_files()
    folders = sorted({Path(source).parent for source in sources})
    inputs = [PROTO / source for source in sources] + [ROOT / "setup.py"]
    expected = {}
    for source in sources:
        stem = source.removesuffix(".proto")
        for ending in ("_pb2.py", "_pb2.pyi", "_pb2_grpc.py", "_pb2_grpc.pyi"):
            expected[ROOT / f"{stem}{ending}"] = source
    for folder in folders:
        expected[ROOT / folder / "__init__.py"] = folder.as_posix()
    # Remove what an earlier proto tree left behind, so that a renamed file cannot be imported.
    for generated in ROOT.glob("esper/*/v1/*.py*"):
        if generated.is_file() and generated not in expected:
            generated.unlink()
    newest = max(path.stat().st_mtime for path in inputs)
    if all(path.exists() and path.stat().st_mtime >= newest for path in expected):
        return

    if find_spec("grpc_tools") is None:
        fail(
            "generating the contracts needs grpcio-tools: "
            "run `pip install 'grpcio-tools>=1.85,<2'`."
        )
    import grpc_tools.protoc

    scripts = sysconfig.get_path("scripts")
    plugin = shutil.which(
        "protoc-gen-mypy_grpc", path=os.pathsep.join([scripts, os.environ["PATH"]])
    )
    if plugin is None:
        fail("generating the contracts needs mypy-protobuf: run `pip install 'mypy-protobuf>=5'`.")
    well_known = Path(grpc_tools.__file__).parent / "_proto"
    status = grpc_tools.protoc.main(
        [
            "protoc",
            f"--plugin=protoc-gen-mypy_grpc={plugin}",
            f"-I{PROTO}",
            f"-I{well_known}",
            f"--python_out={ROOT}",
            f"--pyi_out={ROOT}",
            f"--grpc_python_out={ROOT}",
            f"--mypy_grpc_out={ROOT}",
            *sources,
        ]
    )
    if status != 0:
        fail(f"protoc failed with status {status}; its message is above.")
    for folder in folders:
        package = folder.as_posix().replace("/", ".")
        text = f'"""Generated from proto/{folder.as_posix()}; do not edit ({package})."""\n'
        (ROOT / folder / "__init__.py").write_text(text)
    for path, source in expected.items():
        if not path.exists():  # a file without services has no gRPC types to write
            path.write_text(f"# Generated: {source} declares nothing for this file.\n")
        os.utime(path)


class BuildProtos(Command):
    description = "generate protobuf and gRPC code from proto/"
    user_options: list[tuple[str, str | None, str]] = []

    def initialize_options(self) -> None: ...

    def finalize_options(self) -> None: ...

    def run(self) -> None:
        generate_protos()


class BuildPy(build_py):
    def run(self) -> None:
        generate_protos()
        super().run()


class EggInfo(egg_info):
    def run(self) -> None:  # which lists the packages, so they have to exist by now
        generate_protos()
        super().run()


# ---------------------------------------------------------------- native core


def find_nvcc() -> Path | None:
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    on_path = shutil.which("nvcc")
    for candidate in (
        *(Path(home) / "bin" / "nvcc" for home in homes[:1] if home),
        *([Path(on_path)] if on_path else []),
        Path(homes[1]) / "bin" / "nvcc",
    ):
        if candidate.exists():
            return candidate
    return None


def cuda_compiler() -> tuple[Path, Path] | None:
    """Returns (nvcc, toolkit root) when CUDA kernels are to be built, else None."""
    wish = "0" if SANITIZE else os.environ.get("ESPER_CUDA", "auto")
    if wish not in ("auto", "0", "1"):
        fail(f"ESPER_CUDA is {wish!r} but must be `auto`, `0` or `1`.")
    if wish == "0":
        return None
    nvcc = find_nvcc()
    if nvcc is None:
        if wish == "1":
            fail("ESPER_CUDA=1 but nvcc is neither on PATH nor under CUDA_HOME or /usr/local/cuda.")
        return None
    # nvcc may be a wrapper script outside the toolkit, so it is asked where the toolkit is.
    dry_run = subprocess.run(
        [nvcc, "--dryrun", "-x", "cu", "-c", os.devnull],
        capture_output=True,
        text=True,
        check=False,
    )
    for line in dry_run.stderr.splitlines():
        if line.startswith("#$ TOP="):
            return nvcc, Path(line.removeprefix("#$ TOP=")).resolve()
    fail(f"{nvcc} does not say where its toolkit is: {dry_run.stderr.strip()[:200]}")
    return None


def ninja_program() -> str:
    program = shutil.which(
        "ninja", path=os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]])
    )
    if program is None:
        fail("ninja is needed to build the native core: run `pip install ninja`.")
    return str(program)


def ninja_text(output: Path) -> str:
    """Returns the build.ninja that compiles csrc/ and links `output`."""
    for module in ("torch", "pybind11"):
        if find_spec(module) is None:
            fail(
                f"{module} is not installed in the environment that builds; install it first and "
                "use `pip install --no-build-isolation -e .`, or run `make setup`."
            )
    import pybind11
    import torch
    from torch.utils import cpp_extension

    cxx = os.environ.get("CXX", "g++")
    if shutil.which(cxx) is None:
        fail(f"the C++ compiler {cxx!r} is not there; set CXX to a compiler with C++20.")
    cuda = cuda_compiler()
    defines = [
        f'-DESPER_TORCH_VERSION=\\"{torch.__version__}\\"',
        f'-DESPER_CUDA_ARCHS=\\"{",".join(CUDA_ARCHS) if cuda else ""}\\"',
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
        "-DC10_CUDA_NO_CMAKE_CONFIGURE_FILE",
    ]
    includes = [
        pybind11.get_include(),
        *cpp_extension.include_paths(),
        sysconfig.get_path("include"),
    ]
    optimise = f"-O1 -g1 {SANITIZERS}" if SANITIZE else "-O3 -g0"
    cxxflags = [
        f"-std=c++20 {optimise} -fPIC -fopenmp -fvisibility=hidden",
        "-ffp-contract=fast -fno-math-errno",
        "-Wall -Wextra -Wno-unknown-pragmas -Wno-psabi",
        f"-I{ROOT / 'csrc'}",
        *(f"-isystem {path}" for path in includes),
        *defines,
    ]
    link_extra = f" {SANITIZERS}" if SANITIZE else ""
    libraries = [f"-L{path}" for path in cpp_extension.library_paths()]
    libraries += ["-lc10", "-ltorch_cpu", "-ltorch", "-ltorch_python"]
    sources = sorted((ROOT / "csrc").rglob("*.cpp"))
    lines = [
        "ninja_required_version = 1.5",
        f"cxx = {cxx}",
        f"cxxflags = {' '.join(cxxflags)}",
        "rule cxx",
        "  command = $cxx -MMD -MF $out.d $cxxflags -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = CXX $in",
        "rule link",
        f"  command = $cxx -shared -fopenmp{link_extra} -Wl,--gc-sections $in -o $out $libs",
        "  description = LINK $out",
    ]
    objects = []
    if cuda:
        nvcc, toolkit = cuda
        flags = ["-std=c++20", "-O3", "-Xcompiler -fPIC,-fvisibility=hidden", f"-I{ROOT / 'csrc'}"]
        flags += [f"-gencode arch=compute_{a},code=sm_{a}" for a in CUDA_ARCHS]
        flags.append(f"-gencode arch=compute_{CUDA_ARCHS[-1]},code=compute_{CUDA_ARCHS[-1]}")
        lines += [
            "rule nvcc",
            f"  command = {nvcc} -MMD -MF $out.d {' '.join(flags)} -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "  description = NVCC $in",
        ]
        libraries += [f"-L{toolkit / 'lib64'}", "-lcudart_static", "-lrt", "-ldl", "-lpthread"]
        if torch.version.cuda:
            libraries += ["-lc10_cuda", "-ltorch_cuda"]
        sources += sorted((ROOT / "csrc").rglob("*.cu"))
    else:
        sources = [path for path in sources if not path.stem.startswith("cuda_")]
    for source in sources:
        target = f"{source.relative_to(ROOT).as_posix()}.o"
        lines.append(f"build {target}: {'nvcc' if source.suffix == '.cu' else 'cxx'} {source}")
        objects.append(target)
    lines += [
        f"build {output.name}: link {' '.join(objects)}",
        f"  libs = {' '.join(libraries)}",
        "",
    ]
    return "\n".join(lines)


class BuildNative(build_ext):
    """Compiles csrc/ with ninja in one fixed folder: editable installs are incremental too."""

    def build_extension(self, ext: Extension) -> None:
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        NATIVE_BUILD.mkdir(parents=True, exist_ok=True)
        built = NATIVE_BUILD / output.name
        text = ninja_text(output)
        plan = NATIVE_BUILD / "build.ninja"
        if not plan.exists() or plan.read_text() != text:
            plan.write_text(text)
        command = [ninja_program(), "-C", str(NATIVE_BUILD)]
        if "MAX_JOBS" in os.environ:
            command += ["-j", os.environ["MAX_JOBS"]]
        sys.stdout.flush()
        if subprocess.run(command, check=False).returncode != 0:
            fail("the native core does not compile; the compiler's message is above.")
        output.parent.mkdir(parents=True, exist_ok=True)
        # A running process may have the old file mapped: replace it, never write into it.
        temporary = output.with_suffix(".tmp")
        shutil.copy2(built, temporary)
        temporary.replace(output)


def packages() -> list[str]:
    """Returns every package, those that are only generated later included."""
    own = find_packages(str(ROOT), include=["esper", "esper.*"])
    services = ["esper.services"]
    services += [f"esper.services.{name}" for name in find_packages(str(ROOT / "services"))]
    contracts = {Path(source).parent.as_posix().replace("/", ".") for source in proto_files()}
    return sorted({*own, *services, *contracts})


setup(
    packages=packages(),
    package_dir={"esper": "esper", "esper.services": "services"},
    ext_modules=[Extension("esper._C", sources=[])],
    cmdclass={
        "build_protos": BuildProtos,
        "build_py": BuildPy,
        "build_ext": BuildNative,
        "egg_info": EggInfo,
    },
    zip_safe=False,
)
