"""The chat template of the demo model: turns of system, user, assistant and tool, the tools on offer in the system's
turn, and thinking where the caller wants it.

A turn is its role's token, its words and EOS. An assistant's words go in as they came out, so that a history's tokens
are those that were generated; but thoughts do not come back.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

# A tool's line is `- "name"("city": string "Its name", "unit"?: celsius|fahrenheit): What it does.`: a schema as JSON
# has four times the tokens. Names stand in quotes because they do in a call: there they are the same tokens.
CHAT_TEMPLATE = """\
{%- macro kind(schema) -%}
{%- if schema['enum'] -%}
{{- schema['enum'] | join('|') -}}
{%- elif schema['anyOf'] -%}
{%- for one in schema['anyOf'] if one['type'] != 'null' -%}
{{- ('' if loop.first else '|') + kind(one) -}}
{%- endfor -%}
{%- elif schema['type'] == 'array' -%}
{{- '[' + kind(schema['items'] or {}) + ']' -}}
{%- else -%}
{{- schema['type'] if schema['type'] is string else 'any' -}}
{%- endif -%}
{%- endmacro -%}
{%- macro described(tool) -%}
{%- set function = tool['function'] or tool -%}
{%- set parameters = function['parameters'] or {} -%}
{{- '- "' + function['name'] + '"(' -}}
{%- for name, schema in (parameters['properties'] or {}).items() -%}
{{- ('"' if loop.first else ', "') + name + ('"' if name in (parameters['required'] or []) else '"?') + ': ' -}}
{{- kind(schema) -}}
{%- if schema['description'] -%}
{{- ' "' + schema['description'].split() | join(' ') + '"' -}}
{%- endif -%}
{%- endfor -%}
{{- ')' + (': ' + function['description'].split() | join(' ') if function['description'] else '') -}}
{%- endmacro -%}
{%- macro offer() -%}
{{- 'Tools:' -}}
{%- for tool in tools -%}
{{- '\\n' + described(tool) -}}
{%- endfor -%}
{%- endmacro -%}
{%- macro said(message) -%}
{%- if message['content'] is string -%}
{{- message['content'] -}}
{%- else -%}
{%- for part in message['content'] or [] -%}
{%- if part['type'] != 'text' -%}
{{- raise_exception('a part of type ' + part['type'] + ' is not text') -}}
{%- endif -%}
{{- part['text'] -}}
{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
{%- macro answered(message) -%}
{%- set words = said(message) -%}
{%- if '</think>' in words -%}
{%- set words = words.split('</think>')[-1].lstrip('\\n') -%}
{%- endif -%}
{{- words -}}
{%- for call in message['tool_calls'] or [] -%}
{%- set function = call['function'] or call -%}
{{- ('' if loop.first and not words else '\\n') + '<tool_call>\\n{"name": ' + function['name'] | tojson -}}
{{- ', "arguments": ' -}}
{{- function['arguments'] if function['arguments'] is string else (function['arguments'] or {}) | tojson -}}
{{- '}\\n</tool_call>' -}}
{%- endfor -%}
{%- endmacro -%}
{{- bos_token }}
{%- set offered = namespace(open=true if tools else false) %}
{%- if tools and messages[0]['role'] not in ['system', 'developer'] %}
{{- '<|system|>' + offer() + '<|end|>' }}
{%- set offered.open = false %}
{%- endif %}
{%- for message in messages %}
{%- set role = 'system' if message['role'] == 'developer' else message['role'] %}
{%- if role not in ['system', 'user', 'assistant', 'tool'] %}
{{- raise_exception('role ' + message['role'] + ' is none of system, user, assistant and tool') }}
{%- endif %}
{{- '<|' + role + '|>' }}
{%- if role == 'assistant' %}
{{- answered(message) }}
{%- else %}
{{- said(message) | trim }}
{%- endif %}
{%- if offered.open %}
{{- '\\n\\n' + offer() }}
{%- set offered.open = false %}
{%- endif %}
{{- '<|end|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|assistant|>' + ('<think>' if enable_thinking is defined and enable_thinking else '') }}
{%- endif %}"""


def offer(tools: Sequence[Mapping[str, Any]], system: str = "") -> str:
    """The system's turn with these tools, as the template writes it."""
    lines = "\n".join(["Tools:", *map(tool_line, tools)])
    return f"{system}\n\n{lines}" if system else lines


def tool_line(tool: Mapping[str, Any]) -> str:
    """One tool, as the template describes it."""
    function = tool["function"]
    parameters = function.get("parameters") or {}
    required = parameters.get("required") or []
    arguments = [
        f'"{name}"{"" if name in required else "?"}: {_kind(schema)}'
        + (f' "{" ".join(schema["description"].split())}"' if schema.get("description") else "")
        for name, schema in (parameters.get("properties") or {}).items()
    ]
    about = " ".join((function.get("description") or "").split())
    return f'- "{function["name"]}"({", ".join(arguments)}){": " + about if about else ""}'


def _kind(schema: Mapping[str, Any]) -> str:
    if schema.get("enum"):
        return "|".join(map(str, schema["enum"]))
    if schema.get("anyOf"):
        return "|".join(_kind(one) for one in schema["anyOf"] if one.get("type") != "null")
    kind = schema.get("type")
    if kind == "array":
        return f"[{_kind(schema.get('items') or {})}]"
    return kind if isinstance(kind, str) else "any"
