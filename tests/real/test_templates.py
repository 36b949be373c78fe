"""Masks of random conversations with real tokenizers and real templates, against transformers' own renderings."""

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from bridge.data.encode import chat, conversation, templates
from bridge.data.encode.masks import Counts, Rules
from bridge.data.readers.reader import Row
from tests.real import fetch

pytestmark = pytest.mark.real

WORDS = ["Paris", "émigré", "数学", "🙂", "x = [1, 2]", "two  spaces", "line\nbreak", "{}", "don't", "3.14", "Zürich"]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "look_up",
            "description": "Looks a word up.",
            "parameters": {"type": "object", "properties": {"word": {"type": "string", "description": "w"}}},
        },
    }
]
# Templates that other models have, with MiniMind2's tokenizer: their special tokens are text to it
OTHERS = ["llama3_1", "lfm2_v2", "qwen3_vl", "qwen3_8", "muse_glimmer", "gptoss", "qwen3_5_think", "gemma4_v2"]
# Tokenizers without a template of their own, and templates for them: gpt-oss's is its model's
LENT = {"gptoss": "gptoss", "gpt2": "qwen2_5", "stories15m": "llama3_1"}
# Pairs of a template and what TRL makes of it, with {% generation %} around what is trained
PAIRS = ["llama3", "qwen2_5", "gemma3", "cohere", "lfm2_v2", "qwen3_instruct_2507"]


def _words(draw: random.Random) -> str:
    return " ".join(draw.choices(WORDS, k=draw.randint(1, 6)))


def _talk(draw: random.Random, *, tools: bool) -> dict[str, Any]:
    messages: list[dict[str, Any]] = []
    for number in range(draw.randint(1, 3)):
        messages.append({"role": "user", "content": _words(draw)})
        if tools and draw.random() < 0.6:
            function = {"name": "look_up", "arguments": {"word": draw.choice(WORDS)}}
            call = {"id": f"call{number:05d}", "type": "function", "function": function}
            result = {"role": "tool", "tool_call_id": call["id"], "name": "look_up", "content": _words(draw)}
            messages += [{"role": "assistant", "content": "", "tool_calls": [call]}, result]
        messages.append({"role": "assistant", "content": _words(draw)})
    return {"messages": messages, **({"tools": TOOLS} if tools else {})}


def _encoded(
    record: dict[str, Any], template: templates.Template, *, train_on: str = "assistant"
) -> tuple[list[Any], Counts]:
    counts = Counts()
    talk = conversation.conversation(record, names=conversation.Names())
    row = Row(record, "talk.jsonl", 1)
    return chat.encode(talk, template, row=row, rules=Rules(train_on), counts=counts), counts


def _ids(template: templates.Template, messages: list[Any], **options: Any) -> list[int]:
    found = template.tokenizer.apply_chat_template(messages, chat_template=template.text, return_dict=False, **options)
    return list(found)


def _check(record: dict[str, Any], template: templates.Template) -> None:
    """Each answer is trained once, in a text that transformers renders, right after what transformers asks with."""
    messages, tools = record["messages"], record.get("tools")
    samples, counts = _encoded(record, template)
    answers = [number for number, each in enumerate(messages) if each["role"] == "assistant"]
    if counts.rewritten:
        assert len(samples) == len(answers)
        pairs = [(sample, [number], messages[: number + 1]) for sample, number in zip(samples, answers, strict=True)]
    else:
        pairs = [(samples[0], answers, messages)]
    for sample, numbers, shown in pairs:
        assert list(sample.tokens) == _ids(template, shown, tools=tools)
        runs = list(_runs(sample))
        assert len(runs) == len(numbers)
        for number, (start, end) in zip(numbers, runs, strict=True):
            assert list(sample.tokens[:start]) == _ids(
                template, messages[:number], tools=tools, add_generation_prompt=True
            )
            said = template.tokenizer.decode(sample.tokens[start:end])
            assert said.count(messages[number]["content"]) >= 1
            rest = template.tokenizer.decode(_ids(template, messages[: number + 1], tools=tools)[end:])
            assert not rest.strip(), "what follows the end of a turn in its own text is white space"


def _check_everything(record: dict[str, Any], template: templates.Template) -> None:
    """With train_on=all every token of the one text counts but those that transformers adds to ask for an answer."""
    messages, tools = record["messages"], record.get("tools")
    ((sample,), _) = _encoded(record, template, train_on="all")
    whole = _ids(template, messages, tools=tools)
    assert list(sample.tokens) == whole
    asking: set[int] = set()
    for number in (number for number, each in enumerate(messages) if each["role"] == "assistant"):
        before = _ids(template, messages[:number], tools=tools)
        asked = _ids(template, messages[:number], tools=tools, add_generation_prompt=True)
        assert asked[: len(before)] == before
        pairs = enumerate(zip(asked, [*whole, None], strict=False))
        asking |= {*range(len(before), next((at for at, (one, other) in pairs if one != other), len(asked)))}
    assert {at for at, weight in enumerate(sample.weights) if weight != 1.0} == asking


