"""Chat templates that never end, or ask for more memory than there is. `python -m
tests.support.hostile_templates` renders each and prints seconds, memory and what came of it."""

from __future__ import annotations

import json
import sys
import time

from tests.support.peak import peak_memory

_LOOP = "{% for i in range(100000) %}"
_DOUBLE = "{% set ns = namespace(x='ab') %}" + _LOOP + "{% set ns.x = "

HOSTILE = {
    # Loops without end, and calls without end.
    "nested loops": _LOOP * 3 + "{% endfor %}" * 3,
    "nested loops with output": _LOOP * 3 + "x" + "{% endfor %}" * 3,
    "loop in a loop's filter": "{% for i in range(99999) if range(99999)|sum > i %}{% endfor %}",
    "filtered loops": "{% for i in range(99999) if false %}{% endfor %}" * 2000,
    "nested filtered loops": _LOOP + "{% for j in range(99999) if j < 0 %}{% endfor %}{% endfor %}",
    "macro that calls itself": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "macro that calls itself twice": "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}"
    "{% endmacro %}{{ f(60) }}",
    "two macros": "{% macro f() %}{{ g() }}{% endmacro %}{% macro g() %}{{ f() }}{% endmacro %}"
    "{{ f() }}",
    "recursive loop": "{% set l = [1] %}{% for i in l recursive %}{{ loop(l) }}{% endfor %}",
    "recursive loop that branches": "{% for i in [1,2] recursive %}{{ loop([1,2]) }}{% endfor %}",
    "block that calls itself": "{% block b %}{{ self.b() }}{% endblock %}",
    "caller that calls itself": "{% macro f() %}{{ caller() }}{{ caller() }}{% endmacro %}"
    "{% macro g(n) %}{% if n %}{% call f() %}{{ g(n-1) }}{% endcall %}{% endif %}{% endmacro %}"
    "{{ g(80) }}",
    "sums in a loop": _LOOP + "{% set x = range(100000)|sum %}{% endfor %}",
    "sorting in a loop": "{% set l = range(40000)|list %}"
    + _LOOP
    + "{% set x = l|sort %}{% endfor %}",
    "generators of generators": "{% set l = range(40000)|list %}"
    + _LOOP
    + "{{ l|map('string')|map('length')|map('string')|list|length }}{% endfor %}",
    "sum of lists": "{{ (range(40000)|map('string')|map('list')|sum(start=[]))|length }}",
    "sum of texts": "{{ (['abcdefgh' * 100] * 40000)|sum(start='') }}",
    "searching in a loop": "{% set s = 'a' * 900000 %}{% set t = 'a' * 400000 ~ 'b' %}"
    + _LOOP
    + "{% set x = t in s %}{% endfor %}",
    "comparing in a loop": "{% set s = 'a' * 900000 %}{% set t = 'a' * 900000 %}"
    + _LOOP
    + "{% set x = s == t %}{% endfor %}",
    # Texts that grow.
    "doubling by ~": _DOUBLE + "ns.x ~ ns.x %}{% endfor %}{{ ns.x }}",
    "doubling by +": _DOUBLE + "ns.x + ns.x %}{% endfor %}{{ ns.x }}",
    "doubling by join": _DOUBLE + "[ns.x, ns.x]|join %}{% endfor %}",
    "doubling by join's method": _DOUBLE + "ns.x.join(['', '', '']) %}{% endfor %}",
    "doubling by %": _DOUBLE + "'%s%s' % (ns.x, ns.x) %}{% endfor %}",
    "doubling by format": _DOUBLE + "'{0}{0}'.format(ns.x) %}{% endfor %}",
    "doubling by the filter format": _DOUBLE + "'%s%s'|format(ns.x, ns.x) %}{% endfor %}",
    "doubling by replace": _DOUBLE + "ns.x.replace('a', 'ab' ~ ns.x) %}{% endfor %}",
    "doubling by a block": "{% set x = 'ab' %}" + "{% set x %}{{ x }}{{ x }}{% endset %}" * 60,
    "doubling by a macro": "{% macro f(x) %}{{ x }}{{ x }}{% endmacro %}"
    "{% set ns = namespace(x='a') %}" + _LOOP + "{% set ns.x = f(ns.x) %}{% endfor %}",
    "doubling by escape": _DOUBLE + "(ns.x ~ '<&')|escape|string ~ ns.x %}{% endfor %}",
    "times": "{{ 'a' * 10**9 }}",
    "times from the left": "{{ 10**9 * 'a' }}",
    "times a list": "{{ [1] * 10**9 }}",
    "times nested": "{{ ([[1] * 40000] * 40000)|string }}",
    "power": "{{ 10 ** (10 ** 8) }}",
    "product": "{% set ns = namespace(x=10**9000) %}"
    + _LOOP
    + "{% set ns.x = ns.x * ns.x %}{% endfor %}",
    "center": "{{ 'a'|center(10**9) }}",
    "ljust": "{{ 'a'.ljust(10**9) }}",
    "rjust": "{{ 'a'.rjust(10**9, 'é') }}",
    "zfill": "{{ 'a'.zfill(10**9) }}",
    "expandtabs": "{{ ('\\t' * 9000).expandtabs(10**6) }}",
    "wide %": "{{ '%1000000000d' % 1 }}",
    "wide % by star": "{{ '%*d' % (10**9, 1) }}",
    "precise %": "{{ '%.1000000000f' % 1 }}",
    "wide format": "{{ '{:1000000000}'.format(1) }}",
    "wide format from a value": "{{ '{:{}}'.format(1, 10**9) }}",
    "wide format of a map": "{{ '{x:>1000000000}'.format_map({'x': 1}) }}",
    "wide filter format": "{{ '%1000000000d'|format(1) }}",
    "wide by a constant filter": "{{ 'a'|indent(10**9, true) }}{{ 'a'|center(1000000000) }}",
    "indent": "{{ ('a\\n' * 90000)|indent(9999) }}",
    "indent by text": "{{ ('a\\n' * 90000)|indent('b' * 90000) }}",
    "batch": "{{ [1]|batch(10**9, 'x')|list }}",
    "slice": "{{ [1]|slice(10**9)|list }}",
    "map with a width": "{{ ['a']|map('center', 10**9)|list }}",
    "replace": "{{ ('a' * 100000)|replace('a', 'b' * 100000) }}",
    "replace nothing": "{{ ('a' * 100000).replace('', 'b' * 100000) }}",
    "replace all at once": "{{ ('a' * 100000)|replace('', 'b' * 100000) }}",
    "join by a long text": "{{ range(40000)|map('string')|join('b' * 90000) }}",
    "join letters": "{{ ('b' * 90000).join('a' * 90000) }}",
    "translate": "{{ ('a' * 90000).translate({97: 'b' * 90000}) }}",
    "to_bytes": "{{ (1).to_bytes(10**9, 'big') }}",
    "strftime_now": "{{ strftime_now('%999999999Y') }}",
    "strftime_now of a long text": "{{ strftime_now('%c' * 100000) }}",
    "tojson with an indent": "{{ {'a': [1]}|tojson(indent=10**9) }}",
    "tojson with separators": "{{ range(40000)|list|tojson(separators=('a' * 90000, 'b')) }}",
    "urlize": "{{ ('http://a.' * 100000)|urlize }}",
    "striptags": "{{ ('<!-->' * 150000)|striptags }}",
    "wordwrap": "{{ ('a ' * 400000)|wordwrap(1) }}",
    "xmlattr": "{{ {'a' * 900000: 1}|xmlattr }}",
    "lists of one list": "{% set ns = namespace(x=[1]) %}"
    + _LOOP
    + "{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x }}",
    "tuples of one tuple": "{% set ns = namespace(x=(1,)) %}"
    + _LOOP
    + "{% set ns.x = (ns.x, ns.x) %}{% endfor %}{{ {ns.x: 1} }}",
    "deep lists": "{% set ns = namespace(x=[]) %}"
    + _LOOP
    + "{% set ns.x = [ns.x] %}{% endfor %}{{ ns.x|tojson }}",
    "dictionaries of one dictionary": "{% set ns = namespace(x={}) %}"
    + _LOOP
    + "{% set ns.x = {'a': ns.x, 'b': ns.x} %}{% endfor %}{{ ns.x|tojson }}",
    "dict calls": "{% set ns = namespace(x={}) %}"
    + _LOOP
    + "{% set ns.x = dict(a=ns.x, b=ns.x) %}{% endfor %}{{ ns.x }}",
    "namespaces of one namespace": "{% set ns = namespace(x=1) %}"
    + _LOOP
    + "{% set ns.x = namespace(a=ns.x, b=ns.x) %}{% endfor %}{{ ns.x }}",
    "namespace filled later": "{% set a = namespace(x=1) %}{% set b = namespace(x=1) %}"
    "{% set c = namespace(x=1) %}{% set l = [a] * 9000 %}{% set a.x = [b] * 9000 %}"
    "{% set b.x = [c] * 9000 %}{{ l }}",
    "comparing wide lists": "{% set ns = namespace(x=[1], y=[1]) %}"
    + _LOOP
    + "{% set ns.x = [ns.x, ns.x] %}{% set ns.y = [ns.y, ns.y] %}{{ ns.x == ns.y }}{% endfor %}",
    "many long texts": "{% set b = 'a' * 900000 %}"
    + "".join(f"{{% set a{i} = b ~ {i} %}}" for i in range(3000)),
    "a buffer of long texts": "{% set b = 'a' * 900000 %}{% set x %}"
    + _LOOP
    + "{{ b ~ i }}{% endfor %}{% endset %}",
    "a buffer of one text": "{% set b = 'a' * 900000 %}{% set x %}"
    + _LOOP
    + "{{ b }}{% endfor %}{% endset %}",
    "output of one text": "{% set b = 'a' * 900000 %}" + _LOOP + "{{ b }}{% endfor %}",
    "slices": "{% set l = range(40000)|list %}{% set ns = namespace(x=[]) %}"
    + _LOOP
    + "{% set ns.x = [l[0:], ns.x] %}{% endfor %}",
    "many slices": "{% set l = range(40000)|list %}"
    + "".join(f"{{% set a{i} = l[0:] %}}" for i in range(4000)),
    "splits": "{% set s = 'é,' * 20000 %}"
    + "".join(f"{{% set a{i} = s.split(',') %}}" for i in range(3000)),
    "range as a list": "{{ range(10**9)|list }}",
    "cycler": "{{ cycler(*range(90000)) }}",
    "lipsum": "{{ lipsum(10**6, max=10**6) }}",
    # Sources that are hard to read.
    "parentheses": "{{ " + "(" * 30000 + "1" + ")" * 30000 + " }}",
    "brackets": "{{ " + "[" * 30000 + "]" * 30000 + " }}",
    "nots": "{{ " + "not " * 30000 + "1 }}",
    "minuses": "{{ " + "-" * 100000 + "1 }}",
    "a long sum": "{{ 1" + "+1" * 50000 + " }}",
    "a long chain": "{{ a" + ".b" * 50000 + " }}",
    "a chain of filters": "{{ 'a'" + "|upper" * 18000 + " }}",
    "a chain of calls": "{{ a" + "()" * 50000 + " }}",
    "a chain of ifs": "{{ 1" + " if 1 else 2" * 9000 + " }}",
    "nested ifs": "{% if 1 %}" * 5000 + "{% endif %}" * 5000,
    "nested fors": "{% for i in [1] %}" * 4000 + "{% endfor %}" * 4000,
    "many outputs": "{{x}}" * 26000,
    "many elifs": "{% if a %}" + "{% elif b %}" * 9000 + "{% endif %}",
    "open comments": "{#" * 60000,
    "open tags": "{%-" * 40000,
    "minus signs and spaces": "{{ 1 -}}" + " " * 60000 + "{{ 1 -}}" + "\n " * 30000,
    "ten megabytes": "{{ x }}\n" * 1_250_000,
    # Doors out of the sandbox: refused or empty, never run.
    "subclasses": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals of a function": "{{ raise_exception.__globals__ }}",
    "format to a class": "{{ '{0.__class__.__mro__}'.format(1) }}",
    "attr": "{{ ''|attr('__class__') }}",
    "include": "{% include '/etc/passwd' %}",
    "import": "{% import '/etc/passwd' as x %}",
    "extends": "{% extends '/etc/passwd' %}",
}

MESSAGES = [{"role": "user", "content": "hi"}]


def main() -> None:
    """Render each template; print a line of JSON: name, processor time, peak memory in MiB, result.

    The argument is the limit of processor time, in place of the real one.
    """
    from llama_onnx.runtime.chat_template import meter
    from llama_onnx.runtime.chat_template.render import ChatTemplate, RejectedError, TemplateError

    if len(sys.argv) > 1:
        meter.MOST_SECONDS = float(sys.argv[1])
    for name, text in HOSTILE.items():
        started = time.process_time()
        try:
            found = f"{len(ChatTemplate(text, {}).render(MESSAGES))} characters"
        except (TemplateError, RejectedError) as error:
            found = f"{type(error).__name__}: {error}"
        seconds = round(time.process_time() - started, 2)
        print(json.dumps([name, seconds, peak_memory() >> 20, found]), flush=True)


if __name__ == "__main__":
    main()
