"""A chat template and the tokenizer it writes for: from a conversation to text, from text to tokens."""

import functools
import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from bridge.errors import ConfigError
from bridge.weights.hf_assets import GENERATION

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_DATE = re.compile(r"strftime_now\(\s*[\"']([^\"']+)[\"']\s*\)")
_PROBE = "qzprobe"  # a word no template has


class InvalidRow(Exception):
    """A row cannot become a sample: what is wrong with it, without where it is."""


class Tokens(NamedTuple):
    """ids: token ids. starts: the character of the text at which each token begins."""

    ids: list[int]
    starts: list[int]


class Template:
    """The chat template `text` (None: the tokenizer's own) with `arguments` for its variables.

    tokenizer: what AutoTokenizer gives, with a tokenizer.json. stops: ids that end a model's answer, besides the
    tokenizer's eos_token, as generation_config.json lists them.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        text: str | None = None,
        arguments: Mapping[str, Any] | None = None,
        stops: Sequence[int] = (),
    ) -> None:
        self.tokenizer, self.text, self.arguments = tokenizer, text, dict(arguments or {})
        _keep_white_space(tokenizer.backend_tokenizer)
        added = tokenizer.added_tokens_decoder
        stop_ids = {*stops, *([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])}
        special = {token.content for number, token in added.items() if token.special or number in stop_ids}
        self._special = special | set(tokenizer.all_special_tokens)
        self._stops = {tokenizer.convert_ids_to_tokens(number) for number in stop_ids}
        self._lengths = sorted(map(len, self._special), reverse=True)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Any = None,
        arguments: Mapping[str, Any] | None = None,
        prompt: bool = False,
    ) -> str:
        """The conversation as text; `prompt`: with the beginning of an answer after it. Raises InvalidRow."""
        given = {**self.arguments, **(arguments or {})}
        try:
            text: str = self.tokenizer.apply_chat_template(
                list(messages),
                tools=tools,
                chat_template=self.text,
                tokenize=False,
                add_generation_prompt=prompt,
                **given,
            )
        except Exception as error:  # a template may fail as any program does
            raise InvalidRow(f"the chat template refuses it ({' '.join(str(error).split())})") from error
        return text

    def generated(
        self, messages: Sequence[Mapping[str, Any]], *, tools: Any, arguments: Mapping[str, Any]
    ) -> list[Any]:
        """(start, end) of each piece of `render`'s text that {% generation %} encloses, in characters."""
        from transformers.utils.chat_template_utils import render_jinja_template

        plain = [{key: value for key, value in message.items() if value is not None} for message in messages]
        rendering: Any = render_jinja_template(
            conversations=[plain],
            tools=tools,
            chat_template=self.source(tools),
            return_assistant_tokens_mask=True,
            **{**self.tokenizer.special_tokens_map, **self.arguments, **arguments},
        )
        found: list[Any] = rendering[1][0]
        return found

    def tokens(self, text: str, *, special: bool = False) -> Tokens:
        """The tokens of `text`; special: with those that the tokenizer puts around a text."""
        encoded = self.tokenizer(text, add_special_tokens=special, return_offsets_mapping=True, verbose=False)
        return Tokens(encoded["input_ids"], [start for start, _ in encoded["offset_mapping"]])

    def source(self, tools: Any = None) -> str:
        """The text of the template that serves a conversation with or without `tools`."""
        text: str = self.tokenizer.get_chat_template(self.text, tools)
        return text

    def marks_answers(self, tools: Any = None) -> bool:
        """Whether the template says itself, by {% generation %}, what a model writes."""
        return _GENERATION.search(self.source(tools)) is not None

    def trailing(self, text: str) -> list[int]:
        """Ends of the groups of special tokens at the end of `text` that only white space divides, in their order."""
        ends: list[int] = []
        end, apart = len(text.rstrip()), True
        while end:
            length = next((n for n in self._lengths if n <= end and text[end - n : end] in self._special), None)
            if length is None:
                break
            if apart:
                ends.append(end)
            before = len(text[: end - length].rstrip())
            apart, end = before < end - length, before
        return ends[::-1]

    def stop_at(self, text: str, position: int) -> int:
        """Length of the token at `position` with which a model ends its answer; 0 when there is none."""
        return max((len(stop) for stop in self._stops if text.startswith(stop, position)), default=0)

    def date_in(self, text: str) -> str | None:
        """Today's date as the template writes it, when it is in `text`."""
        written = (datetime.now().strftime(form) for form in _DATE.findall(self.source()))
        return next((date for date in written if date in text), None)

    @functools.cached_property
    def takes_parts(self) -> bool:
        """Whether the content of a message may be a list of parts; else they are joined."""
        return self._shows([{"role": "user", "content": [{"type": "text", "text": _PROBE}]}])

    @functools.cached_property
    def takes_text(self) -> bool:
        """Whether the content of a message may be a text; else it is a list of one part."""
        return self._shows([{"role": "user", "content": _PROBE}]) or not self.takes_parts

    @functools.cached_property
    def takes_no_content(self) -> bool:
        """Whether a message that calls a tool may be without content; else it is empty."""
        return any(self._shows(_calling(arguments), tools=_TOOLS) for arguments in _ARGUMENTS)

    @functools.cached_property
    def takes_objects(self) -> bool:
        """Whether the arguments of a tool call may be an object, as most templates want; else they are JSON text."""
        content = {} if self.takes_no_content else {"content": ""}
        an_object, a_text = (self._shows(_calling(arguments, **content), tools=_TOOLS) for arguments in _ARGUMENTS)
        return an_object or not a_text

    def _shows(self, messages: list[dict[str, Any]], *, tools: Any = None) -> bool:
        try:
            text = self.render(messages, tools=tools)
        except InvalidRow:
            return False
        return _PROBE in text and f"'{_PROBE}'" not in text  # with its quotes: Python's notation of a list or a dict


