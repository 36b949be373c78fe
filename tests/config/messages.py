"""What a refusal must say: the key, the values it is about, the way out. The words between them are free."""


def says(expected: str, message: str) -> bool:
    """Whether `message` is one line with a remedy and, in order, the parts of `expected` that " ... " separates.

    The key, which is all before the first colon of `expected`, may come with the name of its section before it.
    """
    rest = message
    for part in expected.split(" ... "):
        _, found, rest = rest.partition(part)
        if not found:
            return False
    key = expected.partition(":")[0]
    return message.partition(": ")[0].endswith(key) and "; " in message and "\n" not in message
