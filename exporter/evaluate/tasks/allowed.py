"""What a task definition may say: all of it data, on which lm-eval runs nothing of a stranger."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llama_onnx.targets.errors import UsageError
from llama_onnx.targets.printable import shown

_CODE = {
    "class": "names a Python class",
    "custom_dataset": "names a Python function",
    "doc_to_audio": "reads audio",
    "doc_to_image": "reads images",
    "process_docs": "names a Python function",
    "process_results": "names a Python function",
    "unsafe_code": "marks a task that runs what the model writes",
    "use_prompt": "reads prompts from the hub",
}
_KEYS = frozenset(
    {
        "dataset_kwargs",
        "dataset_name",
        "dataset_path",
        "description",
        "doc_to_choice",
        "doc_to_target",
        "doc_to_text",
        "fewshot_config",
        "fewshot_delimiter",
        "fewshot_split",
        "filter_list",
        "gen_prefix",
        "generation_kwargs",
        "metadata",
        "metric_list",
        "num_fewshot",
        "output_type",
        "repeats",
        "should_decontaminate",
        "tag",
        "target_delimiter",
        "task",
        "task_alias",
        "test_split",
        "training_split",
        "validation_split",
    }
)
_FEWSHOT = frozenset(
    {
        "doc_to_choice",
        "doc_to_target",
        "doc_to_text",
        "fewshot_delimiter",
        "fewshot_indices",
        "gen_prefix",
        "sampler",
        "samples",
        "split",
        "target_delimiter",
    }
)
_SAMPLERS = ("default", "first_n")
_METRIC = frozenset(
    {
        "aggregation",
        "higher_is_better",
        "ignore_case",
        "ignore_numbers",
        "ignore_punctuation",
        "metric",
        "regexes_to_ignore",
    }
)
_METRICS = frozenset(
    {
        "acc",
        "acc_bytes",
        "acc_mutual_info",
        "acc_norm",
        "bits_per_byte",
        "bleu",
        "brier_score",
        "byte_perplexity",
        "chrf",
        "exact_match",
        "f1",
        "mcc",
        "perplexity",
        "ter",
        "word_perplexity",
    }
)
_AGGREGATIONS = frozenset(
    {
        "bits_per_byte",
        "bleu",
        "brier_score",
        "chrf",
        "f1",
        "matthews_corrcoef",
        "mean",
        "median",
        "nanmean",
        "perplexity",
        "ter",
        "weighted_perplexity",
    }
)
_FILTERS = frozenset(
    {
        "lowercase",
        "majority_vote",
        "map",
        "multi_choice_regex",
        "regex",
        "remove_whitespace",
        "take_first",
        "take_first_k",
        "uppercase",
    }
)
_GENERATION = frozenset({"do_sample", "max_gen_toks", "temperature", "top_k", "top_p", "until"})


def check_definition(path: Path, config: dict[str, Any]) -> None:
    """Raise `UsageError` for what is not on the lists; drop what has no effect here."""
    if "group" in config or isinstance(config.get("task"), list):
        raise UsageError(f"{path} is a group of tasks, which `evaluate` does not read: remove it.")
    if not isinstance(config["task"], str) or not config["task"]:
        raise UsageError(f"{path}: the name of the task must be a text.")
    for key, reason in _CODE.items():
        if config.get(key):
            raise UsageError(f"{path} has {key}, which {reason}: `evaluate` reads data alone.")
        config.pop(key, None)
    config.pop("tag", None)
    if config.pop("should_decontaminate", False):
        raise UsageError(f"{path} asks for decontamination, which needs other data: remove it.")
    _only(path, "the key", config, _KEYS)
    _check_dataset(path, config)
    for metric in _mappings(path, "metric_list", config.get("metric_list")):
        _only(path, "in metric_list", metric, _METRIC)
        _one_of(path, "the metric", metric.get("metric"), _METRICS)
        if "aggregation" in metric:
            _one_of(path, "the aggregation", metric["aggregation"], _AGGREGATIONS)
    for one in _mappings(path, "filter_list", config.get("filter_list")):
        for function in _mappings(path, "filter", one.get("filter")):
            _one_of(path, "the filter", function.get("function"), _FILTERS)
    for fewshot in _mappings(path, "fewshot_config", [config.get("fewshot_config") or {}]):
        _only(path, "in fewshot_config", fewshot, _FEWSHOT)
        _one_of(path, "the sampler", fewshot.get("sampler", "default"), _SAMPLERS)
    for generation in _mappings(path, "generation_kwargs", [config.get("generation_kwargs") or {}]):
        _only(path, "in generation_kwargs", generation, _GENERATION)


def _check_dataset(path: Path, config: Mapping[str, Any]) -> None:
    source = config.get("dataset_path")
    if source != "json" or config.get("dataset_name"):
        raise UsageError(
            f"{path} takes its data from {shown(source)}, which is on the hub or a script: write "
            "`dataset_path: json`, and the files in its folder as `data_files`."
        )
    given = config.get("dataset_kwargs")
    if not isinstance(given, dict) or list(given) != ["data_files"]:
        raise UsageError(f"{path}: dataset_kwargs must have data_files and nothing else.")


def _only(path: Path, where: str, given: Mapping[Any, Any], allowed: frozenset[str]) -> None:
    for key in given:
        if key not in allowed:
            raise UsageError(
                f"{path} has {where} {shown(key)}, which `evaluate` does not read: remove it."
            )


def _one_of(path: Path, what: str, value: Any, allowed: Any) -> None:
    if not isinstance(value, str) or value not in allowed:
        raise UsageError(
            f"{path}: {what} {shown(value)} is not one of {', '.join(sorted(allowed))}."
        )


def _mappings(path: Path, key: str, value: Any) -> list[dict[str, Any]]:
    value = [] if value is None else value
    if not isinstance(value, list) or not all(isinstance(one, dict) for one in value):
        raise UsageError(f"{path}: {key} must be made of mappings.")
    return value
