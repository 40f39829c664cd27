"""Run the tests of the installed peft on inlay's methods.

    python tests/peft_suite/run.py                          # all of them
    python tests/peft_suite/run.py vit sam -- -n 2 -x       # some, with arguments of pytest
    python tests/peft_suite/run.py --sdist peft-0.21.2.tar.gz

peft's tests are not in its wheel: its source distribution is downloaded once, by pip, into a temporary folder.
"""

import argparse
import os
import subprocess
import sys
import tarfile
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

HERE = Path(__file__).parent
CASES = ("custom", "decoder", "features", "vit", "sam")


def download_sdist(folder: Path) -> Path:
    """The source distribution of the peft that is installed."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
    command += ["--no-build-isolation", f"peft=={version('peft')}", "--dest", str(folder)]
    subprocess.run(command, check=True)
    return next(folder.glob("peft-*.tar.gz"))


def unpack_tests(sdist: Path, folder: Path) -> None:
    """Its folder `tests`, as the package `peft_tests`."""
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    next(folder.glob("peft-*/tests")).rename(folder / "peft_tests")


def main() -> int:
    """Fetch, unpack, make tiny bases, and run; 0 where all passed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", help=f"any of {', '.join(CASES)}; default: all")
    parser.add_argument("--sdist", type=Path, help="peft's source distribution, where it has been downloaded")
    at = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    arguments, more = parser.parse_args(sys.argv[1:at]), sys.argv[at + 1 :]
    if unknown := set(arguments.cases) - set(CASES):
        parser.error(f"unknown cases {', '.join(sorted(unknown))}; choose of {', '.join(CASES)}")
    with TemporaryDirectory() as name:
        folder = Path(name)
        unpack_tests(arguments.sdist or download_sdist(folder), folder)
        paths = [str(folder), str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = os.environ | {
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
            "PEFT_SUITE_BASES": str(folder / "bases"),
            "PYTHONPATH": os.pathsep.join(paths),
            "TOKENIZERS_PARALLELISM": "false",
        }
        subprocess.run([sys.executable, "-m", "peft_suite.cases"], env=environment, check=True)
        # peft warns of its own methods' settings in thousands of places: here its warnings are not ours to judge.
        command = [sys.executable, "-m", "pytest", "-p", "peft_suite.selection", "-p", "no:warnings"]
        command += ["-p", "no:cacheprovider", "--tb=short", "-rfEX"]
        failed = []
        for case in arguments.cases or CASES:  # apart, as three of them give one module of peft's their cases
            print(f"== {case}", flush=True)
            if subprocess.run([*command, *more, str(HERE / f"{case}.py")], env=environment).returncode:
                failed.append(case)
    print(f"failed: {', '.join(failed)}" if failed else "all passed")
    return len(failed)


if __name__ == "__main__":
    sys.exit(main())
