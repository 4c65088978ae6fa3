"""Templates that behave as public ones do, each written for the one thing that it does."""

from __future__ import annotations

# As Qwen2.5's: a system prompt of its own where the row has none; tools in the system turn;
# arguments as JSON (of a text: twice).
DEFAULT_SYSTEM = """
{%- set given = messages[0].role == 'system' %}
{{- '<|im_start|>system\\n' + (messages[0].content if given else 'You are a helpful assistant.') }}
{%- if tools %}{{- '\\n<tools>' }}
{%- for tool in tools %}{{- '\\n' + (tool | tojson) }}{%- endfor %}{{- '\\n</tools>' }}{%- endif %}
{{- '<|im_end|>\\n' }}
{%- for message in messages %}
{%- if message.role == 'system' %}{%- continue %}{%- endif %}
{{- '<|im_start|>' + message.role + '\\n' + (message.content or '') }}
{%- for call in message.tool_calls or [] %}
{{- '<tool_call>\\n{"name": "' + call.function.name + '", "arguments": '
  + (call.function.arguments | tojson) + '}\\n</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""

# As Qwen3's: `reasoning_content` is written in front of the answer, and left away from turns before
# the last user message.
REASONING = """
{%- set ns = namespace(last_user=-1) %}
{%- for message in messages %}{%- if message.role == 'user' %}{%- set ns.last_user = loop.index0 %}
{%- endif %}{%- endfor %}
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' }}
{%- if message.reasoning_content and loop.index0 > ns.last_user %}
{{- '<think>\\n' + message.reasoning_content.strip('\\n') + '\\n</think>\\n\\n' }}
{%- endif %}
{{- message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""

# As gpt-oss's: the same thing is called `thinking`.
THINKING = REASONING.replace("reasoning_content", "thinking")

# As DeepSeek's: arguments are put into the text as they come, so they must be text.
ARGUMENTS_AS_TEXT = """
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' + (message.content or '') }}
{%- for call in message.tool_calls or [] %}
{{- call.function.name + '\\n```json\\n' + call.function.arguments + '\\n```' }}
{%- endfor %}
{{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""

# As some community templates: the same, printed rather than added, so that an object would come out
# as Python writes it.
ARGUMENTS_PRINTED = ARGUMENTS_AS_TEXT.replace(
    "call.function.name + '\\n```json\\n' + call.function.arguments + '\\n```'",
    "call.function.name ~ '\\n```json\\n' ~ call.function.arguments ~ '\\n```'",
)

# As Qwen3-Coder's: each argument by its name, so they must be an object.
ARGUMENTS_BY_NAME = ARGUMENTS_AS_TEXT.replace(
    "{{- call.function.name + '\\n```json\\n' + call.function.arguments + '\\n```' }}",
    "{{- '<function=' + call.function.name + '>' }}{%- for name, value in call.function.arguments |"
    " items %}{{- '<' + name + '>' + (value | string) + '</' + name + '>' }}{%- endfor %}",
)