_ARGUMENTS = ({_PROBE: 1}, json.dumps({_PROBE: 1}))
_PARAMETERS = {"type": "object", "properties": {"a": {"type": "number", "description": "x"}}, "required": ["a"]}
_TOOLS = [{"type": "function", "function": {"name": "look", "description": "x", "parameters": _PARAMETERS}}]


def _keep_white_space(tokenizer: Any) -> None:
    """Have a token begin where its text does, white space included, which a post-processor may leave out."""
    processor = tokenizer.post_processor
    state = b"" if processor is None else processor.__getstate__()
    if b'"trim_offsets":true' in state:
        processor.__setstate__(state.replace(b'"trim_offsets":true', b'"trim_offsets":false'))
        tokenizer.post_processor = processor


def _calling(arguments: Any, **content: str) -> list[dict[str, Any]]:
    """A conversation that ends in a call of a tool."""
    call = {"id": "call00000", "type": "function", "function": {"name": "look", "arguments": arguments}}
    return [{"role": "user", "content": "x"}, {"role": "assistant", **content, "tool_calls": [call]}]


def load(directory: Path, *, file: str | None, arguments: Mapping[str, Any], needed: bool = True) -> Template:
    """The template of a Hugging Face directory, or in `file`. Raises ConfigError when there is none but `needed`."""
    from transformers import AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    if not tokenizer.is_fast:
        raise ConfigError(
            f"data.tokenizer: {directory} has no tokenizer.json, which tells where in a text a token lies; save one "
            "there with transformers"
        )
    text = None if file is None else Path(file).expanduser().read_text()
    if text is None and tokenizer.chat_template is None and needed:
        raise ConfigError(
            f"data.template: is not set, and the tokenizer in {directory} has no chat template; set data.template=FILE "
            "to one"
        )
    settings = directory / GENERATION
    stops = json.loads(settings.read_text()).get("eos_token_id") if settings.is_file() else None
    stops = [] if stops is None else stops if isinstance(stops, list) else [stops]
    return Template(tokenizer, text=text, arguments=arguments, stops=stops)
