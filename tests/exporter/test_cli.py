"""What the command line looks like, and what it refuses."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

from llama_onnx.exporter.cli import main
from llama_onnx.exporter.packaging.options import Options
from tests.support.packages import alter_package

CONTEXT = click.Context(main)
VERBS = main.list_commands(CONTEXT)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_help_is_whole_sentences_on_eighty_columns() -> None:
    lines = run("--help").stdout.splitlines()
    assert max(map(len, lines)) <= 80
    for verb in VERBS:
        (line,) = [line for line in lines if line.startswith(f"  {verb} ")]
        assert line.endswith(".") and not line.endswith("..."), line


@pytest.mark.parametrize("verb", VERBS)
def test_a_command_has_the_summary_of_the_list(verb: str) -> None:
    command = main.get_command(CONTEXT, verb)
    assert command is not None and command.name == verb
    summary = command.get_short_help_str(limit=70)
    assert summary == command.short_help
    assert f"{verb} " in run("--help").stdout and summary in run("--help").stdout
    assert run(verb, "--help").exit_code == 0


def test_help_loads_no_command() -> None:
    code = (
        "import sys\n"
        "from llama_onnx.exporter.cli import main\n"
        "main(['--help'], standalone_mode=False)\n"
        "print(*(name for name in sys.modules if '.commands.' in name or name == 'rich'))\n"
    )
    said = subprocess.check_output([sys.executable, "-c", code], text=True)
    assert said.splitlines()[-1] == "llama_onnx.runtime.commands.streams"


@pytest.mark.parametrize("verb", ["export", "plan"])
def test_each_field_of_the_options_is_an_option(verb: str) -> None:
    command = main.get_command(CONTEXT, verb)
    assert command is not None
    found = {param.name: param for param in command.params}
    order = [name for name in found if name in {field.name for field in fields(Options)}]
    assert order == [field.name for field in fields(Options)]
    for field in fields(Options):
        assert found[field.name].default == field.default
        assert field.metadata["help"] in str(found[field.name].to_info_dict()["help"])


def test_values_arrive_as_the_options_have_them(tmp_path: Path, package: Path) -> None:
    source = package.parent / "checkpoint"
    result = run("plan", source, "--accuracy-level", "2")
    assert result.exit_code == 2 and "'1', '4'" in result.stderr.replace("1, 4", "'1', '4'")
    result = run("plan", source, "--precision", "int4", "--accuracy-level", "1", "--json")
    assert '"accuracy_level": 1' in result.stdout


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--temperature", "0", "--top-k", "4"), "--temperature 0 is greedy: leave out --top-k"),
        (
            ("--temperature", "0", "--top-p", "0.5", "--seed", "1"),
            "leave out --top-p, --seed,",
        ),
        (("--seed", "1"), "--seed has no effect on a greedy answer"),
        (("--provider", "cpu", "--allow-fallback"), "no effect with --provider cpu"),
    ],
)
@pytest.mark.parametrize("verb", [("generate", "hello"), ("chat",)])
def test_what_has_no_effect_on_an_answer_is_refused(
    package: Path, verb: tuple[str, ...], options: tuple[str, ...], said: str
) -> None:
    result = run(verb[0], package, *verb[1:], *options)
    assert (result.exit_code, result.stdout) == (2, "")
    assert said in result.stderr


def test_a_seed_is_taken_where_the_package_samples(package: Path, tmp_path: Path) -> None:
    sampling = alter_package(package, tmp_path / "sampling", search={"do_sample": True})
    result = run("generate", sampling, "hello", "--seed", "1", "--max-new-tokens", "2")
    assert result.exit_code == 0, result.stderr


@pytest.mark.parametrize("verb", ["inspect", "verify", "bench"])
def test_there_is_no_fallback_from_the_cpu(package: Path, verb: str) -> None:
    result = run(verb, package, "--provider", "cpu", "--allow-fallback")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "no effect with --provider cpu" in result.stderr


def test_files_only_takes_no_option_of_the_replay(package: Path) -> None:
    for options in (("--threads", "1"), ("--threads", "2"), ("--provider", "cpu")):
        result = run("verify", package, "--files-only", *options)
        assert result.exit_code == 2
        assert "--files-only runs nothing" in result.stderr
