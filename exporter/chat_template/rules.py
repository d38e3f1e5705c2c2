"""Expressions that onnxruntime-genai computes otherwise than jinja2, and equal ones that it does
not. Found by trying: its engine is documented nowhere."""

from __future__ import annotations

from typing import Protocol

from jinja2 import nodes


class Writer(Protocol):
    """What writes the parts of an expression."""

    def expression(self, node: nodes.Node) -> str:
        """Return an expression by itself."""
        ...

    def operand(self, node: nodes.Node) -> str:
        """Return an expression that may be part of a larger one."""
        ...

    def base(self, node: nodes.Node) -> str:
        """Return an expression that a name, a call or an index may follow."""
        ...


def quoted(text: str) -> str:
    """Return a text in quotes, with the escapes that both engines know."""
    for character, escape in (
        ("\\", "\\\\"),
        ("'", "\\'"),
        ("\n", "\\n"),
        ("\r", "\\r"),
        ("\t", "\\t"),
    ):
        text = text.replace(character, escape)
    return f"'{text}'"


def changed_expression(writer: Writer, node: nodes.Node) -> str | None:
    """Return an expression of the same value that onnxruntime-genai computes too; None for one that
    can stay."""
    for rule in (_search, _replacement, _emptiness, _method):
        if (found := rule(writer, node)) is not None:
            return found
    return None


def _search(writer: Writer, node: nodes.Node) -> str | None:
    """`'x' in text`: onnxruntime-genai looks into lists and objects only."""
    if not isinstance(node, nodes.Compare) or len(node.ops) != 1:
        return None
    (one,) = node.ops
    text = _text(node.expr)
    if one.op not in ("in", "notin") or not text:
        return None
    if isinstance(one.expr, (nodes.List, nodes.Tuple, nodes.Dict)):
        return None
    place, text = writer.base(one.expr), quoted(text)
    compare, sign = ("> 1", "in") if one.op == "in" else ("== 1", "not in")
    found = f"{place}.split({text})|length {compare}"
    return f"(({found}) if {place} is string else ({text} {sign} {place}))"


def _replacement(writer: Writer, node: nodes.Node) -> str | None:
    """`replace`, as a method and as a filter."""
    if isinstance(node, nodes.Call) and isinstance(node.node, nodes.Getattr):
        name, base = node.node.attr, node.node.node
    elif isinstance(node, nodes.Filter) and node.node is not None:
        name, base = node.name, node.node
    else:
        return None
    if name != "replace" or len(node.args) != 2 or node.kwargs:
        return None
    old, new = node.args
    text = _text(old)
    if not text:
        return None
    return f"({writer.base(base)}.split({quoted(text)})|join({writer.expression(new)}))"


def _emptiness(writer: Writer, node: nodes.Node) -> str | None:
    """`tools is none`: transformers passes None, onnxruntime-genai nothing."""
    inverted = isinstance(node, nodes.Not)
    test = node.node if isinstance(node, nodes.Not) else node
    if not isinstance(test, nodes.Test) or test.name != "none":
        return None
    if not isinstance(test.node, nodes.Name) or test.node.name not in ("tools", "documents"):
        return None
    name = test.node.name
    if inverted:
        return f"({name} is defined and {name} is not none)"
    return f"({name} is not defined or {name} is none)"


def _method(writer: Writer, node: nodes.Node) -> str | None:
    """Filters that are methods there, and the other way round."""
    if isinstance(node, nodes.Filter) and node.node is not None and not node.args:
        base = node.node
        if node.name == "capitalize" or (node.name == "title" and _is_role(base)):
            return f"{writer.base(base)}.{node.name}()"
        if node.name == "first":
            return f"{writer.base(base)}[0]"
    if isinstance(node, nodes.Call) and isinstance(node.node, nodes.Getattr):
        method = node.node
        if method.attr == "lower" and not node.args:
            return f"({writer.operand(method.node)}|lower)"
    return None


def _is_role(node: nodes.Node) -> bool:
    if isinstance(node, nodes.Getattr):
        return node.attr == "role"
    return isinstance(node, nodes.Getitem) and _text(node.arg) == "role"


def _text(node: nodes.Node) -> str | None:
    """Return the text of a constant."""
    value = node.value if isinstance(node, nodes.Const) else None
    return value if isinstance(value, str) else None