def _runs(sample: Any) -> Iterator[tuple[int, int]]:
    start = None
    for at, weight in enumerate([*sample.weights, 0.0]):
        if weight and start is None:
            start = at
        elif not weight and start is not None:
            yield start, at
            start = None


@pytest.mark.parametrize("tools", [False, True])
@pytest.mark.parametrize("name", [*(name for name in fetch.TOKENIZERS if name not in LENT), "minimind2", "smollm2"])
def test_a_model_s_own_template(name: str, tools: bool, real_model: Callable[[str], Path]):
    if tools and name in ("gemma3", "smollm2", "deepseek_v3"):
        pytest.skip("this template takes no tools, or, as DeepSeek's, ends a turn only after the second call")
    directory = real_model(name) if name in fetch.SOURCES else fetch.fetch_tokenizer(name)
    template = templates.load(directory, file=None, arguments={})
    draw = random.Random(name)
    for number in range(12):
        talk = _talk(draw, tools=tools)
        _check(talk, template)
        if number < 4:
            _check_everything(talk, template)


@pytest.mark.parametrize("tools", [False, True])
@pytest.mark.parametrize("name", LENT)
def test_a_template_of_another_model(name: str, tools: bool, real_model: Callable[[str], Path]):
    directory = real_model(name) if name in fetch.SOURCES else fetch.fetch_tokenizer(name)
    file = str(fetch.fetch_templates() / f"{LENT[name]}.jinja")
    template = templates.load(directory, file=file, arguments={})
    draw = random.Random(name)
    for _ in range(6):
        _check(_talk(draw, tools=tools), template)


@pytest.mark.parametrize("tools", [False, True])
@pytest.mark.parametrize("name", OTHERS)
def test_templates_of_other_models(name: str, tools: bool, real_model: Callable[[str], Path]):
    file = str(fetch.fetch_templates() / f"{name}.jinja")
    template = templates.load(real_model("minimind2"), file=file, arguments={})
    draw = random.Random(name)
    for _ in range(6):
        _check(_talk(draw, tools=tools), template)


@pytest.mark.parametrize("name", PAIRS)
def test_prefixes_mask_as_templates_that_mark_what_is_generated(name: str, real_model: Callable[[str], Path]):
    plain, marking = (
        templates.load(
            real_model("minimind2"), file=str(fetch.fetch_templates() / f"{name}{suffix}.jinja"), arguments={}
        )
        for suffix in ("", "_training")
    )
    assert marking.marks_answers() and not plain.marks_answers()
    draw = random.Random(name)
    for _ in range(6):
        record = _talk(draw, tools=False)
        (by_prefix,), (by_mark,) = _encoded(record, plain)[0], _encoded(record, marking)[0]
        by_transformers = marking.tokenizer.apply_chat_template(
            record["messages"], chat_template=marking.text, return_assistant_tokens_mask=True
        )
        assert by_prefix[:2] == by_mark[:2]
        text = plain.tokenizer.convert_ids_to_tokens(by_prefix.tokens)
        differing = {
            plain.tokenizer.convert_tokens_to_string([token]).strip()
            for token, one, other in zip(text, by_mark.weights, by_transformers["assistant_masks"], strict=True)
            if one != other
        }
        assert differing <= {""}, "TRL's templates may also mark the white space after a turn"


def test_a_system_message_that_goes_to_the_last_question():
    """Mistral's template: a text that ends in an answer does not show the system message it was asked with."""
    template = templates.load(fetch.fetch_tokenizer("mistral_nemo"), file=None, arguments={})
    messages = [{"role": "system", "content": "Be brief."}]
    for asked, answer in (("Hello", "Hi."), ("And?", "Bye.")):
        messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
    samples, counts = _encoded({"messages": messages}, template)
    assert counts.rewritten == 1 and len(samples) == 2
    for sample, number in zip(samples, (2, 4), strict=True):
        ((start, end),) = _runs(sample)
        assert list(sample.tokens[:start]) == _ids(template, messages[:number], add_generation_prompt=True)
        assert template.tokenizer.decode(sample.tokens[start:end]) == f"{messages[number]['content']}</s>"
        assert end == len(sample.tokens)
