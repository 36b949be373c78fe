"""A record becomes a conversation: OpenAI's messages, ShareGPT's, or other names for the same. Imports no torch."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from bridge.data.encode.templates import InvalidRow
from bridge.errors import did_you_mean, shown

# What a column is called, the first name that a record has.
COLUMNS: dict[str, tuple[str, ...]] = {
    "messages": ("messages", "conversations", "conversation"),
    "tools": ("tools", "functions"),
    "system": ("system",),
    "template_arguments": ("template_arguments", "chat_template_kwargs"),
    # of a message
    "role": ("role", "from"),
    "content": ("content", "value"),
    "train": ("train",),
    "weight": ("weight",),
}
ROLES = {
    **{role: role for role in ("system", "developer", "user", "assistant", "tool")},
    "human": "user",
    "gpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "observation": "tool",
    "function_call": "assistant",
}
SAID_ELSEWHERE = {"tool_calls", "reasoning_content", "reasoning", "thinking"}  # beside an empty content
CALL = "function_call"  # a role of ShareGPT whose text is the call of a tool


class Message(NamedTuple):
    """One turn. value: what the template gets. weight: of what it says; None: as its role has it.

    parts: (text, weight) of the pieces of its content, where they are told apart.
    """

    value: dict[str, Any]
    weight: float | None = None
    parts: tuple[tuple[str, float | None], ...] = ()


class Conversation(NamedTuple):
    messages: list[Message]
    tools: list[Any] | None
    arguments: dict[str, Any]


class Names(NamedTuple):
    """columns: our name for a column -> the record's. roles: a record's name for a role -> the template's."""

    columns: Mapping[str, str] = {}
    roles: Mapping[str, str] = {}

    def find(self, record: Mapping[str, Any], name: str) -> Any:
        """The value of the column that is `name` here; None when the record has none."""
        given = self.columns.get(name)
        return next((record[each] for each in ([given] if given else COLUMNS[name]) if each in record), None)

    def known(self, name: str) -> list[str]:
        return [self.columns[name]] if name in self.columns else list(COLUMNS[name])


def conversation(record: Any, *, names: Names) -> Conversation:
    """The conversation of one record. Raises InvalidRow."""
    if not isinstance(record, Mapping):
        raise InvalidRow("it is no record with fields")
    found = parsed(names.find(record, "messages"))
    if found is None:
        wanted = " or ".join(names.known("messages"))
        near = did_you_mean(wanted, record) or "; set data.columns={messages: NAME}"
        raise InvalidRow(f"it has no {wanted}, only {', '.join(map(str, record)) or 'nothing'}{near}")
    if not isinstance(found, Sequence) or isinstance(found, str) or not len(found):
        raise InvalidRow(
            "it has no messages" if found in ([], "") else f"its messages are {shown(found)[:60]}, no list"
        )
    messages = [message(each, number, names=names) for number, each in enumerate(found, 1)]
    system = names.find(record, "system")
    if system and messages[0].value["role"] != "system":
        messages.insert(0, Message({"role": "system", "content": system}))
    return Conversation(messages, tools_of(record, names), arguments_of(record, names))


def tools_of(record: Mapping[str, Any], names: Names) -> list[Any] | None:
    """The tools of a record, each as OpenAI writes it; None without any."""
    tools = parsed(names.find(record, "tools"))
    if tools is None or tools in ([], ""):  # a table without tools in this row
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise InvalidRow(f"its tools are {shown(tools)[:60]}; they should be a list of objects")
    return [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools]


def arguments_of(record: Mapping[str, Any], names: Names) -> dict[str, Any]:
    """The template's arguments for this record alone."""
    arguments = parsed(names.find(record, "template_arguments"))
    if arguments in (None, ""):
        return {}
    if not isinstance(arguments, Mapping):
        raise InvalidRow(f"its template_arguments are {shown(arguments)[:60]}, no object")
    return {key: value for key, value in arguments.items() if value is not None}


