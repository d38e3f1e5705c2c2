"""Chat templates for the check of the C library."""

from __future__ import annotations

_DOUBLE = "{% set ns = namespace(s='ab', t='c') %}{% for i in range(200) %}"
_CALLS = "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}"
_RECURSIVE = "{% for x in [1, 2] recursive %}{{ loop([1, 2]) }}{% endfor %}"
_ALIAS = "{% macro f(x) %}{{ x(x) }}{% endmacro %}{{ f(f) }}"
_COMMENT = "{# " + "x" * 60_000 + " #}"
_SPACES = "{{ 1 -}}" + " " * 60_000
_SPLIT = "{{ 'abc'.split('') }}"
_RANGES = "{% for i in range(1000000000) %}{% endfor %}"

KILLING = (_CALLS, _RECURSIVE, _ALIAS, _COMMENT, _SPACES, _RANGES)
"""Templates with which onnxruntime-genai 0.18 overflows its stack or does not end."""

KILLING_WHEN_OPENED = {
    "a name of 30,000 letters": "{{ " + "a" * 30_000 + " }}",
    "an attribute of 30,000 letters": "{{ a." + "b" * 30_000 + " }}",
    "30,000 spaces": "{{ 1 -}}" + " " * 30_000 + "x",
    "30,000 lines": "x" + "\n" * 30_000 + "{%- if a %}{% endif %}",
    "a comment of 60,000 characters": "{# " + "ab " * 20_000 + " #}",
    "a comment without an end": "{# " + "ab " * 20_000,
    "a tag of 20,000 signs": "{{ 1" + "+1" * 10_000 + " }}",
    "a text without an end": "{{ '" + "ab " * 20_000,
    "3,000 blocks inside one another": "{% if a %}" * 3000 + "{% endif %}" * 3000,
    "200 blocks inside one another": "{%- for a in b %}" * 200 + "{% endfor %}" * 200,
    "3,000 blocks": "{% if a %}{% endif %}" * 3000,
}
"""Templates that onnxruntime-genai 0.18 does not survive, or not within minutes, when it opens the
tokenizer."""

GROWS, LONG = "grow faster", "takes too long"

