"""Text of requests made safe to print: it comes from anyone who can reach nginx."""


def printable(text: str) -> str:
    """`text` with every character that is not printable escaped as `\\xNN` or `\\uNNNN`.

    That is control characters (escape sequences, line ends), invisible format characters (such as those
    that reverse the direction of text), unusual spaces and unassigned code points.
    """
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)
