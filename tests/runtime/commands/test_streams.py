"""What commands read from pipes, and what reaches a terminal."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from rich.table import Table

from llama_onnx.exporter.cli import main
from llama_onnx.runtime.commands.console import note
from llama_onnx.runtime.commands.progress_line import ProgressLine
from llama_onnx.runtime.commands.streams import decode_input, say, show_answer
from llama_onnx.runtime.commands.tables import make_console
from llama_onnx.targets.errors import UsageError

POSIX = pytest.mark.skipif(os.name == "nt", reason="closes streams as POSIX shells do")
COMMAND = (sys.executable, "-m", "llama_onnx.exporter.cli")

HOSTILE = (
    "\x1b[2J\x1b[H",  # clears the screen
    "\x1b]0;title\x07",  # renames the window
    "\x1b]8;;https://example.com\x1b\\link\x1b]8;;\x1b\\",
    "\x1b]52;c;ZXZpbA==\x07",  # writes to the clipboard
    "\x1bP$q\x1b\\",
    "\x1b[31mred\x1b[0m",
    "\x1b[8mhidden",
    "\x9b2J",  # the same in one byte, C1
    "\x9d0;t\x9c",
    "a\rb",
    "a\b\b\bc",
    "\x00\x07\x0b\x0c\x7f",
    "\u202egnp.exe",
    "\u2066a\u2069",
    "\u2028",
    "\udcff",
    "[red]a[/red]",
    "[link=https://example.com]a[/link]",
    ":smile:",
)
SHOWN = {"[red]a[/red]", "[link=https://example.com]a[/link]", ":smile:"}


def is_safe(text: str, value: str) -> bool:
    """Whether a terminal shows `text`, which quotes `value`, and obeys nothing in it."""
    inert = all(c.isprintable() or c == "\n" for c in text)
    return inert and (value in text if value in SHOWN else value not in text)


@pytest.mark.parametrize("value", HOSTILE)
def test_lines(value: str, capsys: pytest.CaptureFixture[str]) -> None:
    say(f"a {value} b")
    say(f"a {value} b", err=True)
    note(value)
    out, err = capsys.readouterr()
    assert is_safe(out, value) and is_safe(err, value)


@pytest.mark.parametrize("value", HOSTILE)
def test_tables(value: str) -> None:
    out = io.StringIO()
    console = make_console(file=out, force_terminal=True, color_system=None, width=200)
    table = Table("a", value, title=value)
    table.add_row(value, "b")
    console.print(table)
    console.print(value, soft_wrap=True)
    assert is_safe(out.getvalue(), value)


@pytest.mark.parametrize("value", HOSTILE)
def test_progress(value: str) -> None:
    out = io.StringIO()
    console = make_console(file=out, force_terminal=True, color_system=None, width=200)
    with ProgressLine(console) as line:
        line.step(value)
        out.truncate(out.seek(0))
        line.refresh()
        drawn = out.getvalue()
    for known in ("\x1b[2K", "\x1b[1A", "\r"):  # rich's own, to draw the line again
        drawn = drawn.replace(known, "")
    assert is_safe(drawn, value)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("value", HOSTILE)
def test_generated_text(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for stream, safe in ((Terminal(), True), (io.StringIO(), False)):
        monkeypatch.setattr(sys, "stdout", stream)
        show_answer(value)
        monkeypatch.undo()
        # In a pipe or a file it is data.
        assert is_safe(stream.getvalue(), value) if safe else stream.getvalue() == value


@pytest.mark.parametrize("value", [v for v in HOSTILE if "\0" not in v and "://" not in v])
def test_errors(value: str) -> None:
    for args in (["inspect", value], ["generate", value, "a"], ["--" + value], [value]):
        result = CliRunner().invoke(main, args)
        assert result.exit_code in (1, 2)
        assert is_safe(result.stderr, value)


# ---- input ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("caf\u00e9 \u65e5".encode(), "caf\u00e9 \u65e5"),
        ("a".encode("utf-8-sig"), "a"),
        (b"", ""),
        (b"\xef\xbb\xbf", ""),
        ("a\ufeffb".encode(), "a\ufeffb"),
    ],
)
def test_text_from_a_pipe(content: bytes, text: str) -> None:
    assert decode_input(content) == text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a".encode("utf-16"), "is UTF-16"),
        (b"\xfe\xff\0a", "is UTF-16"),
        ("a".encode("utf-32"), "is UTF-32"),
        (b"caf\xe9", "is not UTF-8 .at byte 3"),
        (b"\xed\xa0\x80", "is not UTF-8"),
        (b"a" * 2000 + b"\x80", "at byte 2,000"),
    ],
)
def test_text_in_another_encoding(content: bytes, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        decode_input(content)


@pytest.mark.parametrize("command", [("generate", "-"), ("chat",)])
def test_commands_refuse_another_encoding(package: Path, command: tuple[str, ...]) -> None:
    args = [command[0], str(package), *command[1:]]
    result = CliRunner().invoke(main, args, input="\u65e5".encode("utf-16"))
    assert result.exit_code == 2
    assert "the text on stdin is UTF-16: convert it to UTF-8 first." in result.stderr


def run(*args: Any, **options: Any) -> subprocess.CompletedProcess[bytes]:
    environment = {**os.environ, **options.pop("env", {})}
    return subprocess.run(
        [*COMMAND, *map(str, args)], capture_output=True, env=environment, **options
    )


def test_pipes_are_utf8_where_the_system_has_a_code_page(package: Path) -> None:
    """As on Windows without its UTF-8 mode."""
    page = {"PYTHONIOENCODING": "cp1252"}
    prompt = "\u65e5\u672c caf\u00e9 \U0001f600"
    piped = run("generate", package, "-", "--max-new-tokens", 3, input=prompt.encode(), env=page)
    given = run("generate", package, prompt, "--max-new-tokens", 3, "--json", env=page)
    assert piped.returncode == given.returncode == 0
    assert json.loads(given.stdout)["text"] == piped.stdout.decode()[:-1]


@POSIX
@pytest.mark.parametrize("command", ["generate", "chat"])
def test_no_stdin(package: Path, command: str) -> None:
    prompt = ["-"] if command == "generate" else []
    done = run(command, package, *prompt, preexec_fn=lambda: os.close(0))
    assert done.returncode == 2
    assert done.stderr.startswith(b"Error: there is no stdin")
    assert b"Traceback" not in done.stderr


@POSIX
@pytest.mark.parametrize("closed", [(1,), (2,), (0, 1, 2)])
@pytest.mark.parametrize("args", [("targets",), ("no-such-command",)])
def test_closed_outputs(args: tuple[str, ...], closed: tuple[int, ...]) -> None:
    def close() -> None:
        for number in closed:
            os.close(number)

    done = run(*args, preexec_fn=close)
    assert done.returncode == (0 if args == ("targets",) else 2)
    assert b"Traceback" not in done.stderr + done.stdout


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("args", [("--help",), ("targets",), ("targets", "--json")])
def test_a_full_disk(args: tuple[str, ...]) -> None:
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run([*COMMAND, *args], stdout=full, stderr=subprocess.PIPE)
    assert done.returncode == 1
    assert done.stderr == b"Error: No space left on device; free some space.\n"


@POSIX
def test_a_reader_that_is_gone() -> None:
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([*COMMAND, "targets"], stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    assert (done.returncode, done.stderr) == (1, b"")


@pytest.mark.parametrize(
    "environment",
    [
        {"NO_COLOR": "1"},
        {"FORCE_COLOR": "1"},
        {"TERM": "dumb"},
        {"TERM": ""},
        {"COLUMNS": "0"},
        {"COLUMNS": "-1"},
        {"COLUMNS": "abc"},
        {"COLUMNS": "1"},
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    ],
)
def test_environments(environment: dict[str, str]) -> None:
    done = run("targets", env=environment)
    assert (done.returncode, done.stderr) == (0, b"")
    assert ("\x1b[" in done.stdout.decode()) == ("FORCE_COLOR" in environment)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names")
def test_a_path_that_is_not_utf8(package: Path, tmp_path: Path) -> None:
    place = Path(os.fsdecode(os.fsencode(tmp_path) + b"/a\xff\x1b[2J"))
    result = CliRunner().invoke(main, ["inspect", str(place)])
    assert result.exit_code == 2 and "\\x1b[2J' does not exist" in result.stderr
    shutil.copytree(package, place)
    for options in ((), ("--json",)):
        done = run("inspect", str(place), *options)
        assert (done.returncode, done.stderr) == (0, b"")
        assert b"\xff" not in done.stdout and b"\x1b" not in done.stdout
    assert json.loads(done.stdout)["kind"] == "package"


@pytest.mark.skipif(sys.platform == "win32", reason="sends SIGINT to itself")
def test_ctrl_c_during_an_import(tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text(
        "import os, signal, time\n"
        "try:\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    time.sleep(9)\n"
        "except BaseException as error:\n"
        "    raise ImportError('broken library') from error\n"
    )
    code = (
        "import click, sys\n"
        "from llama_onnx.exporter.cli import main\n"
        "main.add_command(click.Command('x', callback=lambda: __import__('slow')))\n"
        "type(main).get_command = click.Group.get_command\n"
        "main(['x'])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, b"", b"")


@pytest.mark.parametrize("threads", [0, -1, 1_000_000, 2**70])
def test_senseless_numbers_of_threads(package: Path, threads: int) -> None:
    most = max(64, 8 * (os.cpu_count() or 1))
    for args in (("generate", package, "a"), ("chat", package), ("verify", package)):
        result = CliRunner().invoke(main, [*map(str, args), "--threads", str(threads)])
        assert result.exit_code == 2
        assert f"threads must be 1 to {most}, not {threads}: this machine has" in result.stderr


def test_no_trace_of_telemetry(package: Path, tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "import llama_onnx.exporter.packaging.export\n"
        "from llama_onnx.runtime import ort\n"
        "from llama_onnx.runtime.llama.model import Llama\n"
        "from pathlib import Path\n"
        "ort.create_session(Path(sys.argv[1]) / 'model.onnx')\n"
        "list(Llama.load(sys.argv[1]).generate('a', max_new_tokens=2))\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "ORT_DISABLE_TELEMETRY"}
    environment |= {"HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    subprocess.run([sys.executable, "-c", code, package], env=environment, check=True)
    assert [path for path in tmp_path.rglob("*") if "icrosoft" in str(path)] == []
