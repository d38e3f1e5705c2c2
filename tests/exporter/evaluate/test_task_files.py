"""Tasks are a stranger's files: what is more than data is refused, and nothing of it runs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from llama_onnx.exporter.cli import main
from llama_onnx.exporter.evaluate.tasks.task_files import read_tasks
from llama_onnx.exporter.evaluate.tasks.templates import render
from llama_onnx.targets.errors import UsageError
from tests.support.import_graph import Source
from tests.support.lm_tasks import CHOICE, rows, write_task

ROOT = Path(__file__).parents[3]
HARNESS = "exporter/evaluate/tasks/harness.py"


def test_a_task_is_its_definition_and_its_rows(tmp_path: Path) -> None:
    (task,) = read_tasks(write_task(tmp_path))
    assert task.name == "choice" and not task.generates
    assert list(task.splits["test"]) == rows()
    assert task.config["doc_to_text"] == CHOICE["doc_to_text"]
    before = task.sha256
    with (tmp_path / "choice.jsonl").open("a") as file:
        file.write('{"question": "more", "other": 1}\n')
    (task,) = read_tasks(tmp_path)
    assert task.sha256 != before
    assert task.splits["test"][-1] == {
        "question": "more",
        "choices": None,
        "answer": None,
        "other": 1,
    }


def test_rows_that_each_have_another_key_are_refused(tmp_path: Path) -> None:
    """Each row gets the keys of all, so their number would be squared."""
    write_task(tmp_path)
    lines = "".join(f'{{"k{number}": 1}}\n' for number in range(2000))
    (tmp_path / "choice.jsonl").write_text(lines)
    with pytest.raises(UsageError, match="2,000 keys"):
        read_tasks(tmp_path)


def test_included_files_are_parts(tmp_path: Path) -> None:
    write_task(tmp_path)
    (tmp_path / "more.yaml").write_text("include: choice.yaml\ntask: more\ndescription: d\n")
    choice, more = read_tasks(tmp_path)
    assert (choice.name, more.name) == ("choice", "more")
    assert more.config["doc_to_text"] == choice.config["doc_to_text"]
    assert [task.name for task in read_tasks(tmp_path, ["more"])] == ["more"]
    with pytest.raises(UsageError, match="choose from choice, more"):
        read_tasks(tmp_path, ["other"])


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("process_docs: !function utils.run", "!function"),
        ("doc_to_text: !function utils.run", "!function"),
        ("description: !!python/object/apply:os.system ['touch ran']", "Python"),
        ("description: !!python/name:os.system", "Python"),
        ("description: [&a [1], *a]", "alias"),
        ("include: ../outside.yaml", "not in its own folder"),
        ("include: evil.yaml", "includes itself"),
        ("description: [1", "is not YAML"),
        ("description: " + "[" * 3000, "YAML|nested"),
    ],
)
def test_yaml_that_runs_or_leads_elsewhere_is_refused(
    tmp_path: Path, line: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_task(tmp_path)
    (tmp_path / "utils.py").write_text("open('ran', 'w')\ndef run(x): open('ran', 'w')\n")
    (tmp_path / "evil.yaml").write_text(f"task: evil\n{line}\n")
    with pytest.raises(UsageError, match=words) as caught:
        read_tasks(tmp_path)
    assert "evil.yaml" in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"class": "utils.Task"}, "names a Python class"),
        ({"process_results": "utils.run"}, "Python function"),
        ({"custom_dataset": "utils.run"}, "Python function"),
        ({"unsafe_code": True}, "what the model writes"),
        ({"use_prompt": "promptsource:all"}, "hub"),
        ({"doc_to_image": "image"}, "images"),
        ({"dataset_path": "squad"}, "hub or a script"),
        ({"dataset_path": "./load.py"}, "hub or a script"),
        ({"dataset_path": "pandas"}, "hub or a script"),  # which unpickles
        ({"dataset_path": "json", "dataset_name": "other"}, "hub or a script"),
        ({"dataset_kwargs": {"data_files": "a.jsonl", "trust_remote_code": True}}, "nothing else"),
        ({"dataset_kwargs": {"data_files": "https://example.com/a.jsonl"}}, "own folder"),
        ({"dataset_kwargs": {"data_files": "hf://datasets/a/b.jsonl"}}, "own folder"),
        ({"dataset_kwargs": {"data_files": "/etc/passwd"}}, "own folder"),
        ({"dataset_kwargs": {"data_files": "../a.jsonl"}}, "own folder"),
        ({"dataset_kwargs": {"data_files": "missing.jsonl"}}, "has no missing.jsonl"),
        ({"metric_list": [{"metric": "exact_match", "hf_evaluate": True}]}, "hf_evaluate"),
        ({"metric_list": [{"metric": "someone/metric"}]}, "not one of"),
        ({"metric_list": [{"metric": "acc", "aggregation": "evil"}]}, "not one of"),
        ({"filter_list": [{"name": "a", "filter": [{"function": "custom"}]}]}, "not one of"),
        ({"fewshot_config": {"sampler": "utils.Sampler"}}, "not one of"),
        ({"fewshot_config": {"process_docs": "utils.run"}}, "process_docs"),
        ({"generation_kwargs": {"stopping_criteria": "x"}}, "stopping_criteria"),
        ({"test_split": "other"}, "data_files has test"),
        ({"test_split": None}, "neither"),
        ({"unknown": 1}, "'unknown'"),
        ({"group": "all"}, "group"),
        ({"task": ["a", "b"]}, "group"),
    ],
)
def test_a_definition_that_is_more_than_data_is_refused(
    tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        read_tasks(write_task(tmp_path, **changes))
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")


def test_damaged_data_are_named(tmp_path: Path) -> None:
    for content, words in (("[1]\n", "not an object"), ('{"a": NaN}', "line 1"), ("", "empty")):
        write_task(tmp_path)
        (tmp_path / "choice.jsonl").write_text(content)
        with pytest.raises(UsageError, match=words):
            read_tasks(tmp_path)
    (tmp_path / "choice.jsonl").unlink()
    (tmp_path / "choice.jsonl").symlink_to("/etc/hostname")
    with pytest.raises(UsageError):
        read_tasks(tmp_path)


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.system('touch ran') }}",
        "{{ question.__class__ }}",
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{{ 'a' * 99999999999 }}",
        "{{ missing }}",
        "{% include 'x' %}",
        "{{ question",
    ],
)
def test_a_template_cannot_leave_its_sandbox(template: str) -> None:
    with pytest.raises(UsageError, match=r"template .* of a task fails"):
        render(template, {"question": "q"})


def test_without_lm_eval_the_extra_is_named(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "llama_onnx.exporter.evaluate.tasks.harness", raising=False)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    folder = str(write_task(tmp_path / "tasks"))
    result = CliRunner().invoke(main, ["evaluate", str(package), "--tasks", folder])
    assert result.exit_code == 1 and "[export,cpu,tasks]" in result.stderr, result.output


def test_only_the_harness_imports_lm_eval() -> None:
    source = Source(ROOT)
    using = {
        path.relative_to(ROOT).as_posix()
        for house in ("api", "exporter", "runtime", "targets")
        for path in source.files(house)
        if {name.split(".")[0] for name in source.imports(path)} & {"lm_eval", "datasets"}
    }
    assert using == {HARNESS}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "give --text, --tasks or both"),
        (["--task", "a"], "give --tasks too"),
        (["--text", "corpus"], "give --reference too"),
    ],
)
def test_options_that_need_others(
    package: Path, tmp_path: Path, options: list[str], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("corpus").write_text("the quick brown fox")
    result = CliRunner().invoke(main, ["evaluate", str(package), *options])
    assert result.exit_code == 2 and words in result.stderr
