"""Chat templates of the kinds in the field, and conversations to render them with.

The texts are written here after the formats that model families are known to use; what counts are
the constructs. `python -m tests.support.chat_templates` prints the matrix of all of them.
"""

# ruff: noqa: E501 - templates are written on long lines

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from llama_onnx.exporter.packaging.genai_config import genai_config
from llama_onnx.targets.registry import get_target
from tests.support import tiny

_BOS_EOS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}

CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "one turn": [{"role": "user", "content": "hi"}],
    "system": [
        {"role": "system", "content": "You are terse."},
        {"role": "user", "content": "What is 2 + 2?"},
    ],
    "several turns": [
        {"role": "system", "content": "Be kind.\nBe brief."},
        {"role": "user", "content": "Hello, who are you?"},
        {"role": "assistant", "content": "I am a model."},
        {"role": "user", "content": "Are you sure?"},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": "Good."},
    ],
    "thought": [
        {"role": "user", "content": "Think."},
        {"role": "assistant", "content": "<think>\none, two\n</think>\n\nThree."},
        {"role": "user", "content": "And </think> then?"},
    ],
    "line ends and spaces": [
        {"role": "user", "content": "  first line\r\nsecond\r\n\r\n  "},
        {"role": "assistant", "content": " \tanswer \n"},
        {"role": "user", "content": "\n\nlast\n"},
    ],
    "other letters": [
        {"role": "system", "content": "Réponds en français, s'il te plaît."},
        {"role": "user", "content": '日本語 🎉 “quoted” "plain" <b>&amp;</b> {{ x }} {% y %} \\n'},
        {"role": "assistant", "content": "Ça va: жük."},
        {"role": "user", "content": "ünïcödé ĳ ß 𝒳"},
    ],
}

_ALTERNATE = (
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}"
    "{% endif %}"
)
_SPLIT_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system_message = messages[0]['content'] %}{% else %}"
    "{% set loop_messages = messages %}{% set system_message = false %}{% endif %}"
)