HARMFUL = {
    "a macro that calls itself": (_CALLS, "which calls itself"),
    "macros that call each other": (
        "{% macro f() %}{{ g() }}{% endmacro %}{% macro g() %}{{ f() }}{% endmacro %}{{ f() }}",
        "which calls itself",
    ),
    "a macro given to itself": (_ALIAS, "without calling it"),
    "a macro in a namespace": (
        "{% macro f(n) %}{{ n.f(n) }}{% endmacro %}{% set ns = namespace(f=f) %}{{ f(ns) }}",
        "without calling it",
    ),
    "a macro in a list": ("{% macro f() %}a{% endmacro %}{% set l = [f] %}{{ l[0]() }}", "without"),
    "loops in macros that call macros": (
        "".join(
            f"{{% macro f{i}() %}}{'{% for x in x %}' * 5}"
            + (f"{{{{ f{i - 1}() }}}}" if i else "a")
            + f"{'{% endfor %}' * 5}{{% endmacro %}}"
            for i in range(12)
        )
        + "{{ f11() }}",
        "too deeply",
    ),
    "a range that stands still": ("{{ range(10000, 0, 0) }}", "a step that may be 0"),
    "a step of 1 - 1": ("{{ range(0, 9, 1 - 1) }}", "a step that may be 0"),
    "a step of a half": ("{{ range(0, 9, 0.5) }}", "a step that may be 0"),
    "a number out of a text": ("{{ 'a' | indent('2000000000' | int) }}", "the filter 'int'"),
    "the smallest number by -1": ("{{ a % (0 - 1) }}", "divides by"),
    "a whole division by -1": ("{{ a // (0 - 1) }}", "divides by"),
    "a division by 0": ("{{ 5 / 0 }}", "divides by"),
    "a macro by its name": (
        "{% macro m(x) %}{{ [1] | map('m') | list }}{% endmacro %}{{ m(1) }}",
        "map() without attribute=",
    ),
    "a macro as a test": (
        "{% macro m(x) %}{{ [1] | select('m') | list }}{% endmacro %}{{ m(1) }}",
        "an unknown test",
    ),
    "a macro as a test of an attribute": (
        "{% macro m(x) %}{{ messages | selectattr('role', 'm') }}{% endmacro %}{{ m(1) }}",
        "an unknown test",
    ),
    "a macro with a call as its default": (
        "{% macro m(x=range(10000)) %}{{ x }}{% endmacro %}{{ m() }}",
        "a default value that is more than a value",
    ),
    "macros that double": (
        "".join(
            f"{{% macro f{i}() %}}{{{{ f{i - 1}() }}}}{{{{ f{i - 1}() }}}}{{% endmacro %}}"
            if i
            else "{% macro f0() %}a{% endmacro %}"
            for i in range(31)
        )
        + "{{ f30() }}",
        "too complicated",
    ),
    "a recursive loop": (_RECURSIVE, "recursive loop"),
    "a call block": (
        "{% macro f() %}{{ caller() }}{% endmacro %}{% call f() %}a{% endcall %}",
        "call",
    ),
    "a block": ("{% block b %}{{ self.b() }}{% endblock %}", "block"),
    "an include": ("{% include '/etc/passwd' %}", "include"),
    "an import": ("{% import 'x' as x %}", "import"),
    "a loop without end": (_RANGES, "a number above"),
    "loops in loops": ("{% for i in range(9000) %}" * 3 + "x" + "{% endfor %}" * 3, LONG),
    "loops over letters": (
        "{% for a in messages %}{% for b in a.content|list %}{% for c in messages|tojson|list %}"
        "{% for d in messages|tojson|list %}{{ d }}"
        "{% endfor %}{% endfor %}{% endfor %}{% endfor %}",
        LONG,
    ),
    "a number from a message": (
        "{% for i in range(messages[0].content|int) %}x{% endfor %}",
        "calls range()",
    ),
    "a number that grows": (
        "{% set ns = namespace(n=9) %}{% for i in range(ns.n) %}x{% endfor %}",
        "calls range()",
    ),
    "doubling by ~": (_DOUBLE + "{% set ns.s = ns.s ~ ns.s %}{% endfor %}", GROWS),
    "doubling by +": (_DOUBLE + "{% set ns.s = ns.s + 'a' + ns.s %}{% endfor %}", GROWS),
    "doubling by join": (_DOUBLE + "{% set ns.s = [ns.s, ns.s]|join(ns.s) %}{% endfor %}", GROWS),
    "doubling by replace": (
        _DOUBLE + "{% set ns.s = ns.s|replace('a', ns.s) %}{% endfor %}",
        GROWS,
    ),
    "doubling by tojson": (_DOUBLE + "{% set ns.s = [ns.s, ns.s]|tojson %}{% endfor %}", GROWS),
    "doubling in a branch": (
        _DOUBLE + "{% if i is odd %}{% set ns.s = ns.s ~ ns.s %}{% endif %}{% endfor %}",
        GROWS,
    ),
    "doubling in turn": (
        _DOUBLE + "{% set ns.s = ns.t ~ ns.t %}{% set ns.t = ns.s %}{% endfor %}",
        GROWS,
    ),
    "growing like Fibonacci": (
        _DOUBLE + "{% set u = ns.s %}{% set ns.s = ns.t %}{% set ns.t = ns.t ~ u %}{% endfor %}",
        GROWS,
    ),
    "doubling by a block": (
        "{% set s = 'ab' %}" + "{% set s %}{{ s }}{{ s }}{% endset %}" * 60,
        LONG,
    ),
    "doubling on a line": ("{% set s = 'ab' %}" + "{% set s = s ~ s %}" * 60, LONG),
    "doubling by a macro": (
        "{% macro f(x) %}{{ x }}{{ x }}{% endmacro %}"
        + _DOUBLE
        + "{% set ns.s = f(ns.s) %}{% endfor %}",
        GROWS,
    ),
    "doubling after a continue": (
        _DOUBLE + "{% set ns.s = ns.s ~ ns.s %}{% if i %}{% continue %}{% endif %}"
        "{% set ns.s = 'a' %}{% endfor %}",
        GROWS,
    ),
    "a list of lists": (
        _DOUBLE + "{% set ns.s = [ns.s] %}{% endfor %}{{ ns.s }}",
        "lists too deeply",
    ),
    "a namespace under another name": (
        _DOUBLE + "{% set q = ns %}{% set ns.s = q.s ~ q.s %}{% endfor %}",
        "without an attribute",
    ),
    "a list that contains itself": ("{% set l = [] %}{{ l.append(l) }}{{ l }}", "method 'append'"),
    "a product": ("{{ 'a' * 1000000000 }}", "multiplies"),
    "a power": ("{{ 10 ** 10 ** 8 }}", "multiplies"),
    "splitting at nothing": (_SPLIT, "calls split()"),
    "splitting at a variable": ("{% set s = '' %}{{ 'abc'.split(s) }}", "calls split()"),
    "a wide text": ("{{ 'a'|center(1000000000) }}", "a number above"),
    "a format": (
        "{{ '{:1000000000}'.format(1) }}",
        "method 'format'",
    ),
    "an unknown filter": ("{{ messages|pprint }}", "filter 'pprint'"),
    "an unknown function": ("{{ lipsum(9) }}", "function 'lipsum'"),
    "a class": ("{{ ''.__class__.mro() }}", "method 'mro'"),
    "parentheses": ("{{ " + "(" * 9000 + "1" + ")" * 9000 + " }}", "nests brackets"),
    "brackets": ("{{ " + "[" * 99 + "]" * 99 + " }}", "nests brackets"),
    "nested ifs": ("{% if a %}" * 99 + "{% endif %}" * 99, "nests blocks"),
    "a long sum": ("{{ 1" + "+1" * 9000 + " }}", "too long"),
    "a long chain": ("{{ a" + ".b" * 9000 + " }}", "too long"),
    "many tags": ("{{ x }}" * 8000, "too many tags"),
    "a long comment": (_COMMENT, "comment that is too long"),
    "many spaces": (_SPACES, "too many spaces"),
    "a long template": ("a" * 70_000, "more than 65536 bytes"),
    "a tag without end": ("{{ 'a' ", "without an end"),
    "a text without end": ("{{ 'a }}", "without an end"),
    "a comment without end": ("{# a", "without an end"),
    "a block without end": ("{% if a %}", "not closed"),
    "ends that cross": ("{% if a %}{% for b in c %}{% endif %}{% endfor %}", "not open"),
    "an empty tag": ("{{ }}", "without content"),
    "a character": ("{{ a ; b }}", "a character"),
}