def message(record: Any, number: int, *, names: Names) -> Message:
    """One message as the template gets it. Raises InvalidRow."""
    if not isinstance(record, Mapping):
        raise InvalidRow(f"message {number} is {shown(record)[:60]}, no object")
    said = names.find(record, "role")
    if not isinstance(said, str) or not said:
        raise InvalidRow(f"message {number} has no {' or '.join(names.known('role'))}")
    role = names.roles.get(said, ROLES.get(said))
    if role is None:  # templates leave out a message whose role they do not know
        hint = did_you_mean(said, ROLES) or f"; set data.roles={{{said}: user}}, or what else it is to the template"
        raise InvalidRow(f"message {number} has the role {shown(said)}{hint}")
    ours = {each for name in ("role", "content", "train", "weight") for each in names.known(name)}
    value = {key: item for key, item in record.items() if key not in ours and item is not None}
    content = names.find(record, "content")
    value = {"role": role, **({} if content is None else {"content": content}), **value}
    if said == CALL and "tool_calls" not in value and content is not None:
        del value["content"]
        value["tool_calls"] = _called(content, number)
    elif "tool_calls" in value:
        value["tool_calls"] = [_with_object(call, number) for call in parsed(value["tool_calls"])]
    elif content is None:
        raise InvalidRow(f"message {number} has no {' or '.join(names.known('content'))}")
    weight = _weight(record, names, f"message {number}")
    if role == "assistant" and content == "" and weight != 0 and not value.keys() & SAID_ELSEWHERE:
        raise InvalidRow(f"message {number} is an empty answer")
    if isinstance(content, str) or content is None or said == CALL:
        return Message(value, weight)
    if not isinstance(content, list) or not all(isinstance(part, Mapping) for part in content):
        raise InvalidRow(f"the content of message {number} is {shown(content)[:60]}; it should be text or parts")
    return _of_parts(value, content, weight, f"message {number}", names)


def _of_parts(value: dict[str, Any], content: list[Any], weight: float | None, where: str, names: Names) -> Message:
    parts = []
    for part in content:
        text = part.get("text", part.get("value"))
        if not isinstance(text, str):
            raise InvalidRow(f"{where} has a part without text ({shown(part)[:60]}); only text can be trained on")
        parts.append((text, _weight(part, names, f"a part of {where}")))
    value["content"] = [{"type": "text", "text": text} for text, _ in parts]
    return Message(value, weight, tuple(parts))


def _weight(record: Mapping[str, Any], names: Names, where: str) -> float | None:
    """`train` and `weight` of a message or part as one number; None without either."""
    train, weight = names.find(record, "train"), names.find(record, "weight")
    if train is not None and not isinstance(train, bool) and train not in (0, 1):
        raise InvalidRow(f"{where} has train {shown(train)}; it should be true or false")
    if weight is not None and (
        isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < 1e6
    ):
        raise InvalidRow(f"{where} has the weight {shown(weight)}; it should be a number from 0")
    if train is not None and not train:
        return 0.0
    return float(weight) if weight is not None else 1.0 if train else None


def _called(content: Any, number: int) -> list[dict[str, Any]]:
    calls = parsed(content)
    calls = [calls] if isinstance(calls, Mapping) else calls
    if not isinstance(calls, list) or not all(isinstance(call, Mapping) and "name" in call for call in calls):
        raise InvalidRow(f"message {number} calls no tool: {shown(content)[:60]}; it should have name and arguments")
    return [_with_object({"type": "function", "function": dict(call)}, number) for call in calls]


def _with_object(call: Any, number: int) -> dict[str, Any]:
    """A tool call whose arguments are an object, as templates want them, not JSON text, as OpenAI sends them."""
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise InvalidRow(f"message {number} has the tool call {shown(call)[:60]}; it should have function.name")
    arguments = parsed(function.get("arguments", {}))
    if not isinstance(arguments, Mapping):
        raise InvalidRow(f"message {number} calls {function['name']} with arguments that are no JSON object")
    return {**call, "function": {**function, "arguments": {k: v for k, v in arguments.items() if v is not None}}}


def parsed(value: Any) -> Any:
    """`value`, read as JSON where it is the text of a list or an object, as tables hold them."""
    if isinstance(value, str) and value.strip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except ValueError:
            return value
    return value