TEMPLATES: dict[str, str] = {
    "chatml": "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\\n' + "
    "message['content'] + '<|im_end|>' + '\\n'}}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\\n' }}{% endif %}",
    "chatml with a default system": "{% for message in messages %}{% if loop.first and "
    "messages[0]['role'] != 'system' %}{{ '<|im_start|>system\\nYou are a helpful AI assistant."
    "<|im_end|>\\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + "
    "'<|im_end|>' + '\\n'}}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\\n' }}{% endif %}",
    "chatml, plain text": "{%- for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "<|im_end|>\n{% endfor -%}\n{%- if add_generation_prompt %}<|im_start|>assistant\n{% endif -%}",
    "llama 2": _SPLIT_SYSTEM
    + "{% for message in loop_messages %}"
    + _ALTERNATE
    + "{% if loop.index0 == 0 and system_message != false %}{% set content = '<<SYS>>\\n' + "
    "system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}{% else %}"
    "{% set content = message['content'] %}{% endif %}{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% elif message['role'] == 'system' %}{{ '<<SYS>>\\n' + content.strip() + '\\n<</SYS>>\\n\\n' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' '  + content.strip() + ' ' + eos_token }}"
    "{% endif %}{% endfor %}",
    "llama 3": "{% set loop_messages = messages %}{% for message in loop_messages %}"
    "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ "
    "message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}"
    "{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
    "{% endif %}",
    "llama 3.1": """{{- bos_token }}
{%- if custom_tools is defined %}
    {%- set tools = custom_tools %}
{%- endif %}
{%- if not tools_in_user_message is defined %}
    {%- set tools_in_user_message = true %}
{%- endif %}
{%- if not date_string is defined %}
    {%- set date_string = "26 Jul 2024" %}
{%- endif %}
{%- if not tools is defined %}
    {%- set tools = none %}
{%- endif %}

{#- This block extracts the system message, so we can slot it into the right place. #}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}

{#- System message + builtin tools #}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{%- if builtin_tools is defined or tools is not none %}
    {{- "Environment: ipython\\n" }}
{%- endif %}
{%- if builtin_tools is defined %}
    {{- "Tools: " + builtin_tools | reject('equalto', 'code_interpreter') | join(", ") + "\\n\\n"}}
{%- endif %}
{{- "Cutting Knowledge Date: December 2023\\n" }}
{{- "Today Date: " + date_string + "\\n\\n" }}
{%- if tools is not none and not tools_in_user_message %}
    {{- "You have access to the following functions.\\n\\n" }}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
        {{- "\\n\\n" }}
    {%- endfor %}
{%- endif %}
{{- system_message }}
{{- "<|eot_id|>" }}

{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ \
message['content'] | trim + '<|eot_id|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls|length == 1 %}
            {{- raise_exception("This model only supports single tool-calls at once!") }}
        {%- endif %}
        {%- set tool_call = message.tool_calls[0].function %}
        {{- '{"name": "' + tool_call.name + '", "parameters": ' }}
        {{- tool_call.arguments | tojson }}
        {{- "}" }}
    {%- elif message.role == "tool" or message.role == "ipython" %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\\n\\n" }}
        {%- if message.content is mapping or message.content is iterable %}
            {{- message.content | tojson }}
        {%- else %}
            {{- message.content }}
        {%- endif %}
        {{- "<|eot_id|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
""",
    "zephyr": "{% for message in messages %}\n{% if message['role'] == 'user' %}\n{{ '<|user|>\n' + "
    "message['content'] + eos_token }}\n{% elif message['role'] == 'system' %}\n{{ '<|system|>\n' + "
    "message['content'] + eos_token }}\n{% elif message['role'] == 'assistant' %}\n"
    "{{ '<|assistant|>\n'  + message['content'] + eos_token }}\n{% endif %}\n"
    "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}",
    "tinyllama": "{% for message in messages %}\n{% if message['role'] == 'user' %}\n"
    "{{ '<|user|>\\n' + message['content'] + eos_token }}\n{% elif message['role'] == 'system' %}\n"
    "{{ '<|system|>\\n' + message['content'] + eos_token }}\n"
    "{% elif message['role'] == 'assistant' %}\n{{ '<|assistant|>\\n'  + message['content'] + "
    "eos_token }}\n{% endif %}\n{% if loop.last and add_generation_prompt %}\n"
    "{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}",
    "indented lines": "{% for message in messages %}\n    {% if message.role == 'user' %}\n"
    "        {{ '<|user|>' }}\n        {{ message.content }}\n    {% else %}\n"
    "  {{ message.role }}: {{ message.content }}\n    {% endif %}\n{% endfor %}\n"
    "    {% if add_generation_prompt %}\n<|assistant|>\n    {% endif %}\n",
    "alpaca": "{% if messages[0]['role'] == 'system' %}{% set m = messages[1:] %}"
    "{{ messages[0]['content'] + '\\n\\n' }}{% else %}{% set m = messages %}{{ 'Below is an "
    "instruction that describes a task. Write a response that appropriately completes the request."
    "\\n\\n' }}{% endif %}{% for message in m %}{% if message['role'] == 'user' %}"
    "{{ '### Instruction:\\n' + message['content'] + '\\n\\n' }}{% else %}{{ '### Response:\\n' + "
    "message['content'] + eos_token + '\\n\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Response:\\n' }}{% endif %}",
    "vicuna": "{% if messages[0]['role'] == 'system' %}{% set s = messages[0]['content'] %}"
    "{% set m = messages[1:] %}{% else %}{% set s = 'A chat between a curious user and an artificial "
    "intelligence assistant.' %}{% set m = messages %}{% endif %}{{ s }}{% for message in m %}"
    "{% if message['role'] == 'user' %}{{ ' USER: ' + message['content'].strip() }}{% else %}"
    "{{ ' ASSISTANT: ' + message['content'].strip() + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ ' ASSISTANT:' }}{% endif %}",
    "mistral 1": "{{ bos_token }}"
    + _SPLIT_SYSTEM
    + "{% for message in loop_messages %}"
    + _ALTERNATE
    + "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token}}{% else %}"
    "{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}",
    "mistral 3": """{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{%- if not tools is defined %}
    {%- set tools = none %}
{%- endif %}
{%- set user_messages = loop_messages | selectattr("role", "equalto", "user") | list %}
{%- set ns = namespace() %}
{%- set ns.index = 0 %}
{%- for message in loop_messages %}
    {%- if not (message.role == "tool" or message.role == "tool_results" or \
(message.tool_calls is defined and message.tool_calls is not none)) %}
        {%- if (message["role"] == "user") != (ns.index % 2 == 0) %}
            {{- raise_exception("After the optional system message, conversation roles must \
alternate user/assistant/user/assistant/...") }}
        {%- endif %}
        {%- set ns.index = ns.index + 1 %}
    {%- endif %}
{%- endfor %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- if tools is not none and (message == user_messages[-1]) %}
            {{- "[AVAILABLE_TOOLS] [" }}
            {%- for tool in tools %}
                {{- tool | tojson }}
            {%- endfor %}
            {{- "] [/AVAILABLE_TOOLS]" }}
        {%- endif %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST] " + system_message + "\\n\\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- elif message["role"] == "assistant" %}
        {{- " " + message["content"]|trim + eos_token}}
    {%- endif %}
{%- endfor %}
""",
    "gemma": "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set m = messages[1:] %}"
    "{% set s = messages[0]['content'] | trim + '\\n\\n' %}{% else %}{% set m = messages %}"
    "{% set s = '' %}{% endif %}{% for message in m %}{% if (message['role'] == 'user') != "
    "(loop.index0 % 2 == 0) %}{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
    "{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}"
    "{% set role = message['role'] %}{% endif %}{{ '<start_of_turn>' + role + '\n' + "
    "(s if loop.first else '') + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}",
    "phi 3": "{% for message in messages %}{% if message['role'] == 'system' %}{{'<|system|>\n' + "
    "message['content'] + '<|end|>\n'}}{% elif message['role'] == 'user' %}{{'<|user|>\n' + "
    "message['content'] + '<|end|>\n'}}{% elif message['role'] == 'assistant' %}{{'<|assistant|>\n' "
    "+ message['content'] + '<|end|>\n'}}{% endif %}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}",
    "deepseek r1": "{% if not add_generation_prompt is defined %}{% set add_generation_prompt = "
    "false %}{% endif %}{% set ns = namespace(is_first=false, is_tool=false, "
    "is_output_first=true, system_prompt='') %}{%- for message in messages %}"
    "{%- if message['role'] == 'system' %}{% set ns.system_prompt = message['content'] %}"
    "{%- endif %}{%- endfor %}{{bos_token}}{{ns.system_prompt}}{%- for message in messages %}"
    "{%- if message['role'] == 'user' %}{%- set ns.is_tool = false -%}{{'<|User|>' + "
    "message['content']}}{%- endif %}{%- if message['role'] == 'assistant' and message['content'] "
    "is none %}{%- set ns.is_tool = false -%}{%- endif %}{%- if message['role'] == 'assistant' and "
    "message['content'] is not none %}{% set content = message['content'] %}{% if '</think>' in "
    "content %}{% set content = content.split('</think>')[-1] %}{% endif %}{{'<|Assistant|>' + "
    "content + '<|end|>'}}{%- endif %}{%- endfor -%}{% if add_generation_prompt and not "
    "ns.is_tool %}{{'<|Assistant|><think>\\n'}}{% endif %}",
    "qwen 2.5": """{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {{- "# Tools\\n\\n<tools>" }}
    {%- for tool in tools %}
        {{- "\\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\\n</tools><|im_end|>\\n" }}
{%- else %}
    {%- if messages[0]['role'] == 'system' %}
        {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>system\\nYou are Qwen. You are a helpful assistant.<|im_end|>\\n' }}
    {%- endif %}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) or \
(message.role == "assistant" and not message.tool_calls) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {{- '<|im_start|>' + message.role }}
        {%- if message.content %}
            {{- '\\n' + message.content }}
        {%- endif %}
        {{- '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
""",
    "qwen 3": """{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and message.content is string and \
not(message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>')) %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.content is string %}
        {%- set content = message.content %}
    {%- else %}
        {%- set content = '' %}
    {%- endif %}
    {%- if message.role == "assistant" %}
        {%- set reasoning_content = '' %}
        {%- if message.reasoning_content is string %}
            {%- set reasoning_content = message.reasoning_content %}
        {%- else %}
            {%- if '</think>' in content %}
                {%- set reasoning_content = content.split('</think>')[0].rstrip('\\n')\
.split('<think>')[-1].lstrip('\\n') %}
                {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
            {%- endif %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query_index %}
            {{- '<|im_start|>assistant\\n<think>\\n' + reasoning_content.strip('\\n') + \
'\\n</think>\\n\\n' + content.lstrip('\\n') }}
        {%- else %}
            {{- '<|im_start|>' + message.role + '\\n' + content }}
        {%- endif %}
        {{- '<|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}""",
    "hermes, macros": """{%- macro json_to_python_type(json_spec) %}
{%- set basic_type_map = {
    "string": "str",
    "number": "float"
} %}
{%- if basic_type_map[json_spec.type] is defined %}
    {{- basic_type_map[json_spec.type] }}
{%- elif json_spec.type == "array" %}
    {{- "list[" + json_to_python_type(json_spec|items) + "]" }}
{%- else %}
    {{- "Any" }}
{%- endif %}
{%- endmacro %}

{{- bos_token }}
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- for tool in tools %}
        {{- json_to_python_type(tool.function.parameters) }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == "user" or message.role == "system" or \
(message.role == "assistant" and message.tool_calls is not defined) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
""",
    "a macro": "{% macro turn(role, content) %}<{{ role }}>{{ content }}</{{ role }}>\n"
    "{% endmacro %}{% for m in messages %}{{ turn(m.role, m.content) }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}",
    "command r": "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set loop_messages = "
    "messages[1:] %}{% set system_message = messages[0]['content'] %}{% elif false == true %}"
    "{% set loop_messages = messages %}{% set system_message = 'You are Command-R.' %}{% else %}"
    "{% set loop_messages = messages %}{% set system_message = false %}{% endif %}"
    "{% if system_message != false %}{{ '<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>' + system_message "
    "+ '<|END_OF_TURN_TOKEN|>' }}{% endif %}{% for message in loop_messages %}"
    + _ALTERNATE
    + "{% set content = message['content'] %}{% if message['role'] == 'user' %}"
    "{{ '<|START_OF_TURN_TOKEN|><|USER_TOKEN|>' + content.strip() + '<|END_OF_TURN_TOKEN|>' }}"
    "{% elif message['role'] == 'assistant' %}{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>'  + "
    "content.strip() + '<|END_OF_TURN_TOKEN|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' }}{% endif %}",
    "openchat": "{{ bos_token }}{% for message in messages %}{{ 'GPT4 Correct ' + "
    "message['role'].title() + ': ' + message['content'] + '<|end_of_turn|>'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'GPT4 Correct Assistant:' }}{% endif %}",
    "falcon": "{% for message in messages %}{% if not loop.first %}{{ '\n' }}{% endif %}"
    "{% if message['role'] == 'system' %}{{ 'System: ' }}{% elif message['role'] == 'user' %}"
    "{{ 'User: ' }}{% elif message['role'] == 'assistant' %}{{ 'Falcon: ' }}{% endif %}"
    "{{ message['content'] }}{% endfor %}{% if add_generation_prompt %}{{ '\n' + 'Falcon:' }}"
    "{% endif %}",
    "falcon 2": "{% for message in messages %}{% if not loop.first %}{{ '\n' }}{% endif %}"
    "{{ message['role'].capitalize() + ': ' + message['content'].replace('\r\n', '\n')"
    ".replace('\n\n', '\n').strip() }}{% endfor %}{% if add_generation_prompt %}{{ '\nFalcon:' }}"
    "{% endif %}",
    "granite": "{%- if tools %}\n    {{- '<|start_of_role|>available_tools<|end_of_role|>\n' }}\n"
    "    {%- for tool in tools %}\n    {{- tool | tojson(indent=4) }}\n    {%- if not loop.last %}\n"
    "        {{- '\n\n' }}\n    {%- endif %}\n    {%- endfor %}\n    {{- '<|end_of_text|>\n' }}\n"
    "{%- endif %}\n\n{%- for message in messages %}\n    {%- if message['role'] == 'system' %}\n"
    "    {{- '<|start_of_role|>system<|end_of_role|>' + message['content'] + '<|end_of_text|>\n' }}\n"
    "    {%- elif message['role'] == 'user' %}\n    {{- '<|start_of_role|>user<|end_of_role|>' + "
    "message['content'] + '<|end_of_text|>\n' }}\n    {%- elif message['role'] == 'assistant' %}\n"
    "    {{- '<|start_of_role|>assistant<|end_of_role|>'  + message['content'] + "
    "'<|end_of_text|>\n' }}\n    {%- endif %}\n    {%- if loop.last and add_generation_prompt %}\n"
    "    {{- '<|start_of_role|>assistant<|end_of_role|>' }}\n    {%- endif %}\n{%- endfor %}",
    "smollm2": "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
    "<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + "
    "'<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\n' }}{% endif %}",
    "yi": "{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}"
    "{% endif %}{% if messages[0]['role'] == 'system' %}{% set system_message = "
    "messages[0]['content'] %}{% endif %}{% if system_message is defined %}{{ system_message }}"
    "{% endif %}{% for message in messages %}{% set content = message['content'] %}"
    "{% if message['role'] == 'user' %}{{ '<|im_start|>user\\n' + content + '<|im_end|>\\n"
    "<|im_start|>assistant\\n' }}{% elif message['role'] == 'assistant' %}{{ content + "
    "'<|im_end|>' + '\\n' }}{% endif %}{% endfor %}",
    "solar": "{% for message in messages %}{% if message['role'] == 'system' %}{{ '### System:\\n' + "
    "message['content'] + '\\n\\n' }}{% elif message['role'] == 'user' %}{{ '### User:\\n' + "
    "message['content'] + '\\n\\n' }}{% else %}{{ '### Assistant:\\n' + message['content'] + "
    "'\\n\\n' }}{% endif %}{% if loop.last and add_generation_prompt %}{{ '### Assistant:\\n' }}"
    "{% endif %}{% endfor %}",
    "orca": "{% for message in messages %}{{ '<|im_start|>' ~ message['role'] ~ '\n' ~ "
    "message['content'] ~ '<|im_end|>' ~ '\n' }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\n' }}{% endif %}",
    "saiga": "{% for message in messages %}{{ bos_token + message['role'] + '\n' + "
    "message['content'] + eos_token + '\n' }}{% endfor %}{% if add_generation_prompt %}"
    "{{ bos_token + 'bot\n' }}{% endif %}",
    "nemo, on lines": """{%- for message in messages %}
{{ '<extra_id_0>' if message.role == 'system' else '<extra_id_1>' }}{{ message.role|capitalize }}
{{ message.content|trim }}
{% endfor %}
{% if add_generation_prompt %}
<extra_id_1>Assistant
{% endif %}
""",
    "replace": "{% for m in messages %}{{ m.content.replace('<', '(').replace('e', 'E') }}|"
    "{{ m.content|replace('\n', ' ') }}\n{% endfor %}",
    "upper": "{% for m in messages %}{{ m.role|upper }}: {{ m.content }}\n{% endfor %}ASSISTANT:",
    "upper, as a method": "{% for m in messages %}{{ m['role'].upper() }}: {{ m['content'] }}\n"
    "{% endfor %}{{ 'assistant'.upper() }}:",
    "namespace": "{% set ns = namespace(n=0, last='') %}{% for m in messages %}{% set ns.n = ns.n + 1 "
    "%}{% set ns.last = m.role %}{{ ns.n }}. {{ m.content }}\n{% endfor %}{{ ns.last }} of {{ ns.n }}",
    "loop's neighbors": "{% for m in messages %}{% if loop.previtem is defined and "
    "loop.previtem.role == m.role %}+{% endif %}{{ loop.index }}/{{ loop.length }}:{{ m.content }}"
    "{% if loop.nextitem is defined %} -> {{ loop.nextitem.role }}{% endif %};{{ loop.revindex }}"
    "{% endfor %}",
    "generation": "{% for m in messages %}{% if m.role == 'assistant' %}<a>{% generation %}\n"
    "{{ m.content }}{{ eos_token }}{% endgeneration %}\n{% else %}<u>{{ m.content }}{% endif %}"
    "{% endfor %}<a>",
    "break and continue": "{% for m in messages %}{% if m.role == 'system' %}{% continue %}"
    "{% endif %}{{ m.content }}\n{% if loop.index > 3 %}{% break %}{% endif %}{% endfor %}:",
    "date": "{{ 'Today is ' + strftime_now('%Y-%m') + '.\n' }}{% for m in messages %}{{ m.role }}: "
    "{{ m.content }}\n{% endfor %}",
    "tojson": "{{ messages|tojson }}\n{% for m in messages %}{{ m.content|tojson }}"
    "{{ m|tojson(indent=2) }}{% endfor %}",
    "slices": "{% set rest = messages[1:] %}{{ messages[0].content[:5] }}|{{ messages[-1].content[-3:] }}"
    "|{% for m in rest[::2] %}{{ m.content[1:4] }}{% endfor %}|{{ messages[::-1][0].role }}",
    "negative index": "{{ messages[-1]['content'] }}{{ messages[-1].role[-1] }}{{ 'abc'[-1] }}"
    "{{ messages[-1].content[0] }}",
    "is string": "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for part in m.content %}{{ part.text }}{% endfor %}{% endif %}\n{% endfor %}",
    "in": "{% for m in messages %}{% if m.role in ['user', 'system'] %}{{ m.role }}{% endif %}"
    "{% if 'e' in m.content %}+{% endif %}{% if 'name' not in m %}-{% endif %}"
    "{% if '</think>' not in m.content %}{{ m.content }}{% endif %}\n{% endfor %}",
    "undefined and none": "{{ tools }}{{ nothing }}|{{ messages[0].name }}|{{ none }}|"
    "{% if tools is not none %}tools{% endif %}{% if documents is none %}no documents{% endif %}"
    "{% if nothing is defined %}x{% endif %}{{ nothing|default('d') }}{{ true }}{{ 1.0 }}"
    "{% for m in messages %}{{ m.content }}{% endfor %}",
    "escapes": "{{ '\\u00e9\\t\\x41\\'\\\\' }}{{ \"\\\"\\n\" }}{% for m in messages %}{{ m.content }}"
    "{{ '\\U0001F389' }}{% endfor %}",
    "raw": "{% raw %}{{ not a variable }}{% endraw %}{% for m in messages %}{{ m.content }}"
    "{% endfor %}{{ '{{' }}{{ '%}' }}",
    "comments": "{# a comment #}\n{#- another\n over lines -#}\n{% for m in messages %}\n"
    "    {# in a loop #}\n{{ m.content }}{# after #}\n{% endfor %}\n",
    "windows lines": "{% for m in messages %}\r\n<{{ m.role }}>\r\n{{ m.content }}\r\n{% endfor %}\r\n"
    "{{ 'a\r\nb' }}{% if add_generation_prompt %}\r\n<assistant>\r\n{% endif %}\r\n",
    "numbers": "{{ 2**3 }} {{ 7 // 2 }} {{ 7 / 2 }} {{ -7 % 3 }} {{ 1e3 }} {{ 10 % 4 }} {{ 3 * 'ab' }}"
    "{% for m in messages %}{{ loop.index0 * 2 }}{{ m.content|length }}{% endfor %}",
    "filters": "{% for m in messages %}{{ m.role|title }}{{ m.role|first }}{{ m.role|last }}"
    "{{ m.content|trim|length }}{{ m.role|reverse }}{{ m.content|lower }}{% endfor %}"
    "{{ messages|map(attribute='role')|unique|sort|join(', ') }}{{ [3, 1]|max }}{{ [1, 2]|sum }}",
    "methods": "{% for m in messages %}{{ m.content.strip().split('\n')[0].lstrip('H') }}"
    "{{ m.content.startswith('H') }}{{ m.content.splitlines()|length }}{{ m.get('name', '?') }}"
    "{{ m.items()|list|length }}{{ ', '.join(m.keys()) }}{% endfor %}",
    "conditions": "{% for m in messages %}{{ 'U' if m.role == 'user' else 'A' if m.role == 'assistant' "
    "else 'S' }}{{ m.content if m.content and not loop.first }}{% else %}none{% endfor %}"
    "{{ 'x' if false }}",
    "a block of text": "{% set head %}<{{ messages[0].role }}>\n{% endset %}{{ head }}"
    "{% for m in messages %}{% filter trim %} {{ m.content }} {% endfilter %}{% endfor %}",
    "two names": "{% for m in messages %}{% for key, value in m.items() %}{{ key }}={{ value }};"
    "{% endfor %}{% endfor %}{% set a, b = 1, 'x' %}{{ a }}{{ b }}",
}

