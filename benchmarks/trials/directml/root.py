"""A Debian root with Wine in which DirectML runs, on Vulkan in software.

Wine's own d3d12.dll lacks three things that DirectML expects of Windows: d3d12.c adds them. The
root is made once and kept; nothing stays mounted in it, because each call mounts in a namespace of
its own.
"""

from __future__ import annotations

import os
import platform
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.trials.windows.wine import COMPILER

HERE = Path(__file__).parent
TOOLS = {"debootstrap": "debootstrap", "unshare": "util-linux", COMPILER: "gcc-mingw-w64-x86-64"}
"""Program -> Debian's package."""
RELEASE = "trixie"  # Wine 10; that of Debian 12, Wine 8, has no D3D12 that DirectML can use
PACKAGES = (
    *("wine", "wine64", "mesa-vulkan-drivers", "libvulkan1", "xvfb", "xauth"),
    *("libgl1", "libegl1", "libgnutls30"),
)
DISK = 3_000_000_000

_ENTER = """
set -e; root=$1 work=$2; shift 2
mount --bind /proc "$root/proc"; mount --bind /dev "$root/dev"; mount --bind "$work" "$root/work"
exec chroot "$root" "$@"
"""


@dataclass(frozen=True)
class Root:
    """The root in `path`. Programs see the folder `work` as Z:\\work, and start there."""

    path: Path
    work: Path

    @classmethod
    def make(cls, path: Path, work: Path) -> Root:
        """Make the root, unless it exists; exit with a sentence if this machine cannot."""
        root = cls(path.absolute(), work.absolute())
        root.work.mkdir(parents=True, exist_ok=True)
        _check(root.path)
        done = root.path / "ready"
        if not done.exists():
            shutil.rmtree(root.path, ignore_errors=True)  # of an attempt that failed
            root._install()
            done.touch()
        root._add_library()
        return root

    def call(
        self,
        command: Sequence[str],
        environment: Mapping[str, str] | None = None,
        timeout: float = 3600,
    ) -> subprocess.CompletedProcess[bytes]:
        """Run a Windows program and return what it printed. A program that hangs is ended."""
        return self._enter(["bash", "/start", *command], environment, timeout)

    def windows_path(self, path: Path) -> str:
        """Return the path as a Windows program in the root sees it; it must be in `work`."""
        return "Z:\\work\\" + str(path.absolute().relative_to(self.work)).replace("/", "\\")

    def _enter(
        self,
        command: Sequence[str],
        environment: Mapping[str, str] | None = None,
        timeout: float = 3600,
    ) -> subprocess.CompletedProcess[bytes]:
        enter = ["unshare", "--mount", "bash", "-c", _ENTER, "bash", str(self.path), str(self.work)]
        # Without the folder of temporary files that nox sets: there is none in the root, and with
        # any, Debian's Wine 10 ends with "double free or corruption".
        ours = {name: value for name, value in os.environ.items() if name != "TMPDIR"}
        process = subprocess.Popen(
            [*enter, *command],
            env={**ours, **(environment or {})},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        try:
            out, errors = process.communicate(timeout=timeout)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
        return subprocess.CompletedProcess(command, process.returncode, out, errors)

    def _install(self) -> None:
        print(f"making {self.path}: takes a minute or two, and 2 GB", flush=True)
        kind = ("--variant=minbase", "--include=ca-certificates")
        _run(["debootstrap", *kind, RELEASE, str(self.path), _mirror()])
        (self.path / "work").mkdir()
        shutil.copy(HERE / "start.sh", self.path / "start")
        install = ["apt-get", "install", "--yes", "--quiet", "--no-install-recommends", *PACKAGES]
        quiet = {"DEBIAN_FRONTEND": "noninteractive", "LC_ALL": "C"}
        _expect(self._enter(install, quiet))
        _expect(self._enter(["apt-get", "clean"]))
        _expect(self.call(["wineboot", "--init"]))

    def _add_library(self) -> None:
        """Build our d3d12.dll and put it in front of Wine's, a copy of which it loads."""
        system = self.path / "prefix" / "drive_c" / "windows" / "system32"
        shutil.copy(HERE / "start.sh", self.path / "start")
        (theirs,) = self.path.glob("usr/lib/*/wine/x86_64-windows/d3d12.dll")
        # Wine loads a file that says it is built in only from Wine's own folder.
        copied = theirs.read_bytes().replace(b"Wine builtin DLL", b"Native copy DLL\0", 1)
        built = self.path / "d3d12.dll"
        sources = (str(HERE / "d3d12.c"), str(HERE / "d3d12.def"))
        warnings = ("-Wall", "-Wextra", "-Werror")
        _run([COMPILER, "-shared", "-O1", *warnings, *sources, "-o", str(built)])
        for name, content in (("d3d12.dll", built.read_bytes()), ("wd3d12.dll", copied)):
            (system / name).unlink(missing_ok=True)  # a link to Wine's own file
            (system / name).write_bytes(content)


def _check(path: Path) -> None:
    needs = (
        "DirectML runs here in a Debian root with Wine, which needs Linux on x86-64, the user "
        "root, debootstrap and MinGW's compiler, and 3 GB of disk"
    )
    missing = [package for name, package in TOOLS.items() if shutil.which(name) is None]
    path.parent.mkdir(parents=True, exist_ok=True)
    if sys.platform != "linux" or platform.machine() != "x86_64":
        sys.exit(f"{needs}: this is {platform.system()} on {platform.machine()}.")
    if os.geteuid() != 0:
        sys.exit(f"{needs}: run it as root.")
    if missing:
        sys.exit(f"{needs}: run `apt-get install {' '.join(missing)}`.")
    if not (path / "ready").exists() and shutil.disk_usage(path.parent).free < DISK:
        sys.exit(f"{needs}: {path.parent} has less.")
    if subprocess.run(["unshare", "--mount", "true"], check=False).returncode:
        sys.exit(f"{needs}: this container may not mount; run it with CAP_SYS_ADMIN.")


def _mirror() -> str:
    """Return the mirror that this machine's apt uses."""
    for file in sorted(Path("/etc/apt/sources.list.d").glob("*.sources")):
        for line in file.read_text().splitlines():
            if line.startswith("URIs:"):
                return line.split()[1]
    return "http://deb.debian.org/debian"


def _run(command: Sequence[str]) -> None:
    _expect(subprocess.run(command, capture_output=True, check=False))


def _expect(done: subprocess.CompletedProcess[bytes]) -> None:
    if done.returncode:
        said = (done.stdout + done.stderr).decode(errors="replace")
        sys.exit(f"{' '.join(done.args)} failed with {done.returncode}:\n{said[-2000:]}")
