"""Read a YAML file of a stranger as data: no tags but YAML's own, no aliases, no code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llama_onnx.targets.errors import UsageError
from llama_onnx.targets.folder_files import read_inside

_MOST_BYTES = 1 << 20


def read_yaml(folder: Path, name: str) -> tuple[bytes, dict[str, Any]]:
    """Return the content of the file `name` in `folder` and its mapping.

    Raises `UsageError` for a file that is not YAML, would run code, or is not a mapping.
    """
    import yaml

    class Loader(yaml.SafeLoader):  # type: ignore[misc]  # yaml has no types
        """YAML's own types alone."""

        def compose_node(self, parent: Any, index: Any) -> Any:
            # A few lines of aliases stand for more values than memory holds.
            if self.check_event(yaml.events.AliasEvent):
                raise UsageError(f"{path} has an alias (*name): write the value out.")
            return super().compose_node(parent, index)

    def refuse(_loader: Any, _suffix: Any, node: Any) -> Any:
        raise UsageError(
            f"{path}: line {node.start_mark.line + 1} has the tag {node.tag[:60]}, which runs "
            "Python code or builds its objects: write the value itself."
        )

    path = folder / name
    yaml.add_multi_constructor("!", refuse, Loader)
    yaml.add_multi_constructor("tag:yaml.org,2002:python/", refuse, Loader)
    content = read_inside(folder, name, UsageError, max_bytes=_MOST_BYTES)
    try:
        value = yaml.load(content, Loader)
    except RecursionError:
        raise UsageError(f"{path} is nested too deeply: make it flatter.") from None
    except (yaml.YAMLError, ValueError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())[:200].rstrip(".")
        raise UsageError(f"{path} is not YAML: {reason}.") from None
    if not isinstance(value, dict):
        raise UsageError(f"{path} is not a task: it must be a mapping.")
    return content, value
