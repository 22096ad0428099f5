"""Build the wheel, install it in an empty environment and ask every command for help.

Run from the repository's root with the path of a Python that has `build` and the dependencies:
the new environment borrows those from it, and psp itself from the wheel alone.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import venv
import zipfile
from pathlib import Path

ROOMS = (
    *(
        "architectures",
        "cluster",
        "commands",
        "common",
        "gguf_export",
        "gguf_files",
        "powerinfer_bridge",
        "predictor",
    ),
    *("cost_model", "pipeline", "prosparse", "quickstart", "report", "results", "sparse_operators"),
    *("evaluation", "vllm_plugin"),
)
DATA = (
    "cost_model/hardware.yaml",
    *("report/page.css", "report/page.html.j2", "report/evaluation.html.j2"),
)
COMMANDS = (
    *(
        ("quickstart",),
        ("run",),
        ("collect",),
        ("traces", "info"),
        ("traces", "check"),
        ("train-predictor",),
    ),
    *(("export-gguf",), ("gpu-split",), ("inspect",), ("verify",), ("bench-powerinfer",)),
    *(("generate",), ("bench-operators",), ("sparsify",), ("sparsity",)),
    *(("estimate",), ("evaluate",), ("report",), ("doctor",), ("run",), ("serve-check",)),
)


def run(*command: str, cwd: Path) -> str:
    """Run a command, return its stdout, fail on any other exit code than 0."""
    done = subprocess.run(command, cwd=cwd, check=False, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)} ended with {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout


def main() -> None:
    """Check the wheel."""
    python = str(Path(sys.argv[1]).absolute()) if len(sys.argv) > 1 else sys.executable
    root = Path(__file__).resolve().parents[1]
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        run(python, "-m", "build", "--wheel", "--outdir", name, ".", cwd=root)
        wheel = next(directory.glob("*.whl"))
        names = zipfile.ZipFile(wheel).namelist()
        tops = {Path(entry).parts[0] for entry in names}
        expected = {*ROOMS, "cli.py"}
        if {top for top in tops if not top.endswith(".dist-info")} != expected:
            sys.exit(f"the wheel holds {sorted(tops)}, expected {sorted(expected)}")
        if not all(f"{room}/py.typed" in names for room in ROOMS):
            sys.exit("a package lacks py.typed")
        if missing := set(DATA) - {*names}:
            sys.exit(f"the wheel lacks {sorted(missing)}")
        environment = directory / "venv"
        venv.create(environment, with_pip=True)
        clean = environment / "bin" / "python"
        run(
            str(clean), "-m", "pip", "install", "--no-deps", "--no-index", str(wheel), cwd=directory
        )
        purelib = run(
            python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])", cwd=directory
        ).strip()
        site = run(
            str(clean),
            "-c",
            "import sysconfig; print(sysconfig.get_paths()['purelib'])",
            cwd=directory,
        ).strip()
        # Dependencies only: an .pth line adds the directory but does not run its .pth files, so an
        # editable psp there stays invisible.
        Path(site, "dependencies.pth").write_text(purelib + "\n")
        psp = environment / "bin" / "psp"
        run(str(psp), "--help", cwd=directory)
        for command in COMMANDS:
            run(str(psp), *command, "--help", cwd=directory)
        where = run(str(clean), "-c", "import cli; print(cli.__file__)", cwd=directory).strip()
        if not Path(where).is_relative_to(environment):
            sys.exit(f"psp was imported from {where}, not from the wheel")
        print(f"{wheel.name}: installs, {len(COMMANDS) + 1} helps answered")


if __name__ == "__main__":
    main()
