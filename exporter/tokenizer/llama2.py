"""The prompt format that the Llama 2 chat models were trained with."""

LLAMA2_CHAT_TEMPLATE = """\
{%- set system = messages[0]['role'] == 'system' -%}
{%- set turns = messages[1:] if system else messages -%}
{%- for message in turns -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{- raise_exception('Conversation roles must alternate user/assistant/user/...') -}}
    {%- endif -%}
    {%- set content = message['content'] -%}
    {%- if loop.first and system -%}
        {%- set content = '<<SYS>>\\n' + messages[0]['content'] + '\\n<</SYS>>\\n\\n' + content -%}
    {%- endif -%}
    {%- if message['role'] == 'user' -%}
        {{- bos_token + '[INST] ' + content.strip() + ' [/INST]' -}}
    {%- elif message['role'] == 'assistant' -%}
        {{- ' ' + content.strip() + ' ' + eos_token -}}
    {%- endif -%}
{%- endfor -%}
"""
"""Writes each turn as Meta's `chat_completion` does, and as Llama-2-7b-chat-hf's template does.

https://github.com/meta-llama/llama/blob/main/llama/generation.py
"""
