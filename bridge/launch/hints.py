"""What to write instead: of an unknown key or option, of a value that needs quotes, of a flag that Hydra has not."""

import difflib
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException

from bridge.config import known_keys, other_names
from bridge.errors import did_you_mean, which_of

_FLAGS = (
    *("--help", "--hydra-help", "--version", "--cfg", "--resolve"),
    *("--package", "--multirun", "--config-name", "--info"),
)
# How ANTLR's own words begin, which name tokens of Hydra's grammar.
_GRAMMAR = ("no viable ", "mismatched ", "extraneous ", "missing ", "LexerNoViable", "token recognition ")
_FORMS = "write a list as [a,b], a mapping as {a: 1}, a text as '\"text\"'"
_MOST = 12  # names in one line


def of_key(key: str, value: str | None, *, beside: Sequence[str], keys: Mapping[str, str]) -> str:
    """For an unknown full key. `beside`: what there is in its section, `keys`: all there is, with its type."""
    section, _, name = key.rpartition(".")
    found = other_names.instead(key, value) if _are_of_training(keys) else ""
    if found or section.split(".")[0] == "hydra":
        return found or _near_beside(section, name, beside)
    if section and any(known.startswith(f"{name}.") for known in keys):  # train.precision=bf16
        return other_names.written(name, value)
    same = known_keys.with_last_part(key, keys)
    if same:
        return other_names.written(same[0], value) if len(same) == 1 else which_of(same[:_MOST])
    return _near_beside(section, name, beside) or _near_anywhere(name, keys)


def _are_of_training(keys: Mapping[str, str]) -> bool:
    """Whether these have sections; a conversion's have none, and other programs' names for them are not known."""
    return any("." in key for key in keys)


def _near_beside(section: str, name: str, beside: Sequence[str]) -> str:
    hint = did_you_mean(name, beside)
    return hint.replace("'", f"'{section}.", 1) if hint and section else hint


def _near_anywhere(name: str, keys: Mapping[str, str]) -> str:
    last_parts = {known.rpartition(".")[2] for known in keys}
    near = difflib.get_close_matches(name, last_parts, n=1, cutoff=0.75)
    return which_of(known_keys.with_last_part(near[0], keys)[:_MOST]) if near else ""


def of_flag(flag: str, value: str, keys: Mapping[str, str]) -> str:
    """For a flag that Hydra has not, with the value that follows it, or an empty text."""
    key = flag.lstrip("-").replace("-", "_")
    if key in keys or any(known.startswith(f"{key}.") for known in keys):
        return other_names.written(key, value or "VALUE")
    near = which_of(difflib.get_close_matches(flag, _FLAGS, n=1, cutoff=0.75))
    known = of_key(key, value or "VALUE", beside=(), keys=keys)
    return near or known or "; write keys as section.key=value, without dashes"


def of_option(group: str, option: str, known: Sequence[str]) -> str:
    """For an unknown option of a group."""
    listed = other_names.OPTIONS.get(group, {})
    if option.lower() in listed:
        return f"; {listed[option.lower()].format(known=', '.join(known))}"
    alike = [name for name in known if option and name.startswith(option)]
    alike = alike or difflib.get_close_matches(option, known, n=1, cutoff=0.8)
    kind = difflib.get_close_matches(_letters(option), {_letters(name) for name in known}, n=1, cutoff=0.75)
    alike = alike or [name for name in known if _letters(name) in kind]
    listing = f"; the options are {', '.join(known)}" if known else ""
    if group == "objective":
        listing += f"{', and' if known else ';'} objective.name=my_package.my_loss takes a module of your own"
    return which_of(alike[:_MOST]) or did_you_mean(option, known) or listing


def _letters(name: str) -> str:
    """llama of llama3_2_1b."""
    return re.match(r"[a-z]*", name.lower())[0]  # type: ignore[index]


def of_file(group: str, file: str) -> str:
    """For a file where the name of an option belongs; `group` is empty where not even that was typed."""
    path = Path(file)
    found = re.fullmatch(r"(?P<dir>.*?)/?(?P<group>[a-z]+)/[^/]+", str(path.with_suffix("")))
    directory, of = (found["dir"] or ".", found["group"]) if found else ("DIR", "recipe")
    if group and of != group:
        directory, of = "DIR", group
    place = "" if found and directory != "DIR" else f", with the file in DIR/{of}"
    return f"; write --config-dir {shlex.quote(directory)} {of}={path.stem}{place}"


def quoted(key: str, value: str) -> str:
    """`'key="value"'`: how a shell and Hydra are told that `value` is text; empty when no quoting does it."""
    return _if_it_parses(f"{key}={QuotedString(value, Quote.double).with_quotes()}", value)


def quoted_list(key: str, value: str) -> str:
    """The same for `[a,b]`, a list of texts."""
    items = [item.strip() for item in value.strip()[1:-1].split(",")]
    inside = ",".join(QuotedString(item, Quote.double).with_quotes() for item in items)
    return _if_it_parses(f"{key}=[{inside}]", items)


def _if_it_parses(override: str, value: object) -> str:
    try:
        same = OverridesParser.create().parse_override(override).value() == value
    except HydraException:
        return ""
    return shlex.quote(override) if same else ""


def of_values(key: str, value: str, keys: Mapping[str, str]) -> str:
    """For `a,b` where one value belongs."""
    kind, sweep = keys.get(key), "add -m to run them all"
    text = f"{quoted(key, value)} for one text" if kind is None or known_keys.is_text(kind) else ""
    is_list = kind is None or "list" in kind.lower() or "tuple" in kind.lower()
    several = f"{shlex.quote(f'{key}=[{value}]')} for a list" if is_list else ""
    ways = [way for way in (text, several) if way]
    return f"; write {' or '.join(ways)}, or {sweep}" if ways else f"; {sweep}"


def of_unparsed(argument: str, said: str, keys: Mapping[str, str]) -> str:
    """The whole line for an argument that Hydra's grammar refuses, which `said` why."""
    key, equals, value = argument.partition("=")
    name = key.lstrip("+~")
    if not equals:
        if argument.endswith((".yaml", ".yml")):
            return f"{argument}: is a file, not an override{of_file('', argument)}"
        if key in keys:
            return f"{key}: has no value; write {key}=VALUE, without spaces around the '='"
        return f"{argument}: is not an override; write key=value or group=option"
    kind = keys.get(name)
    form = ""
    if value.strip().startswith("[") and value.strip().endswith("]") and not (kind and known_keys.is_text(kind)):
        form = quoted_list(key, value)
    elif (kind is None and not value.strip().startswith(("[", "{"))) or (kind and known_keys.is_text(kind)):
        form = quoted(key, value)
    if form and not form.strip("'").startswith("="):
        return f"{name}: '{value}' has characters that Hydra reads as its own; write {form}"
    reason = "" if said.startswith(_GRAMMAR) else f", {said}"
    return f"{argument}: not a valid override{reason}; {_FORMS}"