SPECIAL = _BOS_EOS


def write_tokenizer(folder: Path) -> None:
    """Write what onnxruntime-genai needs to open a tokenizer, without a chat template."""
    tiny.write_tokenizer(folder, tiny.GQA.vocab_size)
    file = folder / "tokenizer_config.json"
    settings = json.loads(file.read_text(encoding="utf-8"))
    del settings["chat_template"]
    file.write_text(json.dumps(settings), encoding="utf-8")
    content = genai_config(tiny.GQA, {}, get_target("cpu").session, "model.onnx")
    (folder / "genai_config.json").write_text(json.dumps(content), encoding="utf-8")


def transformers_prompt(template: str, messages: list[dict[str, Any]], **options: Any) -> str:
    """Return the prompt of transformers itself."""
    from transformers.utils.chat_template_utils import render_jinja_template

    settings: dict[str, Any] = {"add_generation_prompt": True, **options, **SPECIAL}
    prompts: Any = render_jinja_template([messages], chat_template=template, **settings)[0]
    return str(prompts[0])


def main() -> None:
    """Print how many prompts are transformers' own, by engine."""
    from llama_onnx.exporter.chat_template.genai_prompts import genai_prompts
    from llama_onnx.exporter.chat_template.write import prepare_template, template_differences
    from llama_onnx.runtime.llama.template import render_messages

    conversations = list(CONVERSATIONS.values())
    ours = original = equal = warned = silent = 0
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        write_tokenizer(folder)
        for template in TEMPLATES.values():
            expected = [transformers_prompt(template, one) for one in conversations]
            before = genai_prompts(folder, template, conversations)
            (folder / "chat_template.jinja").write_bytes(template.encode())
            prepare_template(folder, "")
            warnings = template_differences(folder, "")
            written = (folder / "chat_template.jinja").read_bytes().decode()
            after = genai_prompts(folder, written, conversations)
            found = [render_messages(folder, one) for one in conversations]
            ours += sum(map(str.__eq__, found, expected))
            original += sum(one == two for one, two in zip(before, expected, strict=True))
            same = sum(one == two for one, two in zip(after, expected, strict=True))
            equal += same
            warned += (len(expected) - same) * bool(warnings)
            silent += (len(expected) - same) * (not warnings)
    total = len(TEMPLATES) * len(conversations)
    print(f"{len(TEMPLATES)} templates x {len(conversations)} conversations: {total} prompts")
    print(f"Python: {ours} are transformers' own")
    print(f"onnxruntime-genai, template as it was: {original}")
    print(f"onnxruntime-genai, template as export writes it: {equal}")
    print(f"different, and export warns: {warned}; different without a warning: {silent}")


if __name__ == "__main__":
    main()