HARMLESS = {
    "none": "",
    "ChatML": "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + "
    "message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "like Llama 2": "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}"
    "{% set system = false %}{% endif %}{% for m in loop_messages %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Roles!')"
    " }}{% endif %}"
    "{% if loop.index0 == 0 and system != false %}"
    "{% set content = '<<SYS>>\n' + system + '\n<</SYS>>\n\n' + m['content'] %}"
    "{% else %}{% set content = m['content'] %}{% endif %}"
    "{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}"
    "{% endfor %}",
    "like Llama 3.1": "{{- bos_token }}{%- if not date_string is defined %}"
    "{%- set date_string = strftime_now('%d %b %Y') %}{%- endif %}"
    "{%- if messages[0]['role'] == 'system' %}{%- set system = messages[0]['content']|trim %}"
    "{%- set messages = messages[1:] %}{%- else %}{%- set system = '' %}{%- endif %}"
    "{%- for t in tools %}{{- t | tojson(indent=4) }}{%- endfor %}{{- system }}"
    "{%- for message in messages %}"
    "{%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}"
    "{{- '<|h|>' + message['role'] + '<|/h|>\n\n' + message['content'] | trim + '<|eot_id|>' }}"
    "{%- elif 'tool_calls' in message %}{%- if message.tool_calls|length != 1 %}"
    "{{- raise_exception('one call') }}{%- endif %}"
    "{%- set call = message.tool_calls[0].function %}"
    "{%- for name, val in call.arguments | items %}{{- name + '=\"' + val + '\"' }}"
    "{%- if not loop.last %}{{- ', ' }}{%- endif %}{%- endfor %}"
    "{%- elif message.role == 'tool' %}{%- if message.content is mapping or message.content is "
    "iterable %}{{- message.content | tojson }}{%- else %}{{- message.content }}{%- endif %}"
    "{%- endif %}{%- endfor %}{%- if add_generation_prompt %}{{- '<|h|>assistant' }}{%- endif %}",
    "like Zephyr": "{% for message in messages %}\n"
    "{% if message['role'] == 'user' %}\n{{ '<|user|>\n' "
    "+ message['content'] + eos_token }}\n{% elif message['role'] == 'system' %}\n"
    "{{ '<|system|>\n' + message['content'] + eos_token }}\n{% endif %}\n"
    "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n"
    "{% endfor %}",
    "like Mistral": "{%- set loop_messages = messages %}{%- set users = loop_messages | "
    "selectattr('role', 'equalto', 'user') | list %}{%- set ns = namespace(index=0) %}"
    "{%- for message in loop_messages %}{%- if message.role == 'user' %}"
    "{%- if tools is not none and (message == users[-1]) %}{%- for tool in tools %}"
    "{%- for key, val in tool.items() if key != 'return' %}{{- key + val }}{%- endfor %}"
    "{%- endfor %}{%- endif %}{%- set ns.index = ns.index + 1 %}"
    "{{- '[INST] ' + message['content'] + '[/INST]' }}{%- else %}"
    "{{- ' ' + message['content']|trim + eos_token }}{%- endif %}{%- endfor %}",
    "like a DeepSeek distill": "{% set ns = namespace(is_first=false, system='') %}"
    "{%- for message in messages %}{%- if message['role'] == 'system' %}"
    "{% set ns.system = ns.system + message['content'] %}{%- endif %}{%- endfor %}{{ bos_token }}"
    "{{ ns.system }}{%- for message in messages %}{%- if message['role'] == 'assistant' %}"
    "{% set content = message['content'] %}{% if '</think>' in content %}"
    "{% set content = content.split('</think>')[-1] %}{% endif %}{{ content }}{%- endif %}"
    "{%- endfor -%}{% if add_generation_prompt %}{{ '<think>\n' }}{% endif %}",
    "macros for tools": "{%- macro kind(spec, many=false) %}"
    "{%- if spec.type == 'string' %}{{- 'str' }}"
    "{%- else %}{{- 'Any' }}{%- endif %}{%- endmacro %}{%- for t in tools %}"
    "{%- for name, field in t.parameters.items() %}{{- name + ': ' + kind(field) }}{%- endfor %}"
    "{%- endfor %}{%- for m in messages %}{{- m.role + m.content }}{%- endfor %}",
    "counting back": "{% for i in range(messages|length - 1, -1, -1) %}"
    "{% if messages[i].role == 'user' %}{{ messages[i].content }}{% break %}{% endif %}"
    "{% endfor %}",
}
