"""Tools and their calls in a conversation: arguments as an object or as JSON, in the form that
the model's template writes.
"""

from __future__ import annotations

import json
from typing import Any

Message = dict[str, Any]


def find_tools_problem(tools: Any) -> str | None:
    """What is wrong with a row's ``tools``, or None."""
    if not isinstance(tools, str) or not tools.strip():
        return None
    try:
        found = json.loads(tools)
    except ValueError as error:
        return f"`tools` is a text that is not JSON: {error}"
    is_list = isinstance(found, list) and all(isinstance(tool, dict) for tool in found)
    return None if is_list or found is None else "`tools` must be a list of objects"


def find_arguments_problem(call: dict[str, Any]) -> str | None:
    """What is wrong with the arguments of one of ``tool_calls``, or None."""
    function = _function_of(call)
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        return (
            f"`tool_calls` holds {json.dumps(call)[:80]}, which is no call: a function has a `name`"
            " and `arguments`"
        )
    arguments = function.get("arguments")
    if isinstance(arguments, str) and arguments:
        try:
            arguments = json.loads(arguments)
        except ValueError as error:
            return f"the arguments of {function['name']} are a text that is not JSON: {error}"
    if isinstance(arguments, dict | None) or arguments == "":
        return None
    return f"the arguments of {function['name']} are no object"


def read_tools(tools: Any) -> list[dict[str, Any]] | None:
    """A row's ``tools`` as a list, None where there are none."""
    if isinstance(tools, str):
        return (json.loads(tools) or None) if tools.strip() else None
    return tools or None


def has_calls(messages: list[Message]) -> bool:
    """Whether any message calls a tool."""
    return any(message.get("tool_calls") for message in messages)


def with_arguments(messages: list[Message], *, as_text: bool) -> list[Message]:
    """``messages`` with the arguments of all calls as objects, or as JSON text."""
    changed = []
    for message in messages:
        calls = [_with_arguments(call, as_text) for call in message.get("tool_calls") or ()]
        changed.append({**message, "tool_calls": calls} if calls else message)
    return changed


def is_written_by_python(text: str, without_calls: str, messages: list[Message]) -> bool:
    """Whether ``text`` has arguments as Python prints a dict, which is no JSON: its template wanted
    them as text.

    ``without_calls`` is the same conversation without its calls, whose messages may well quote such
    a dict.
    """
    calls = [call for message in messages for call in message.get("tool_calls") or ()]
    for arguments in (_function_of(call).get("arguments") for call in calls):
        printed = repr(arguments)
        if (
            arguments
            and printed != json.dumps(arguments, ensure_ascii=False)
            and text.count(printed) > without_calls.count(printed)
        ):
            return True
    return False


def _function_of(call: dict[str, Any]) -> Any:
    return call.get("function", call)


def _with_arguments(call: dict[str, Any], as_text: bool) -> dict[str, Any]:
    function = _function_of(call)
    arguments = function.get("arguments") or {}
    if as_text and not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    elif not as_text and isinstance(arguments, str):
        arguments = json.loads(arguments) or {}
    changed = {**function, "arguments": arguments}
    return {**call, "function": changed} if "function" in call else changed
