"""Writes a chat template again, in the part of the language that onnxruntime-genai reads alike.

Each tag is on a line of its own and cuts the white space on both sides; what the prompt has of it
is in quotes. So nothing depends on `trim_blocks` and `lstrip_blocks`, which transformers sets and
onnxruntime-genai does not have, nor on line ends, comments or escapes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from jinja2 import nodes

from llama_onnx.exporter.chat_template.rules import changed_expression, quoted
from llama_onnx.runtime.chat_template.render import parse_template


class InexpressibleError(Exception):
    """The template has a construct that cannot be written again."""


def rewrite(text: str) -> str:
    """Return `text` written for onnxruntime-genai; `text` itself if there is nothing to change.

    Raises `TemplateError` if it cannot be read, `InexpressibleError` for rare constructs.
    """
    written = _Writer(rules=True).template(parse_template(text))
    literal = parse_template(text, as_written=True)
    if _is_plain(text) and written == _Writer(rules=False).template(literal):
        return text
    return written


def _is_plain(text: str) -> bool:
    """Return whether the text has none of what is read in another way but looks the same here."""
    odd = ("\r", "{% raw", "{%- raw", "\\x", "\\u", "\\U", "\\N", "\\0")
    return not any(mark in text for mark in odd)


class _Writer:
    """Writes nodes as text. With `rules`, expressions that onnxruntime-genai computes otherwise
    are replaced by equal ones."""

    def __init__(self, *, rules: bool) -> None:
        self._rules = rules
        self._lines: list[str] = []

    def template(self, tree: nodes.Template) -> str:
        """Return the whole template."""
        self._body(tree.body, 0)
        return "\n".join(self._lines)

    def _tag(self, depth: int, content: str) -> None:
        self._lines.append(f"{'    ' * depth}{{%- {content} -%}}")

    def _print(self, depth: int, content: str) -> None:
        self._lines.append(f"{'    ' * depth}{{{{- {content} -}}}}")

    def _body(self, body: Iterable[nodes.Node], depth: int) -> None:
        for node in body:
            write = _STATEMENTS.get(type(node))
            if write is None:
                raise InexpressibleError(type(node).__name__)
            write(self, node, depth)

    def _output(self, node: nodes.Output, depth: int) -> None:
        for part in node.nodes:
            if isinstance(part, nodes.TemplateData):
                if part.data:
                    self._print(depth, quoted(part.data))
            else:
                self._print(depth, self.expression(part))

    def _for(self, node: nodes.For, depth: int) -> None:
        test = f" if {self.expression(node.test)}" if node.test is not None else ""
        again = " recursive" if node.recursive else ""
        self._tag(depth, f"for {_target(node.target)} in {self.expression(node.iter)}{test}{again}")
        self._body(node.body, depth + 1)
        if node.else_:
            self._tag(depth, "else")
            self._body(node.else_, depth + 1)
        self._tag(depth, "endfor")

    def _if(self, node: nodes.If, depth: int) -> None:
        for word, branch in (("if", node), *(("elif", other) for other in node.elif_)):
            self._tag(depth, f"{word} {self.expression(branch.test)}")
            self._body(branch.body, depth + 1)
        if node.else_:
            self._tag(depth, "else")
            self._body(node.else_, depth + 1)
        self._tag(depth, "endif")

    def _set(self, node: nodes.Assign, depth: int) -> None:
        self._tag(depth, f"set {_target(node.target)} = {self.expression(node.node)}")

    def _set_block(self, node: nodes.AssignBlock, depth: int) -> None:
        if node.filter is not None:
            raise InexpressibleError("a filter of a block")
        self._tag(depth, f"set {_target(node.target)}")
        self._body(node.body, depth + 1)
        self._tag(depth, "endset")

    def _macro(self, node: nodes.Macro, depth: int) -> None:
        plain = len(node.args) - len(node.defaults)
        defaults = [""] * plain + [f"={self.expression(value)}" for value in node.defaults]
        names = (arg.name + default for arg, default in zip(node.args, defaults, strict=True))
        self._tag(depth, f"macro {node.name}({', '.join(names)})")
        self._body(node.body, depth + 1)
        self._tag(depth, "endmacro")

    def _call_block(self, node: nodes.CallBlock, depth: int) -> None:
        if not isinstance(node.call.node, nodes.ExtensionAttribute):
            raise InexpressibleError("call")
        self._tag(depth, "generation")
        self._body(node.body, depth + 1)
        self._tag(depth, "endgeneration")

    def _filter_block(self, node: nodes.FilterBlock, depth: int) -> None:
        self._tag(depth, f"filter {self._filter_name(node.filter)}")
        self._body(node.body, depth + 1)
        self._tag(depth, "endfilter")

    def _break(self, node: nodes.Node, depth: int) -> None:
        self._tag(depth, type(node).__name__.lower())

    def expression(self, node: nodes.Node) -> str:
        """Return an expression."""
        changed = changed_expression(self, node) if self._rules else None
        if changed is not None:
            return changed
        write = _EXPRESSIONS.get(type(node))
        if write is None:
            raise InexpressibleError(type(node).__name__)
        return write(self, node)

    def operand(self, node: nodes.Node) -> str:
        """Return an expression that may be part of a larger one."""
        text = self.expression(node)
        return text if isinstance(node, _SIMPLE) or _is_closed(text) else f"({text})"

    def base(self, node: nodes.Node) -> str:
        """Return an expression that a name, a call or an index may follow."""
        text = self.operand(node)
        return f"({text})" if isinstance(node, nodes.Filter) and not _is_closed(text) else text

    def left(self, node: nodes.BinExpr) -> str:
        """Return the left side of an operator: the same operator again needs no parentheses."""
        same = type(node.left) is type(node) and isinstance(node, (nodes.Add, nodes.And, nodes.Or))
        return self.expression(node.left) if same else self.operand(node.left)

    def _arguments(self, node: Any) -> str:
        if node.dyn_args is not None or node.dyn_kwargs is not None:
            raise InexpressibleError("arguments from a list")
        named = (f"{one.key}={self.expression(one.value)}" for one in node.kwargs)
        return ", ".join([*(self.expression(one) for one in node.args), *named])

    def _filter_name(self, node: nodes.Filter | nodes.Test) -> str:
        arguments = self._arguments(node)
        return f"{node.name}({arguments})" if arguments else str(node.name)

    def _const(self, node: nodes.Const) -> str:
        value = node.value
        if isinstance(value, str):
            return quoted(value)
        if value is None or isinstance(value, bool):
            return str(value).lower()
        return repr(value)

    def _concat(self, node: nodes.Concat) -> str:
        return " ~ ".join(map(self.operand, node.nodes))

    def _condition(self, node: nodes.CondExpr) -> str:
        other = f" else {self.operand(node.expr2)}" if node.expr2 is not None else ""
        return f"({self.operand(node.expr1)} if {self.operand(node.test)}{other})"

    def _compare(self, node: nodes.Compare) -> str:
        rest = (f" {_COMPARISONS[one.op]} {self.operand(one.expr)}" for one in node.ops)
        return self.operand(node.expr) + "".join(rest)

    def _not(self, node: nodes.Not) -> str:
        if isinstance(node.node, nodes.Test):
            return f"{self.operand(node.node.node)} is not {self._filter_name(node.node)}"
        return f"not {self.operand(node.node)}"

    def _test(self, node: nodes.Test) -> str:
        return f"{self.operand(node.node)} is {self._filter_name(node)}"

    def _filter(self, node: nodes.Filter) -> str:
        if node.node is None:
            raise InexpressibleError("a filter of a block")
        return f"{self.operand(node.node)}|{self._filter_name(node)}"

    def _item(self, node: nodes.Getitem) -> str:
        if not isinstance(node.arg, nodes.Slice):
            return f"{self.base(node.node)}[{self.expression(node.arg)}]"
        first, last, step = (
            self.expression(part) if part is not None else ""
            for part in (node.arg.start, node.arg.stop, node.arg.step)
        )
        return f"{self.base(node.node)}[{first}:{last}{':' + step if step else ''}]"

    def _items(self, node: nodes.List | nodes.Tuple) -> str:
        inside = ", ".join(map(self.expression, node.items))
        if isinstance(node, nodes.List):
            return f"[{inside}]"
        return f"({inside},)" if len(node.items) == 1 else f"({inside})"

    def _dict(self, node: nodes.Dict) -> str:
        pairs = (f"{self.expression(one.key)}: {self.expression(one.value)}" for one in node.items)
        return f"{{{', '.join(pairs)}}}"


def _binary(sign: str) -> Callable[[_Writer, Any], str]:
    return lambda self, node: f"{self.left(node)} {sign} {self.operand(node.right)}"


_COMPARISONS = {
    "eq": "==",
    "ne": "!=",
    "gt": ">",
    "gteq": ">=",
    "lt": "<",
    "lteq": "<=",
    "in": "in",
    "notin": "not in",
}
_SIMPLE = (
    *(nodes.Const, nodes.Name, nodes.Getattr, nodes.Getitem, nodes.Call, nodes.List),
    *(nodes.Dict, nodes.Filter),
)
_STATEMENTS: dict[type[nodes.Node], Callable[[_Writer, Any, int], None]] = {
    nodes.Output: _Writer._output,
    nodes.For: _Writer._for,
    nodes.If: _Writer._if,
    nodes.Assign: _Writer._set,
    nodes.AssignBlock: _Writer._set_block,
    nodes.Macro: _Writer._macro,
    nodes.CallBlock: _Writer._call_block,
    nodes.FilterBlock: _Writer._filter_block,
    nodes.Break: _Writer._break,
    nodes.Continue: _Writer._break,
}
_EXPRESSIONS: dict[type[nodes.Node], Callable[[_Writer, Any], str]] = {
    nodes.Const: _Writer._const,
    nodes.Name: lambda _, node: str(node.name),
    nodes.Concat: _Writer._concat,
    nodes.CondExpr: _Writer._condition,
    nodes.Compare: _Writer._compare,
    nodes.Not: _Writer._not,
    nodes.Test: _Writer._test,
    nodes.Filter: _Writer._filter,
    nodes.Getattr: lambda self, node: f"{self.base(node.node)}.{node.attr}",
    nodes.Getitem: _Writer._item,
    nodes.Call: lambda self, node: f"{self.base(node.node)}({self._arguments(node)})",
    nodes.List: _Writer._items,
    nodes.Tuple: _Writer._items,
    nodes.Dict: _Writer._dict,
    nodes.Neg: lambda self, node: f"-{self.operand(node.node)}",
    nodes.Pos: lambda self, node: f"+{self.operand(node.node)}",
    nodes.And: _binary("and"),
    nodes.Or: _binary("or"),
    nodes.Add: _binary("+"),
    nodes.Sub: _binary("-"),
    nodes.Mul: _binary("*"),
    nodes.Div: _binary("/"),
    nodes.FloorDiv: _binary("//"),
    nodes.Mod: _binary("%"),
    nodes.Pow: _binary("**"),
}


def _target(node: nodes.Node) -> str:
    if isinstance(node, nodes.Name):
        return str(node.name)
    if isinstance(node, nodes.NSRef):
        return f"{node.name}.{node.attr}"
    if isinstance(node, nodes.Tuple):
        return ", ".join(map(_target, node.items))
    raise InexpressibleError(type(node).__name__)


def _is_closed(text: str) -> bool:
    """Return whether `text` begins with a parenthesis that closes at its end."""
    if not text.startswith("("):
        return False
    depth, quoted, position = 0, False, 0
    while position < len(text):
        character = text[position]
        if character == "\\":
            position += 1
        elif character == "'":
            quoted = not quoted
        elif not quoted and character in "()":
            depth += 1 if character == "(" else -1
            if depth == 0:
                return position == len(text) - 1
        position += 1
    return False
